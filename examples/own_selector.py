"""A selector of your own, beside the published one on the same tokens.

Run it: python examples/own_selector.py

A selector is a function from a view of all tokens of a batch to one score a token; the highest scores train.
"""

import argparse

from taopd import (
    TeachabilityConfig,
    TeachabilityTrainer,
    build_lab,
    load_prompts,
    register_selector,
)

argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS).parse_args()  # takes none


@register_selector("sure_but_wrong")
def sure_but_wrong(view):
    """Disagreement within reach where the student is sure: d, c, h are D~, C~, H~ in [0, 1]."""
    return view.d * view.c * (1 - view.h)


lab = build_lab("dialect")
args = TeachabilityConfig(
    output_dir="runs/own-selector",
    selector="sure_but_wrong",
    shadow_selectors=["teachability", "random"],  # what they would have kept of the same tokens
    budget=0.1,
    score_top_k=lab.top_k,
    max_steps=10,
    logging_steps=5,
    learning_rate=3e-4,
    per_device_train_batch_size=32,
    max_completion_length=lab.max_completion_length,
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
)
prompts = load_prompts(lab.prompts, split="train")
trainer = TeachabilityTrainer(str(lab.student), str(lab.teacher), args, train_dataset=prompts)
trainer.train()

for entry in trainer.state.log_history:
    for name in args.shadow_selectors:
        if (shared := entry.get(f"shadow/jaccard/{name}")) is not None:
            print(
                f"step {entry['step']}: {shared:.0%} of the tokens kept by it or by {name} are kept by both"
            )
