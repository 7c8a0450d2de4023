"""The guard's rules on real runs, for the page about the guard: whom they would have warned of.

    python -m scripts.pages.guard_real runs/accelerator/pairs   # studies of benchmarks.accelerator
    python -m scripts.pages.guard                               # the page, from the saved file

What the runs logged at every look of the guard is kept: idle drift, entropy, and D, which there is D C within
1e-4 on the first pair (C is above 0.9999 nearly everywhere).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.arguments import Arguments, existing_folder
from scripts.lab_results import write_rows
from taopd.report.generated_part import markdown_table
from taopd.runs.jsonl import read_jsonl

SAVED = Path("docs/results/guard_real.json")
STUDIES = {"pair1-long": "pair 1", "pair2-long": "pair 2"}
LOGGED = {
    "idle_drift": "guard/idle_drift_nats",
    "teachable": "signal/disagreement_nats/mean",
    "entropy": "signal/entropy_nats/mean",
}
LOOK_EVERY = 5


def gathered(folder: Path) -> list[dict[str, Any]]:
    """The looks of every finished arm of the studies."""
    runs = []
    for study, pair in STUDIES.items():
        for path in sorted(folder.glob(f"{study}/arms/*/results.json")):
            arm = json.loads(path.read_text())
            looks = [
                line
                for line in read_jsonl(path.parent / "metrics.jsonl")
                if LOGGED["idle_drift"] in line
            ]
            runs.append(
                {
                    "pair": pair,
                    "arm": arm["name"],
                    "seed": arm["seed"],
                    "look_every": LOOK_EVERY,
                    "greedy": [round(value, 4) for _, value in arm["accuracy_curve"]],
                    "looks": {
                        name: [round(look[column], 4) for look in looks]
                        for name, column in LOGGED.items()
                    },
                }
            )
    return runs


def table(
    runs: list[dict[str, Any]], rules: dict[str, Callable[[dict[str, Any]], int | None]]
) -> str:
    """Of how many seeds each rule warns, by pair and arm, and where their accuracy went."""
    rows = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["pair"], run["arm"]), []).append(run)
    for (pair, arm), own in groups.items():
        ends = ", ".join(f"{100 * run['greedy'][-1]:.0f}" for run in own)
        cells = [
            f"{sum(first(run) is not None for run in own)} of {len(own)}"
            for first in rules.values()
        ]
        rows.append([pair, arm, ends, *cells])
    heads = ("pair", "arm", "accuracy at the end, %", *rules)
    return "\n".join(markdown_table(heads, rows, texts=3))


if __name__ == "__main__":
    parser = Arguments(description=__doc__)
    parser.add_argument("folder", type=existing_folder, help="where the studies lie")
    write_rows(SAVED, {}, "runs", gathered(parser.parse_args().folder))
    print(SAVED)
