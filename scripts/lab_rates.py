"""How far the learning rate moves five arms on the tiny lab: the default, and a frozen scorer among them.

    python -m scripts.lab_rates --runs runs/lab-rates      # about 15 minutes of one core, resumable
    python -m scripts.lab_rates --gather                   # the page from its saved file

10 % of the tokens, three seeds, exact reverse KL, 32 rollouts a step, three constant rates about a factor of
3 apart. The steps are as many as make the same distance, rate times steps. Writes docs/results/lab_rates.json
and the page beside it.
"""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from scripts.arguments import Arguments
from scripts.lab_results import print_jobs
from taopd.cli import positive
from taopd.experiments.lab import build_lab
from taopd.experiments.lab.demo import lab_arm
from taopd.experiments.lab.stacked.jobs import Job, run_jobs
from taopd.experiments.study.statistics import t_estimate
from taopd.report.figures.style import COLORS, MARKERS, plt
from taopd.report.generated_part import markdown_table, write_generated
from taopd.runs.jsonl import write_text
from taopd.trainer.environment import environment

LABS = ("dialect", "termination")
STEPS = {1e-4: 600, 3e-4: 200, 1e-3: 60}
ARMS: dict[str, dict[str, Any]] = {
    "full": {"selector": "full"},
    "reach, the default": {"selector": "teachability", "method": "reach"},
    "teachability": {"selector": "teachability"},
    "teachability_frozen": {"selector": "teachability_frozen"},
    "random": {"selector": "random"},
}
SEEDS = range(3)
SHARED = {"per_device_train_batch_size": 32, "loss": "reverse_kl", "budget": 0.1}
CHECKPOINTS = 10


def make_jobs(folder: Path) -> list[Job]:
    """One job a lab and rate."""
    jobs = []
    for name in LABS:
        lab = build_lab(name)
        for rate, steps in STEPS.items():
            settings = SHARED | {"learning_rate": rate}
            arms = [
                replace(
                    lab_arm(lab, arm, settings | own, seed=seed, steps=steps),
                    evaluate_every=steps // CHECKPOINTS,
                    num_test_prompts=200,
                )
                for arm, own in ARMS.items()
                for seed in SEEDS
            ]
            about = {"lab": name, "rate": rate}
            jobs.append(Job(path=file_of(folder, name, rate), arms=arms, about=about))
    return jobs


def file_of(folder: Path, lab: str, rate: float) -> Path:
    """Of one job."""
    return folder / f"{lab}__{rate:g}.json"


def gather(folder: Path) -> dict[str, Any]:
    """What the page reads of all jobs."""
    parts = []
    for lab, rate in product(LABS, STEPS):
        done = json.loads(file_of(folder, lab, rate).read_text())
        curves: dict[str, list[list[float]]] = {}
        for row in done["arms"]:
            curve = [round(value, 4) for _, value in row["accuracy_curve"]]
            curves.setdefault(row["name"], []).append(curve)
        parts.append({"lab": lab, "rate": rate, "steps": STEPS[rate], "greedy": curves})
    machine = environment()
    return {"versions": machine["versions"], "device": machine["devices"][0], "parts": parts}


def tables(parts: list[dict[str, Any]]) -> str:
    """Means over the run and ends, %, and how far the rates move each arm."""
    lines = []
    rates = list(STEPS)
    heads = ["lab", "arm", *(f"{rate:g}" for rate in rates), "moved by the rate"]
    for title, of in (("Mean over the run", mean_of), ("At the end", lambda curve: curve[-1])):
        lines += [
            f"{title}, greedy accuracy in % by learning rate, three seeds (95 % t interval):",
            "",
        ]
        rows = []
        for lab in LABS:
            of_rate = {part["rate"]: part["greedy"] for part in parts if part["lab"] == lab}
            for arm in ARMS:
                cells = [
                    t_estimate([100 * of(curve) for curve in of_rate[rate][arm]]) for rate in rates
                ]
                means = [cell.mean for cell in cells]
                shown = [f"{cell.mean:.0f} ± {(cell.high - cell.low) / 2:.0f}" for cell in cells]
                rows.append([lab, arm, *shown, f"{max(means) - min(means):.0f}"])
        lines += [*markdown_table(heads, rows, texts=2), ""]
    return "\n".join(lines)


def draw(parts: list[dict[str, Any]], path: Path) -> None:
    """Accuracy at the end against the rate, a panel a lab, a dot a seed."""
    figure, panels = plt.subplots(1, len(LABS), figsize=(4.2 * len(LABS), 3.2), sharey=True)
    for axes, lab in zip(panels, LABS, strict=True):
        of_rate = {part["rate"]: part["greedy"] for part in parts if part["lab"] == lab}
        for arm, color, marker in zip(ARMS, COLORS, MARKERS, strict=False):
            ends = [[100 * curve[-1] for curve in of_rate[rate][arm]] for rate in STEPS]
            axes.plot(list(STEPS), np.mean(ends, axis=1), marker, color=color, ls="-", label=arm)
            axes.plot(list(STEPS), ends, ".", color=color, alpha=0.6)
        axes.set(xscale="log", title=lab, xlabel="learning rate")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("greedy accuracy at the end, %")
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def mean_of(curve: list[float]) -> float:
    """Over the checkpoints after the first, the student before training."""
    return sum(curve[1:]) / len(curve[1:])


def main() -> None:
    """Run what is missing, and write the page."""
    parser = Arguments(description=__doc__.splitlines()[0])
    # The tables have all of them.
    names = [file_of(Path(), *each).name for each in product(LABS, STEPS)]
    parser.add_runs("runs/lab-rates", finished=names, from_saved=True)
    parser.add_argument("--workers", type=positive)
    parser.add_argument("--data", type=Path, default=Path("docs/results/lab_rates.json"))
    args = parser.parse_args()
    if not args.gather:
        run_jobs(make_jobs(args.runs), num_workers=args.workers, progress=print_jobs)
    if args.runs is not None:
        write_text(args.data, json.dumps(gather(args.runs)) + "\n")
    found = json.loads(args.data.read_text())
    title = "The tiny lab at three learning rates"
    picture = args.data.with_suffix(".png")
    draw(found["parts"], picture)
    body = f"![Accuracy at the end by learning rate]({picture.name})\n\n{tables(found['parts'])}"
    write_generated(args.data.with_suffix(".md"), body, title=title)


if __name__ == "__main__":
    main()
