"""bench_window_lab: accuracy against seconds of training in the tiny lab, gradient windows none, 0, 4, 8.

Measures teachability at 10 % with the anchor on *dialect*, three seeds an arm, each arm in a process of its
own, arms one after the other (one at a time, so that they do not disturb each other's clock). Sequences have
17 tokens, so a window of 8 is nearly all of them and no saving can be expected; what the detached context
costs in accuracy shows all the same. Evaluations are not in the seconds.

Run: python -m benchmarks.bench_window_lab [--tiny]
"""

import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.measuring import versions
from scripts.arguments import Arguments
from taopd.experiments.arm_settings import write_arm
from taopd.experiments.lab import build_lab
from taopd.experiments.lab.demo import lab_arm
from taopd.experiments.pool import run_pool

WINDOWS = (None, 0, 4, 8)
STEPS, SEEDS = 200, 3


def main(arguments: list[str] | None = None) -> int:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="two steps on an untrained lab")
    settings = parser.parse_args(arguments)
    sizes = {"teacher_steps": 2, "student_steps": 2, "num_test_prompts": 8} if settings.tiny else {}
    steps, seeds = (2, 1) if settings.tiny else (STEPS, SEEDS)
    lab = build_lab("dialect", **sizes)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        arms = [
            lab_arm(
                lab,
                f"window-{window}",
                {
                    "selector": "teachability",
                    "anchor_coef": 1.0,
                    "anchor_fraction": 0.1,
                    "anchor_responses": 1.0,
                    "gradient_window": window,
                },
                seed=seed,
                steps=steps,
            )
            for window in WINDOWS
            for seed in range(seeds)
        ]
        places = [Path(folder) / arm.folder_name for arm in arms]
        for arm, place in zip(arms, places, strict=True):
            write_arm(arm, place)
        run_pool(places, num_workers=1)
        for window in WINDOWS:
            found = [
                json.loads((place / "results.json").read_text())
                for arm, place in zip(arms, places, strict=True)
                if arm.config["gradient_window"] == window
            ]
            rows.append(
                {
                    "window": window,
                    "steps": [step for step, _ in found[0]["accuracy_curve"]],
                    "greedy": [[value for _, value in run["accuracy_curve"]] for run in found],
                    "sampled": [[v for _, v in run["accuracy_sampled_curve"]] for run in found],
                    "seconds": [
                        [value for _, value in run["train_seconds_curve"]] for run in found
                    ],
                }
            )
    print(f"{'window':<8} {'ms/step':>8} {'greedy':>8} {'sampled':>8}")
    for row in rows:
        pace = statistics.median(seconds[-1] / steps for seconds in row["seconds"])
        ends = [statistics.mean(run[-1] for run in row[name]) for name in ("greedy", "sampled")]
        print(f"{row['window']!s:<8} {1000 * pace:8.1f} {ends[0]:8.3f} {ends[1]:8.3f}")
    print(json.dumps({"name": "bench_window_lab", "rows": rows} | versions()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
