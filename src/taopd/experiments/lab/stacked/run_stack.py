"""Training and evaluation of a stack of arms, as `taopd.experiments.arm.run_arm` does it for one."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from taopd.experiments.arm import outcome, shares
from taopd.experiments.arm_settings import Arm
from taopd.experiments.lab.stacked.problems import Exam
from taopd.experiments.lab.stacked.train import Observer, Stack, StackStep


class _Kept:
    """Counts kept tokens of every arm, by kind."""

    def __init__(self, arms: list[Arm]) -> None:
        self._kinds = arms[0].token_kinds
        self.tokens = [0] * len(arms)
        self.valid = [0] * len(arms)
        self.by_kind: list[Counter[str]] = [Counter() for _ in arms]

    def __call__(self, seen: StackStep) -> None:
        for arm, (rows, choice) in enumerate(zip(seen.rows, seen.choices, strict=True)):
            kept = choice.selection.kept
            ids = seen.targets[rows][kept].tolist()
            self.tokens[arm] += len(ids)
            self.valid[arm] += len(kept)
            if self._kinds is not None:
                self.by_kind[arm].update(self._kinds[index] for index in ids)


def run_stack(
    arms: list[Arm],
    *,
    output_dir: str,
    observers: Sequence[Observer] = (),
    kind: type[Stack] = Stack,
) -> list[dict[str, Any]]:
    """Train and evaluate; one `results.json` document an arm, as `run_arm` writes it.

    Args:
        arms: of one stack; see `Stack`.
        output_dir: named in the settings; nothing is written there.
        observers: called with every step.
        kind: a stack that decides something else, such as the forms of a rule that a study compares.

    Raises:
        ConfigError: for arms that do not fit together.
    """
    torch.set_num_threads(1)
    stack, exam, kept = kind(arms, output_dir=output_dir), Exam(arms[0]), _Kept(arms)
    steps = stack.settings[0].max_steps
    curves: dict[str, list[list[list[float]]]] = {
        name: [[] for _ in arms] for name in ("greedy", "sampled", "tokens")
    }

    def measure(step: int) -> None:
        for name, points in curves.items():
            values: Sequence[float] = kept.tokens
            if name != "tokens":
                values = exam(stack.shape, stack.weights, greedy=name == "greedy")
            for arm, value in enumerate(values):
                points[arm].append([step, value])

    measure(0)
    for step in range(steps):
        stack.step(step, (kept, *observers))
        if (step + 1) % arms[0].evaluate_every == 0 or step + 1 == steps:
            measure(step + 1)
    return [
        outcome(arm, args, curves["greedy"][index], curves["sampled"][index])
        | {
            "selected_tokens_curve": curves["tokens"][index],
            "kept_fraction": kept.tokens[index] / max(1, kept.valid[index]),
            "selected_share_by_kind": shares(kept.by_kind[index]),
            "steps": steps,
        }
        for index, (arm, args) in enumerate(zip(arms, stack.settings, strict=True))
    ]
