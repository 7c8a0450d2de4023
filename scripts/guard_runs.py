"""Runs of the tiny labs with what a guard could look at, every five steps. For `scripts/pages/guard.py`.

    python -m scripts.guard_runs --runs runs/guard --loss reverse_kl     # half an hour of one core, resumable

Five arms of every lab at 10 %, both losses, two seeds, constant learning rate 3e-4, 32 rollouts a step,
400 steps. Greedy accuracy on 200 held-out prompts every 20 steps says afterwards who collapsed; no signal
reads it.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from scripts import unseen_labs
from scripts.arguments import Arguments
from taopd.cli import positive
from taopd.experiments.lab import VARIANTS, build_lab
from taopd.experiments.lab.demo import lab_arm
from taopd.experiments.lab.stacked import Stack, StackStep
from taopd.experiments.lab.stacked.problems import Exam
from taopd.experiments.lab.stacked.trace import idle_drift_of
from taopd.experiments.lab.task import EOS_ID
from taopd.losses import reverse_kl
from taopd.runs.jsonl import write_text

STEPS, LOOK_EVERY, EXAM_EVERY = 400, 5, 20
ARMS = {
    "anchored": {"method": "anchored"},
    "published": {},
    "C-only": {"selector": "compatible"},
    "full": {"selector": "full"},
    "reach": {"method": "reach"},
}
SEEDS = (0, 1)
LOSSES = ("reverse_kl", "sampled_reverse_kl")
SHARED = {"per_device_train_batch_size": 32, "learning_rate": 3e-4, "budget": 0.1}
FOREIGN = 0.01


class Looks:
    """What every arm shows at every look, one list a signal; S the student, R the initial one, T the teacher.

    entropy, idle_drift, length: as the guard reads them
    kept_compatibility   C of the selected
    drift           KL(S || R) at unselected tokens
    stray           sum_v max(p_S - max(p_R, p_T), 0), mass that neither R nor T gives: 0 for S between them
    lost            sum_v max(min(p_R, p_T) - p_S, 0), mass that both give and S does not: likewise
    stray_rest, lost_rest   the same at unselected tokens
    excess          E_S[log p_S - log max(p_R, p_T)] where it is positive
    foreign         share of the sampled tokens that R and T both give less than 0.01
    stop            p_S of the end where R gives it more than one half; 1 where there is no such token
    to_teacher      KL(S || T)
    disagreement, compatibility, teachable   D, C and D C, means over all tokens
    kept_disagreement   D of the selected
    truncated       share of the completions without an end
    """

    def __init__(self, num_arms: int) -> None:
        self.rows: list[dict[str, list[float]]] = [{} for _ in range(num_arms)]

    def __call__(self, seen: StackStep) -> None:
        if seen.step % LOOK_EVERY:
            return
        now, teacher, reference = (
            seen.student_logprobs,
            seen.teacher_logprobs,
            seen.reference_logprobs(),
        )
        idle = idle_drift_of(seen)
        most = torch.maximum(reference, teacher)
        y = seen.targets.unsqueeze(1)
        columns = {
            "drift": reverse_kl(now, reference),
            "stray": (now.exp() - most.exp()).clamp_min(0).sum(-1),
            "lost": (torch.minimum(reference, teacher).exp() - now.exp()).clamp_min(0).sum(-1),
            "excess": reverse_kl(now, most).clamp_min(0),
            "to_teacher": reverse_kl(now, teacher),
            "foreign": (most.gather(1, y).squeeze(1).exp() < FOREIGN).float(),
        }
        at_end = reference[:, EOS_ID].exp() > 0.5
        arms = zip(seen.rows, seen.tables, seen.choices, self.rows, strict=True)
        for arm, (here, table, choice, row) in enumerate(arms):
            kept = choice.selection.kept
            rest = ~kept if bool((~kept).any()) else kept
            num_rows = int(table.completion.unique().numel())
            values = {name: column[here].mean() for name, column in columns.items()} | {
                "drift": columns["drift"][here][rest].mean(),
                "stray_rest": columns["stray"][here][rest].mean(),
                "lost_rest": columns["lost"][here][rest].mean(),
                "stop": _mean_or_one(now[here][at_end[here], EOS_ID].exp()),
                "idle_drift": idle[here][rest].mean(),
                "entropy": table.entropy.mean(),
                "length": len(table) / num_rows,
                "truncated": 1.0 - (seen.targets[here] == EOS_ID).sum() / num_rows,
                "kept_compatibility": table.compatibility[kept].mean(),
                "kept_disagreement": table.disagreement[kept].mean(),
                "disagreement": table.disagreement.mean(),
                "compatibility": table.compatibility.mean(),
                "teachable": (table.disagreement * table.compatibility).mean(),
                "update_norm": seen.update_norms[arm],
                "gradient_norm": seen.gradient_norms[arm],
            }
            for name, value in values.items():
                row.setdefault(name, []).append(round(float(value), 6))


def _mean_or_one(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else 1.0


def run(variant: str, loss: str, steps: int) -> dict:
    """All arms of one lab and loss, as one stack."""
    # In this process: another one would not know the labs that are registered here.
    lab = build_lab(variant, parallel=False)
    arms = [
        replace(
            lab_arm(lab, name, SHARED | {"loss": loss} | settings, seed=seed, steps=steps),
            num_test_prompts=200,
        )
        for name, settings in ARMS.items()
        for seed in SEEDS
    ]
    stack, exam, looks = Stack(arms, output_dir="unused"), Exam(arms[0]), Looks(len(arms))
    greedy = [[value] for value in exam(stack.shape, stack.weights, greedy=True)]
    for step in range(steps):
        stack.step(step, (looks,) if step % LOOK_EVERY == 0 else ())
        if (step + 1) % EXAM_EVERY == 0:
            ends = exam(stack.shape, stack.weights, greedy=True)
            for curve, value in zip(greedy, ends, strict=True):
                curve.append(value)
    return {
        "variant": variant,
        "loss": loss,
        "look_every": LOOK_EVERY,
        "exam_every": EXAM_EVERY,
        "runs": [
            {"arm": arm.name, "seed": arm.seed, "greedy": curve, "looks": row}
            for arm, curve, row in zip(arms, greedy, looks.rows, strict=True)
        ],
    }


def check_finished(path: Path, steps: int) -> None:
    """Leave with a message if the runs in a file are not those that are asked for."""
    found = json.loads(path.read_text())
    arms = [(run["arm"], run["seed"]) for run in found["runs"]]
    done = {found["exam_every"] * (len(run["greedy"]) - 1) for run in found["runs"]}
    asked = [(name, seed) for name in ARMS for seed in SEEDS]
    if arms != asked or done != {steps - steps % EXAM_EVERY}:
        raise SystemExit(
            f"{path} holds other arms, seeds or steps than these: name another --runs, or delete it"
        )


def main() -> None:
    """Run what is missing."""
    unseen_labs.register()
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/guard"))
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), default=[])
    parser.add_argument("--loss", action="append", choices=LOSSES, default=[])
    parser.add_argument("--steps", type=positive, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for loss in args.loss or LOSSES:
        for variant in args.variant or VARIANTS:
            path = args.runs / f"{variant}__{loss}.json"
            if path.exists():
                check_finished(path, args.steps)
                continue
            started = time.process_time()
            document = run(variant, loss, args.steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(document) + "\n")
            print(f"{path}: {time.process_time() - started:.0f} CPU seconds", flush=True)


if __name__ == "__main__":
    main()
