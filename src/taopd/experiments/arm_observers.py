"""What goes along with the training of an arm: kept tokens, accuracy, when it ends, checkpoints."""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import TrainerCallback

from taopd.experiments.arm_settings import Arm, load_problems
from taopd.experiments.evaluation.evaluate import evaluate
from taopd.experiments.pool import CURVE_FILE
from taopd.runs.jsonl import append_jsonl
from taopd.trainer.scored_batch import ScoredBatch

EVERY_SECONDS = 300.0
"""Between two checkpoints of an arm."""
LARGEST_SHARE = 0.02
"""Of an arm's time that checkpoints may take."""
ROOM = 3
"""Checkpoints that must still fit on the disk before one is saved."""


class KeptTokens:
    """Observer of the trainer: kept tokens over all ranks, their share and kinds, and the prompts' digest."""

    def __init__(self, kinds: list[str] | None) -> None:
        self._kinds = kinds
        self._prompts = ""
        self.total = 0
        self._shares: list[float] = []
        self.by_kind_curve: list[tuple[int, dict[str, int]]] = []
        """Step, and its kept tokens of this process by kind."""

    def __call__(self, scored: ScoredBatch) -> None:
        self.total += scored.choice.selection.num_kept
        self._shares.append(scored.choice.selection.kept_fraction)
        ids, mask = (scored.batch[name].cpu() for name in ("prompt_ids", "prompt_mask"))
        # A chain of digests: a hash that goes on could not be put into a checkpoint.
        prompts = [row[valid].tolist() for row, valid in zip(ids, mask.bool(), strict=True)]
        self._prompts = hashlib.sha256(json.dumps([self._prompts, prompts]).encode()).hexdigest()
        if self._kinds is not None:
            kept = scored.choice.selection.kept[scored.local].to(scored.token_ids.device)
            kinds = Counter(self._kinds[token] for token in scored.token_ids[kept].tolist())
            self.by_kind_curve.append((scored.step, dict(kinds)))

    @property
    def share(self) -> float:
        """Kept tokens over valid ones, mean over the generation batches; not of the log, which has gaps."""
        return mean(self._shares)

    @property
    def prompt_digest(self) -> str:
        """The same for arms that saw the same prompts in order."""
        return self._prompts[:16]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        # Taken at every step: entries are not changed, and need no copies of their own.
        lists = {"shares": list(self._shares), "by_kind": list(self.by_kind_curve)}
        return {"total": self.total, "prompts": self._prompts} | lists

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.total, self._prompts = state["total"], state["prompts"]
        self._shares, self.by_kind_curve = list(state["shares"]), list(state["by_kind"])


class AccuracyCurve(TrainerCallback):
    """Greedy and sampled accuracy before training, every `evaluate_every` steps and at the end."""

    def __init__(
        self,
        arm: Arm,
        tokenizer,
        tokens: KeptTokens,
        folder: Path,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._arm, self._template_options = arm, template_options
        self._log = folder / CURVE_FILE
        self._tokenizer = tokenizer
        self._problems = load_problems(arm)
        self._tokens = tokens
        self._points: list[dict[str, Any]] = []
        self.seconds = 0.0
        """Of evaluations and checkpoints."""
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
                template_options=self._template_options,
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
        """Seconds of training since the first evaluation; evaluations and checkpoints left out."""
        return time.perf_counter() - self._begun - self.seconds

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self._log.unlink(missing_ok=True)  # Of an earlier attempt.
            self.measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self._arm.evaluate_every == 0 or state.global_step == args.max_steps:
            self.measure(model, state.global_step)

    def measure_end(self, model, step: int, *, restored: bool) -> None:
        """Add the student that is left, where it has not been measured.

        restored: the collapse guard has put the weights of a checkpoint back.
        """
        if restored or self._points[-1]["step"] != step:  # Stopped between two evaluations.
            self.measure(model, step)

    def checkpoint_state(self) -> dict[str, Any]:
        """The curve so far, the seconds, and what `KeptTokens` counted."""
        seconds = {"train": self.elapsed(), "others": self.seconds}
        return {"points": list(self._points), "seconds": seconds, "tokens": self._tokens.state()}

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Go on from `checkpoint_state()`; points after it leave the log."""
        self._points = list(state["points"])
        self._tokens.load(state["tokens"])
        self.seconds = state["seconds"]["others"]
        self._begun = time.perf_counter() - self.seconds - state["seconds"]["train"]
        self._log.unlink(missing_ok=True)
        for point in self._points:
            append_jsonl(self._log, {k: v for k, v in point.items() if k != "prompt_digests"})


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
        if control.should_training_stop and state.global_step < args.max_steps:
            # Resumed from here, the arm would take one more step.
            control.should_save = False

    def on_train_end(self, args, state, control, **kwargs):
        if self.reason == "max_steps" and state.global_step < args.max_steps:
            self.reason = "collapse_guard"  # Nothing else ends an arm.


class ArmCheckpoints(TrainerCallback):
    """Has a checkpoint saved every `EVERY_SECONDS`, so that a killed comparison goes on inside an arm.

    Checkpoints are the arm's own, and leave with its results. None is saved where it would fill the disk.
    """

    def __init__(self, folder: Path, curve: AccuracyCurve) -> None:
        self._folder, self._curve = folder, curve
        self._last, self._pause = 0.0, EVERY_SECONDS
        self._asked: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = time.perf_counter()
        ends = control.should_training_stop or state.global_step >= args.max_steps
        if ends or now - self._last < self._pause:
            return
        self._last = now
        # Weights, and the optimizer's two moments of those that train.
        size = sum(
            p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in model.parameters()
        )
        if shutil.disk_usage(self._folder).free > ROOM * size:
            self._asked, control.should_save = now, True

    def on_save(self, args, state, control, **kwargs):
        if self._asked is None:  # One that the arm's own settings ask for.
            return
        took, self._asked = time.perf_counter() - self._asked, None
        # Not the method's cost. A slow disk is written to less often.
        self._curve.seconds += took
        self._pause = max(EVERY_SECONDS, took / LARGEST_SHARE)
