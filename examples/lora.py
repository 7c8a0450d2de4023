"""LoRA: an adapter learns, the student's weights stay, and the reference costs no second model.

Run it: python examples/lora.py
"""

import argparse

from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from taopd import TeachabilityConfig, TeachabilityTrainer, build_lab, load_prompts

argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS).parse_args()  # takes none
lab = build_lab("dialect")
args = TeachabilityConfig(
    output_dir="runs/lora",
    budget=0.1,
    score_top_k=lab.top_k,
    max_steps=10,
    learning_rate=2e-3,  # an adapter takes about ten times the rate of the weights
    per_device_train_batch_size=32,
    max_completion_length=lab.max_completion_length,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
)
trainer = TeachabilityTrainer(
    model=str(lab.student),
    teacher_model=str(lab.teacher),
    args=args,
    train_dataset=load_prompts(lab.prompts, split="train"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model("runs/lora/adapter")

base = AutoModelForCausalLM.from_pretrained(lab.student)
merged = PeftModel.from_pretrained(base, "runs/lora/adapter").merge_and_unload()
merged.save_pretrained("runs/lora/merged")
trained = sum(weights.numel() for weights in trainer.model.parameters() if weights.requires_grad)
print(f"trained {trained:,} of {merged.num_parameters():,} weights; merged: runs/lora/merged")
