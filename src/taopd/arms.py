"""One arm of a comparison: train by its settings, evaluate along the way, leave one `results.json`.

An arm is a folder with `arm.json` in it; `python -m taopd.arms FOLDER` runs it in a process of its own, so
that arms cannot disturb each other's random streams or threads, and a killed comparison keeps the arms
that had finished. Training goes through the same `TeachabilityTrainer` as everything else.
"""

import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from taopd.config import TeachabilityConfig
from taopd.data import load_prompts
from taopd.evaluate import evaluate
from taopd.rollout_log import ScoredBatch
from taopd.runs import write_json
from taopd.trainer import TeachabilityTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Everything a process needs to run one arm; plain values, so that it is its own JSON."""

    name: str
    seed: int
    config: dict[str, Any]
    """Fields of `TeachabilityConfig`, without output_dir and seed."""
    student: str
    teacher: str
    prompts: str
    """File or hub name with prompt, answer and the splits "train" and "test"."""
    match: str
    """How a completion is graded; see `taopd.evaluate`."""
    evaluate_every: int
    """Optimizer steps between two evaluations; also before the first and after the last step."""
    num_test_prompts: int
    token_kinds: list[str] | None = None
    """Kind of each token id, for the tally of what was kept."""
    save_model: bool = False

    @property
    def folder_name(self) -> str:
        """Name of the arm's folder below its comparison's."""
        return f"{self.name}-seed{self.seed}"


class AccuracyCurve(TrainerCallback):
    """Greedy and sampled accuracy before training, every `every` steps and at the end."""

    def __init__(self, arm: Arm, tokenizer) -> None:
        self._arm = arm
        self._tokenizer = tokenizer
        self._problems = load_prompts(arm.prompts, split="test", require_answer=True).select(
            range(arm.num_test_prompts)
        )
        self.greedy: list[list[float]] = []
        self.sampled: list[list[float]] = []
        self.train_seconds: list[list[float]] = []
        """[step, seconds of training so far], evaluations left out."""
        self.seconds = 0.0
        self._begun = 0.0

    def measure(self, model, step: int) -> None:
        """Append one point to both curves."""
        started = time.perf_counter()
        self._begun = self._begun or started
        self.train_seconds.append([step, round(started - self._begun - self.seconds, 3)])
        for curve, greedy in ((self.greedy, True), (self.sampled, False)):
            result = evaluate(
                model,
                self._tokenizer,
                self._problems,
                greedy=greedy,
                match=self._arm.match,
                max_new_tokens=self._arm.config["max_completion_length"],
                batch_size=len(self._problems),
                seed=self._arm.seed,
            )
            curve.append([step, result.accuracy])
        self.seconds += time.perf_counter() - started

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self._arm.evaluate_every == 0 or state.global_step == args.max_steps:
            self.measure(model, state.global_step)


class KindTally:
    """Counts kept tokens by kind and step; an observer of the trainer."""

    def __init__(self, kinds: list[str]) -> None:
        self._kinds = kinds
        self.curve: list[tuple[int, dict[str, int]]] = []

    def __call__(self, scored: ScoredBatch) -> None:
        kept = scored.choice.selection.kept[scored.mine].to(scored.token_ids.device)
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
    args = TeachabilityConfig(
        output_dir=str(folder),
        seed=arm.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        **arm.config,
    )
    tokenizer = AutoTokenizer.from_pretrained(arm.student, padding_side="left")
    curve = AccuracyCurve(arm, tokenizer)
    trainer = TeachabilityTrainer(
        model=AutoModelForCausalLM.from_pretrained(arm.student, dtype=torch.float32),
        teacher_model=arm.teacher,
        args=args,
        train_dataset=load_prompts(arm.prompts, split="train"),
        processing_class=tokenizer,
        callbacks=[curve],
    )
    trainer.remove_callback(ProgressCallback)
    tally = KindTally(arm.token_kinds or [])
    if arm.token_kinds is not None:
        trainer.observers.append(tally)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started - curve.seconds
    if arm.save_model:
        trainer.save_model(str(folder / "model"))
    kept = [entry["select/kept_fraction"] for entry in trainer.state.log_history if "loss" in entry]
    results = {
        "name": arm.name,
        "selector": args.selector,
        "budget": args.budget if args.selector != "full" else 1.0,
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
        "steps": args.max_steps,
    }
    write_json(folder / "results.json", results)
    return results


def write_arm(arm: Arm, folder: Path) -> None:
    """Put `arm.json` into the arm's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "arm.json", asdict(arm))


def main() -> None:
    """Run the arm whose folder is the first argument."""
    folder = Path(sys.argv[1])
    run_arm(Arm(**json.loads((folder / "arm.json").read_text())), folder)


if __name__ == "__main__":
    main()
