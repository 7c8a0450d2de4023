"""A distillation script for TRL. The same with a selector is three lines away.

Run it: python examples/trl_script.py
Compare: diff examples/trl_script.py examples/from_trl.py
"""

import argparse

from taopd import build_lab, load_prompts  # two small models and prompts; here stand your own

# isort: split
from trl import DistillationConfig, DistillationTrainer

argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS).parse_args()  # takes none
lab = build_lab("dialect")
settings = {
    "max_steps": 10,
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 32,
    "max_completion_length": lab.max_completion_length,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
}
args = DistillationConfig("runs/from-trl", **settings)
trainer = DistillationTrainer(
    model=str(lab.student),
    teacher_model=str(lab.teacher),
    args=args,
    train_dataset=load_prompts(lab.prompts, split="train"),
)
trainer.train()
print(f"{trainer.state.global_step} steps with {type(trainer).__name__}")
