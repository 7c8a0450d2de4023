"""One arm of a comparison: a training run with evaluations, summarized in one `results.json`.

An arm is a folder with `arm.json` in it; `python -m taopd.experiments.arm FOLDER` runs it in a process of its
own, so that arms cannot disturb each other's random streams or threads, and a killed comparison keeps the
arms that had finished. Training goes through the same `TeachabilityTrainer` as everything else.
"""

import hashlib
import json
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import TrainerCallback

from taopd.errors import DataError
from taopd.experiments.cpu import num_threads, use_bf16
from taopd.experiments.evaluation.evaluate import evaluate
from taopd.experiments.pool import CURVE_FILE, STOP_WITH_PARENT
from taopd.models.prompts import load_model, load_prompts, load_tokenizer
from taopd.runs.jsonl import append_jsonl, write_json
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.scored_batch import ScoredBatch
from taopd.trainer.step_lines import StepLines, plain
from taopd.trainer.trainer import TeachabilityTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """The description of one arm; plain values that convert to JSON."""

    name: str
    seed: int
    config: dict[str, Any]
    """Fields of `TeachabilityConfig`, without output_dir and seed."""
    student: str
    teacher: str
    prompts: str
    """File or hub name with prompt, answer and the splits "train" and "test"."""
    match: str
    """How a completion is graded; see `taopd.experiments.evaluation.evaluate`."""
    evaluate_every: int
    """Optimizer steps between two evaluations; also before the first and after the last step."""
    num_test_prompts: int
    token_kinds: list[str] | None = None
    """Kind of each token id, for the tally of what was kept."""
    save_model: bool = False
    test_prompts: str | None = None
    """Evaluation set of its own; default the split "test" of `prompts`."""
    max_new_tokens: int | None = None
    """Of evaluation; default `max_completion_length`."""
    evaluation_batch_size: int | None = None
    """Completions generated together; default all."""
    max_selected_tokens: int | None = None
    """Stop at the first step with this many kept tokens, summed over generation batches."""
    max_seconds: float | None = None
    """Stop at the first step after so many seconds of training, evaluations left out."""

    @property
    def folder_name(self) -> str:
        """Name of the arm's folder below its comparison's."""
        return f"{self.name}-seed{self.seed}"


class KeptTokens:
    """Observer of the trainer: kept tokens over all ranks, their share and kinds, and the prompts' digest."""

    def __init__(self, kinds: list[str] | None) -> None:
        self._kinds = kinds
        self._prompts = hashlib.sha256()
        self.total = 0
        self._shares: list[float] = []
        self.by_kind_curve: list[tuple[int, Counter[str]]] = []
        """Step, and its kept tokens of this process by kind."""

    def __call__(self, scored: ScoredBatch) -> None:
        self.total += scored.choice.selection.num_kept
        self._shares.append(scored.choice.selection.kept_fraction)
        ids, mask = (scored.batch[name].cpu() for name in ("prompt_ids", "prompt_mask"))
        for row, valid in zip(ids, mask.bool(), strict=True):
            self._prompts.update(json.dumps(row[valid].tolist()).encode())
        if self._kinds is not None:
            kept = scored.choice.selection.kept[scored.local].to(scored.token_ids.device)
            kinds = Counter(self._kinds[token] for token in scored.token_ids[kept].tolist())
            self.by_kind_curve.append((scored.step, kinds))

    @property
    def share(self) -> float:
        """Kept tokens over valid ones, mean over the generation batches; not of the log, which has gaps."""
        return mean(self._shares)

    @property
    def prompt_digest(self) -> str:
        """The same for arms that saw the same prompts in order."""
        return self._prompts.hexdigest()[:16]


class AccuracyCurve(TrainerCallback):
    """Greedy and sampled accuracy before training, every `evaluate_every` steps and at the end."""

    def __init__(self, arm: Arm, tokenizer, tokens: KeptTokens, folder: Path) -> None:
        self._arm = arm
        self._log = folder / CURVE_FILE
        self._tokenizer = tokenizer
        self._problems = load_problems(arm)
        self._tokens = tokens
        self._points: list[dict[str, Any]] = []
        self.seconds = 0.0
        """Of evaluations."""
        self._begun = 0.0

    def measure(self, model, step: int) -> None:
        """Add one point to the curves."""
        started = time.perf_counter()
        self._begun = self._begun or started
        results = {
            how: evaluate(
                model,
                self._tokenizer,
                self._problems,
                greedy=how == "greedy",
                match=self._arm.match,
                max_new_tokens=self._arm.max_new_tokens
                or self._arm.config["max_completion_length"],
                batch_size=self._arm.evaluation_batch_size or len(self._problems),
                seed=self._arm.seed,
            )
            for how in ("greedy", "sampled")
        }
        point = {
            "step": step,
            **{f"accuracy_{how}": result.accuracy for how, result in results.items()},
            # Arms are compared problem by problem: one digit for each.
            **{
                f"right_{how}": "".join("01"[t["correct"]] for t in result.transcripts)
                for how, result in results.items()
            },
            "mean_tokens_greedy": mean(t["num_tokens"] for t in results["greedy"].transcripts),
            "selected_tokens": self._tokens.total,
            "train_seconds": round(started - self._begun - self.seconds, 3),
        }
        append_jsonl(self._log, point)
        self._points.append(point | {"prompt_digests": self._tokens.prompt_digest})
        self.seconds += time.perf_counter() - started

    def curve(self, name: str) -> list[list[Any]]:
        """[step, value so far] of every point; seconds leave evaluations out."""
        return [[point["step"], point[name]] for point in self._points]

    def elapsed(self) -> float:
        """Seconds of training since the first evaluation, evaluations left out."""
        return time.perf_counter() - self._begun - self.seconds

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._log.unlink(missing_ok=True)  # Of an earlier attempt.
        self.measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self._arm.evaluate_every == 0 or state.global_step == args.max_steps:
            self.measure(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self._points[-1]["step"] != state.global_step:  # Stopped between two evaluations.
            self.measure(model, state.global_step)


class StopRule(TrainerCallback):
    """Ends training at the first step that reaches the arm's total of tokens or seconds; knows why."""

    def __init__(self, arm: Arm, tokens: KeptTokens, curve: AccuracyCurve) -> None:
        self._arm, self._tokens, self._curve = arm, tokens, curve
        self.reason = "max_steps"

    def on_step_end(self, args, state, control, **kwargs):
        tokens, seconds = self._arm.max_selected_tokens, self._arm.max_seconds
        if tokens is not None and self._tokens.total >= tokens:
            self.reason, control.should_training_stop = "selected_tokens", True
        elif seconds is not None and self._curve.elapsed() >= seconds:
            self.reason, control.should_training_stop = "seconds", True

    def on_train_end(self, args, state, control, **kwargs):
        if self.reason == "max_steps" and state.global_step < args.max_steps:
            self.reason = "collapse_guard"  # Nothing else ends an arm.


def load_problems(arm: Arm):
    """The arm's evaluation problems, the first `num_test_prompts` of them.

    Raises:
        DataError: no answers, or fewer problems than asked for.
    """
    name = arm.test_prompts or arm.prompts
    rows = load_prompts(name, split=None if arm.test_prompts else "test", require_answer=True)
    if len(rows) < arm.num_test_prompts:
        raise DataError(
            f"{name} has {len(rows)} test problems: num_test_prompts={arm.num_test_prompts} is too many"
        )
    return rows.select(range(arm.num_test_prompts))


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
    """Train and evaluate one arm; write and return its results."""
    student = load_model(arm.student, dtype=torch.float32)
    size = student.num_parameters()
    torch.set_num_threads(num_threads(size))
    defaults: dict[str, Any] = {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": use_bf16(size),
        "report_to": "none",
        "save_strategy": "no",
    }
    args = TeachabilityConfig(output_dir=str(folder), seed=arm.seed, **defaults | arm.config)
    tokenizer = load_tokenizer(arm.student)
    tokens = KeptTokens(arm.token_kinds)
    curve = AccuracyCurve(arm, tokenizer, tokens, folder)
    stop = StopRule(arm, tokens, curve)
    trainer = TeachabilityTrainer(
        model=student,
        teacher_model=arm.teacher,
        args=args,
        train_dataset=load_prompts(arm.prompts, split="train"),
        processing_class=tokenizer,
        callbacks=[curve, stop],
    )
    # Several arms share a terminal; the comparison says how far they are, and writes the arm's files.
    trainer.remove_callback(StepLines)
    trainer.writes_record = False
    trainer.observers.append(tokens)
    started = time.perf_counter()
    trainer.train(check=False)
    seconds = time.perf_counter() - started - curve.seconds
    if arm.save_model:
        trainer.save_model(str(folder / "model"))
    by_kind = sum((counts for _, counts in tokens.by_kind_curve), Counter())
    curves = [curve.curve(f"accuracy_{how}") for how in ("greedy", "sampled")]
    results = outcome(arm, args, *curves) | {
        "kept_fraction": tokens.share,
        "selected_share_by_kind": shares(by_kind),
        "selected_by_kind_curve": tokens.by_kind_curve,
        "dtype": "bfloat16" if args.bf16 else "float32",
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
    return results


def _leave_when_stdin_ends() -> None:
    """End the process when stdin closes, which it does when the parent dies, even by SIGKILL."""
    # Not sys.stdin: the interpreter could not close it while this thread reads.
    while os.read(0, 1):
        pass
    os._exit(1)


def write_arm(arm: Arm, folder: Path) -> None:
    """Put `arm.json` into the arm's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "arm.json", asdict(arm))


def main() -> None:
    """Run the arm whose folder is the first argument; with --stop-with-parent, end when stdin ends."""
    folder = Path(sys.argv[1])
    if STOP_WITH_PARENT in sys.argv:
        threading.Thread(target=_leave_when_stdin_ends, daemon=True).start()
    # As the commands do: the log is read where an arm fails, and has no use for bars and deprecations.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\b")
    plain(quiet=True)
    run_arm(Arm(**json.loads((folder / "arm.json").read_text())), folder)


if __name__ == "__main__":
    main()
