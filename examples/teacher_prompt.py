"""A teacher that sees more: it reads the answer before it scores what the student wrote without it.

Run it: python examples/teacher_prompt.py

Here the teacher is the student itself, as it was before training. Its prompt holds a column of the dataset:
a worked solution, a hint, feedback, or rules that shall be distilled into the weights.
"""

import argparse

from taopd import TeachabilityConfig, TeachabilityTrainer, build_lab, load_prompts

argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS).parse_args()  # takes none
lab = build_lab("dialect")
args = TeachabilityConfig(
    output_dir="runs/teacher-prompt",
    teacher_prompt_template="{answer} {prompt}",  # {prompt} is the student's, {answer} a column
    budget=0.1,
    score_top_k=lab.top_k,
    max_steps=10,
    learning_rate=3e-4,
    per_device_train_batch_size=32,
    max_completion_length=lab.max_completion_length,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
)
prompts = load_prompts(lab.prompts, split="train")
trainer = TeachabilityTrainer(str(lab.student), "self", args, train_dataset=prompts)
trainer.train()
print(f"{trainer.state.global_step} steps: the student wrote from its prompt, the teacher saw more")
