"""The smallest run: the tiny lab's student learns from its teacher on a tenth of the tokens.

Run it: python examples/minimal.py (the first call makes the lab's two models, in a minute)

In place of the lab: folders or hub ids of your own student and teacher, and a file with a column "prompt".
"""

import argparse

from taopd import TeachabilityConfig, TeachabilityTrainer, build_lab, load_prompts

argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS).parse_args()  # takes none
lab = build_lab("dialect")
args = TeachabilityConfig(
    output_dir="runs/minimal",
    budget=0.1,  # the share of the tokens that train
    score_top_k=lab.top_k,  # K: the lab's vocabulary has 47 words; leave out the default, 16, on real models
    max_steps=20,
    learning_rate=3e-4,
    per_device_train_batch_size=32,
    max_completion_length=lab.max_completion_length,
    bf16=False,  # these three lines are for a machine without a GPU
    use_cpu=True,
    gradient_checkpointing=False,
)
prompts = load_prompts(lab.prompts, split="train")
trainer = TeachabilityTrainer(str(lab.student), str(lab.teacher), args, train_dataset=prompts)
trainer.train()
trainer.save_model("runs/minimal/model")

logged = [entry for entry in trainer.state.log_history if "select/kept_tokens" in entry]
print(f"kept {logged[-1]['select/kept_fraction']:.0%} of the tokens of the last logged batch")
print("the page: taopd report runs/minimal -o minimal.html")
