"""One arm of a comparison: a training run with evaluations, summarized in one `results.json`.

An arm is a folder with `arm.json` in it; `python -m taopd.experiments.arm FOLDER` runs it in a process of its
own, so that arms cannot disturb each other's random streams or threads, and a killed comparison keeps the
arms that had finished. A long arm saves checkpoints, from which it goes on. Training goes through the same
`TeachabilityTrainer` as everything else.
"""

import json
import os
import shutil
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from trl import get_peft_config

from taopd.experiments.arm_observers import AccuracyCurve, ArmCheckpoints, KeptTokens, StopRule
from taopd.experiments.arm_settings import Arm
from taopd.experiments.arm_student import load_student, number_format, split_settings
from taopd.experiments.cpu import num_threads, use_bf16
from taopd.experiments.pool import STOP_WITH_PARENT
from taopd.models.prompts import load_prompts, load_tokenizer
from taopd.runs.checkpoints import checkpoints, newest_complete, step_of
from taopd.runs.jsonl import write_json
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.step_lines import StepLines, plain
from taopd.trainer.trainer import TeachabilityTrainer


def outcome(
    arm: Arm, args: TeachabilityConfig, greedy: list[list[Any]], sampled: list[list[Any]]
) -> dict[str, Any]:
    """The part of `results.json` that does not depend on who trained the arm, from its two curves."""
    return {
        "name": arm.name,
        "selector": args.selector,
        "method": args.method,
        "budget": args.budget if args.selector != "full" else 1.0,
        "loss": args.loss,
        "learning_rate": args.learning_rate,
        "seed": arm.seed,
        "base_accuracy": greedy[0][1],
        "accuracy_greedy": greedy[-1][1],
        "accuracy_sampled": sampled[-1][1],
        "accuracy_curve": greedy,
        "accuracy_sampled_curve": sampled,
        "num_test_prompts": arm.num_test_prompts,
    }


def shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Share of all counted tokens by kind."""
    total = max(1, sum(counts.values()))
    return {kind: count / total for kind, count in sorted(counts.items())}


def run_arm(arm: Arm, folder: Path) -> dict[str, Any]:
    """Train and evaluate one arm, from its newest checkpoint on; write and return its results."""
    training, weights = split_settings(arm.config)
    student = load_student(arm.student, weights, training.pop("model_init_kwargs", None))
    size = student.num_parameters()
    torch.set_num_threads(num_threads(size))
    defaults: dict[str, Any] = {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": use_bf16(size),
        "report_to": "none",
    }
    own_checkpoints = "save_strategy" not in training
    if own_checkpoints:
        defaults |= {"save_strategy": "no", "save_total_limit": 1}
    args = TeachabilityConfig(output_dir=str(folder), seed=arm.seed, **defaults | training)
    tokenizer = load_tokenizer(arm.student)
    tokens = KeptTokens(arm.token_kinds)
    curve = AccuracyCurve(arm, tokenizer, tokens, folder, args.chat_template_kwargs)
    stop = StopRule(arm, tokens, curve)
    trainer = TeachabilityTrainer(
        model=student,
        teacher_model=arm.teacher,
        args=args,
        train_dataset=load_prompts(arm.prompts, split="train"),
        processing_class=tokenizer,
        peft_config=get_peft_config(weights),
        callbacks=[curve, stop, *([ArmCheckpoints(folder, curve)] if own_checkpoints else [])],
    )
    # Several arms share a terminal; the comparison says how far they are, and writes the arm's files.
    trainer.remove_callback(StepLines)
    trainer.writes_record = False
    trainer.go_on = "the study goes on with --resume"
    trainer.begin_anew = "the study runs this arm again with --resume"
    trainer.observers.append(tokens)
    # Verified here, and not once more by the trainer.
    trainer.checked = newest_complete(folder)[0]
    trainer.train(trainer.checked, check=False)
    # After its last step a run is resumed without a step, and what callbacks had noted is not read.
    if trainer.checked is not None and (step_of(trainer.checked) or 0) >= args.max_steps:
        trainer.rank_state.restore(trainer.checked)
    seconds = curve.elapsed()
    restored = trainer.guard is not None and trainer.guard.restored
    curve.measure_end(trainer.model, trainer.state.global_step, restored=restored)
    if arm.save_model:
        trainer.save_model(str(folder / "model"))
    by_kind = sum((Counter(counts) for _, counts in tokens.by_kind_curve), Counter())
    curves = [curve.curve(f"accuracy_{how}") for how in ("greedy", "sampled")]
    results = outcome(arm, args, *curves) | {
        "kept_fraction": tokens.share,
        "selected_share_by_kind": shares(by_kind),
        "selected_by_kind_curve": tokens.by_kind_curve,
        "dtype": number_format(student, args),
        "train_seconds": seconds,
        "train_seconds_curve": curve.curve("train_seconds"),
        "steps": trainer.state.global_step,
        "stopped_by": stop.reason,
        "selected_tokens": tokens.total,
        "selected_tokens_curve": curve.curve("selected_tokens"),
        "prompt_digests": curve.curve("prompt_digests"),
        "right_greedy_curve": curve.curve("right_greedy"),
        "right_sampled_curve": curve.curve("right_sampled"),
        "mean_tokens_greedy_curve": curve.curve("mean_tokens_greedy"),
    }
    write_json(folder / "results.json", results)
    if own_checkpoints:
        for place in checkpoints(folder):
            shutil.rmtree(place)
        # TRL writes a model card beside a checkpoint.
        (folder / "README.md").unlink(missing_ok=True)
    return results


def _leave_when_stdin_ends() -> None:
    """End the process when stdin closes, which it does when the parent dies, even by SIGKILL."""
    # Not sys.stdin: the interpreter could not close it while this thread reads.
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> None:
    """Run the arm whose folder is the first argument; with --stop-with-parent, end when stdin ends."""
    folder = Path(sys.argv[1])
    if STOP_WITH_PARENT in sys.argv:
        threading.Thread(target=_leave_when_stdin_ends, daemon=True).start()
    # As the commands do: the log is read where an arm fails, and has no use for bars and deprecations.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\b")
    plain(quiet=True)
    run_arm(Arm(**json.loads((folder / "arm.json").read_text(encoding="utf-8"))), folder)


if __name__ == "__main__":
    main()
