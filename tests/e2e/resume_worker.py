"""One rank of `test_resume_ranks.py`: resumed runs, and bad numbers that only rank 1 sees.

Run as: torchrun --nproc-per-node 2 resume_worker.py MICRO_LAB_FOLDER OUTPUT_FOLDER
Every rank writes what it found to rank-R.json; the test compares.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from scripts.reliability.forked import leave
from taopd.errors import NumericsError
from taopd.models.prompts import load_prompts
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer

LAB, OUT = Path(sys.argv[1]), Path(sys.argv[2])


def make(name: str, **settings: Any) -> TeachabilityTrainer:
    """Two micro-batches of 2 a rank, sampled for real."""
    args = TeachabilityConfig(
        output_dir=str(OUT / name),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        max_completion_length=6,
        score_top_k=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        budget=0.3,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        **({"method": "anchored"} | settings),
    )
    return TeachabilityTrainer(
        model=str(LAB / "student"),
        teacher_model=str(LAB / "teacher"),
        args=args,
        train_dataset=load_prompts(str(LAB / "prompts.parquet"), split="train"),
    )


def weights(trainer: TeachabilityTrainer) -> list[float]:
    """One exact number per parameter."""
    return [float(p.detach().double().pow(2).sum()) for p in trainer.model.parameters()]


def main() -> None:
    """Run the cases and write this rank's findings."""
    whole = make("whole")
    whole.train(check=False)
    rank, found = whole.args.process_index, {"whole": weights(whole)}
    part = make("whole")
    part.train(resume_from_checkpoint=str(OUT / "whole" / "checkpoint-2"))
    found["resumed"] = weights(part)

    skipping = make("skip", on_bad_numbers="skip")
    if rank == 1:
        skipping.model.model.layers[0].mlp.up_proj.weight.register_hook(
            lambda g: g * math.nan if skipping.state.global_step == 1 else g
        )
    skipping.train(check=False)
    found["skipped"] = [log["numerics/skipped"] for log in skipping.state.log_history[:4]]
    found["after_skip"] = weights(skipping)

    stopping = make("stop")
    function = stopping._loss_function
    if rank == 1:
        stopping._loss_function = lambda logprobs, targets: (
            function(logprobs, targets) / (0.0 if stopping.state.global_step == 2 else 1.0)
        )
    try:
        stopping.train(check=False)
    except NumericsError as error:
        found["stopped"] = str(error)
    again = make("stop")
    again.train(resume_from_checkpoint=True)
    found["after_stop"] = weights(again)
    (OUT / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave()
