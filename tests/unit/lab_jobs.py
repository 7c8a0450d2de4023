"""Finished jobs of labs that are made again, with made-up curves: what the tables of such labs read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def finished(
    path: Path,
    variant: str,
    steps: Sequence[int],
    arms: dict[str, Sequence[float]],
    *,
    teacher: float,
    **about: Any,
) -> None:
    """Write the file of a job: greedy accuracy of every arm at these steps; sampled is a tenth of it."""
    document = {
        "variant": variant,
        "loss": "reverse_kl",
        "models": {"teacher": teacher, "student": 0.4},
        "arms": [
            {
                "name": name,
                "accuracy_curve": list(zip(steps, greedy, strict=True)),
                "accuracy_sampled_curve": [
                    (step, value / 10) for step, value in zip(steps, greedy, strict=True)
                ],
            }
            for name, greedy in arms.items()
        ],
    }
    path.write_text(json.dumps(document | about), encoding="utf-8")
