"""How much of the disagreement was learned so far, at every tenth step of a run.

Run it: python examples/gain_during_training.py

Completions that the student wrote before training are frozen as a bank. The callback scores them again with
the student of now. The gain is the fall of KL(teacher || student) at the same tokens, in nats.
"""

import argparse

from taopd import FixedContextBank, TeachabilityConfig, TeachabilityTrainer, build_lab, load_prompts
from taopd.diagnose.bank import sample_rollouts
from taopd.diagnose.callback import BankCallback
from taopd.models.loading import load_model, load_tokenizer

argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS).parse_args()  # takes none
lab = build_lab("dialect")
prompts = load_prompts(lab.prompts, split="train")
length = {"num_completions": 100, "max_tokens": lab.max_completion_length}
student, tokenizer = load_model(lab.student), load_tokenizer(lab.student)
rollouts = sample_rollouts(student, tokenizer, prompts["prompt"][:100], **length)
models = student, load_model(lab.teacher), tokenizer
bank = FixedContextBank.freeze(*models, rollouts, "runs/small-bank", k=(lab.top_k,), overwrite=True)
args = TeachabilityConfig(
    output_dir="runs/gain-during-training",
    budget=0.1,
    score_top_k=lab.top_k,
    max_steps=40,
    learning_rate=3e-4,
    per_device_train_batch_size=32,
    max_completion_length=lab.max_completion_length,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    logging_steps=10,
)
trainer = TeachabilityTrainer(str(lab.student), str(lab.teacher), args, train_dataset=prompts)
callback = BankCallback.attach(trainer, bank, every=10)  # also in metrics.jsonl, as bank/...
trainer.train()
for step, gain in callback.curve:
    learnable, incompatible = (
        gain[f"bank/gain_forward_nats/{group}"] for group in ("learnable", "incompatible")
    )
    print(f"step {step:>2}: learnable {learnable:+.2f} nats, incompatible {incompatible:+.2f} nats")
