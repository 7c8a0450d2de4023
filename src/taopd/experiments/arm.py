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
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from taopd.errors import DataError
from taopd.experiments.evaluation.evaluate import evaluate
from taopd.experiments.pool import CURVE_FILE, STOP_WITH_PARENT
from taopd.models.prompts import load_model, load_prompts, load_tokenizer
from taopd.runs.jsonl import append_jsonl, read_jsonl, write_json
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.scored_batch import ScoredBatch
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


class AccuracyCurve(TrainerCallback):
    """Greedy and sampled accuracy before training, every `every` steps and at the end."""

    def __init__(self, arm: Arm, tokenizer, tokens: "TokenCount", folder: Path) -> None:
        self._arm = arm
        self._log = folder / CURVE_FILE
        self._tokenizer = tokenizer
        self._problems = load_problems(arm)
        self._tokens = tokens
        self.greedy: list[list[float]] = []
        self.sampled: list[list[float]] = []
        self.train_seconds: list[list[float]] = []
        """[step, seconds of training so far], evaluations left out."""
        self.selected_tokens: list[list[int]] = []
        """[step, tokens kept so far]."""
        self.prompt_digests: list[list[Any]] = []
        """[step, digest of all prompts so far]: the same for arms that saw the same prompts in order."""
        self.seconds = 0.0
        self._begun = 0.0

    def measure(self, model, step: int) -> None:
        """Append one point to both curves."""
        started = time.perf_counter()
        self._begun = self._begun or started
        self.train_seconds.append([step, round(started - self._begun - self.seconds, 3)])
        self.selected_tokens.append([step, self._tokens.total])
        self.prompt_digests.append([step, self._tokens.prompt_digest])
        for curve, greedy in ((self.greedy, True), (self.sampled, False)):
            result = evaluate(
                model,
                self._tokenizer,
                self._problems,
                greedy=greedy,
                match=self._arm.match,
                max_new_tokens=self._arm.max_new_tokens
                or self._arm.config["max_completion_length"],
                batch_size=self._arm.evaluation_batch_size or len(self._problems),
                seed=self._arm.seed,
            )
            curve.append([step, result.accuracy])
        point = {
            "step": step,
            "accuracy_greedy": self.greedy[-1][1],
            "accuracy_sampled": self.sampled[-1][1],
            "selected_tokens": self._tokens.total,
            "train_seconds": self.train_seconds[-1][1],
        }
        append_jsonl(self._log, point)
        self.seconds += time.perf_counter() - started

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
        if self.greedy[-1][0] != state.global_step:  # Stopped between two evaluations.
            self.measure(model, state.global_step)


class TokenCount:
    """Observer of the trainer: number of kept tokens over all ranks, and a digest of the prompts."""

    def __init__(self) -> None:
        self.total = 0
        self._prompts = hashlib.sha256()

    def __call__(self, scored: ScoredBatch) -> None:
        self.total += scored.choice.selection.num_kept
        ids, mask = (scored.batch[name].cpu() for name in ("prompt_ids", "prompt_mask"))
        for row, kept in zip(ids, mask.bool(), strict=True):
            self._prompts.update(json.dumps(row[kept].tolist()).encode())

    @property
    def prompt_digest(self) -> str:
        return self._prompts.hexdigest()[:16]


class StopRule(TrainerCallback):
    """Ends training at the first step that reaches the arm's total of tokens or seconds."""

    def __init__(self, arm: Arm, tokens: TokenCount, curve: AccuracyCurve) -> None:
        self._arm, self._tokens, self._curve = arm, tokens, curve
        self.reason = "max_steps"

    def on_step_end(self, args, state, control, **kwargs):
        tokens, seconds = self._arm.max_selected_tokens, self._arm.max_seconds
        if tokens is not None and self._tokens.total >= tokens:
            self.reason, control.should_training_stop = "selected_tokens", True
        elif seconds is not None and self._curve.elapsed() >= seconds:
            self.reason, control.should_training_stop = "seconds", True


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


class KindTally:
    """Observer of the trainer: number of kept tokens by kind and step."""

    def __init__(self, kinds: list[str]) -> None:
        self._kinds = kinds
        self.curve: list[tuple[int, dict[str, int]]] = []

    def __call__(self, scored: ScoredBatch) -> None:
        kept = scored.choice.selection.kept[scored.local].to(scored.token_ids.device)
        kinds = Counter(self._kinds[token] for token in scored.token_ids[kept].tolist())
        self.curve.append((scored.step, dict(kinds)))

    def shares(self) -> dict[str, float]:
        """Share of all kept tokens by kind."""
        total: Counter[str] = Counter()
        for _, counts in self.curve:
            total.update(counts)
        return {kind: count / max(1, total.total()) for kind, count in sorted(total.items())}


def run_arm(arm: Arm, folder: Path) -> dict[str, Any]:
    """Train and evaluate one arm; write and return its results."""
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    defaults: dict[str, Any] = {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
    }
    args = TeachabilityConfig(output_dir=str(folder), seed=arm.seed, **defaults | arm.config)
    tokenizer = load_tokenizer(arm.student)
    tokens = TokenCount()
    curve = AccuracyCurve(arm, tokenizer, tokens, folder)
    stop = StopRule(arm, tokens, curve)
    trainer = TeachabilityTrainer(
        model=load_model(arm.student, dtype=torch.float32),
        teacher_model=arm.teacher,
        args=args,
        train_dataset=load_prompts(arm.prompts, split="train"),
        processing_class=tokenizer,
        callbacks=[curve, stop],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.observers.append(tokens)
    tally = KindTally(arm.token_kinds or [])
    if arm.token_kinds is not None:
        trainer.observers.append(tally)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started - curve.seconds
    if arm.save_model:
        trainer.save_model(str(folder / "model"))
    logs = read_jsonl(folder / "metrics.jsonl")
    kept = [line["select/kept_fraction"] for line in logs if "loss" in line]
    results = {
        "name": arm.name,
        "selector": args.selector,
        "budget": args.budget if args.selector != "full" else 1.0,
        "loss": args.loss,
        "seed": arm.seed,
        "base_accuracy": curve.greedy[0][1],
        "accuracy_greedy": curve.greedy[-1][1],
        "accuracy_sampled": curve.sampled[-1][1],
        "accuracy_curve": curve.greedy,
        "accuracy_sampled_curve": curve.sampled,
        "num_test_prompts": arm.num_test_prompts,
        "kept_fraction": sum(kept) / len(kept),
        "selected_share_by_kind": tally.shares(),
        "selected_by_kind_curve": [[step, counts] for step, counts in tally.curve],
        "train_seconds": seconds,
        "train_seconds_curve": curve.train_seconds,
        "steps": trainer.state.global_step,
        "stopped_by": stop.reason,
        "selected_tokens": tokens.total,
        "selected_tokens_curve": curve.selected_tokens,
        "prompt_digests": curve.prompt_digests,
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
    run_arm(Arm(**json.loads((folder / "arm.json").read_text())), folder)


if __name__ == "__main__":
    main()
