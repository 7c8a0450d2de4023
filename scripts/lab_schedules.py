"""The default under a learning rate that falls to 0, on twelve labs. Writes docs/results/lab_schedules.json.

    python -m scripts.lab_schedules --runs runs/lab-schedules             # all twelve, resumable
    python -m scripts.lab_schedules --runs runs/lab-schedules --only envoi --parts exact --workers 1
    python -m scripts.lab_schedules --runs runs/lab-schedules --gather    # the page of what has finished

The other pages about the labs have a constant rate. transformers and TRL have one that falls in a straight
line, where nothing is said (`lr_scheduler_type: linear`). Settings are those of `scripts.default_method`. The
labs were chosen before the runs: the four that were written last, and those in which the default or full
swings most. The part `longer` has twice the steps at the falling rate. Writes the page beside the data too.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts import unseen_labs
from scripts.arguments import Arguments
from scripts.collapse import BASE
from scripts.default_method import STEPS, long_arm
from scripts.lab_results import print_jobs, write_page, write_rows
from scripts.labs_again import LOSS_NAMES, ends_and_bests, gathered, percent
from scripts.panels import Line
from taopd.cli import positive
from taopd.experiments.lab import build_lab
from taopd.experiments.lab.stacked.jobs import Job, run_jobs
from taopd.report.generated_part import markdown_table
from taopd.trainer.environment import environment

LABS = (
    *("patois", "envoi", "postscript", "mishap", "dialect", "termination"),
    *("farewell", "signoff", "loanwords", "argot", "accent", "reversal"),
)
LOSSES = {name: loss for loss, name in LOSS_NAMES.items()}
CONSTANT, LONGER = "constant", "linear, 2,000 steps"
SCHEDULES = {
    "linear": {"lr_scheduler_type": "linear"},
    CONSTANT: {"lr_scheduler_type": CONSTANT},
    # The distance of 1,000 steps at a constant rate.
    LONGER: {"lr_scheduler_type": "linear", "max_steps": 2 * STEPS},
}
PARTS = {
    "exact": ("exact", ("linear", CONSTANT)),
    "sampled": ("sampled", ("linear", CONSTANT)),
    "longer": ("exact", (LONGER,)),
}
"""Loss and schedules of a part."""
ARMS = {"reach@0.1": "reach", "full": "full"}
SEEDS = (0, 1)
ABOUT = ("variant", "loss", "schedule")
"""What a job says about its rows."""


def make_jobs(folder: Path, part: str, variant: str) -> list[Job]:
    """Both arms on one lab, which is made where it is missing: a job a schedule."""
    # In this process: another one would not know the labs that are registered here.
    lab = build_lab(variant, parallel=False)
    jobs = []
    loss, schedules = PARTS[part]
    for schedule in schedules:
        arms = [long_arm(lab, arm, LOSSES[loss], seed) for arm in ARMS for seed in SEEDS]
        arms = [replace(arm, config=arm.config | SCHEDULES[schedule]) for arm in arms]
        about = {"variant": variant, "loss": loss, "schedule": schedule}
        path = folder / f"{part}__{variant}__{schedule.partition(',')[0]}.json"
        jobs.append(Job(path=path, arms=arms, about=about))
    return jobs


def table(rows: list[dict[str, Any]], *, greedy: bool) -> str:
    """A row a lab and loss: ends of both arms under both schedules, of greedy texts with each seed's best."""
    heads = ["lab", "loss"]
    schedules = [name for name in SCHEDULES if any(row["schedule"] == name for row in rows)]
    heads += [f"{name}, {schedule}" for name in ARMS.values() for schedule in schedules]
    lines = []
    for variant, loss in sorted({(row["variant"], row["loss"]) for row in rows}):
        own = [row for row in rows if (row["variant"], row["loss"]) == (variant, loss)]
        parts = [
            [row for row in own if (row["arm"], row["schedule"]) == (arm, schedule)]
            for arm in ARMS
            for schedule in schedules
        ]
        ends = [
            ends_and_bests(part) if greedy else percent([row["sampled"][-1] for row in part])
            for part in parts
        ]
        lines.append([variant, loss, *ends])
    return "\n".join(markdown_table(heads, lines, texts=2))


def panels(rows: list[dict[str, Any]]) -> dict[str, list[Line]]:
    """Greedy accuracy over steps under the falling rate: a panel a lab and loss, a line a seed."""
    found: dict[str, list[Line]] = {}
    for row in sorted(rows, key=lambda row: (LABS.index(row["variant"]), row["loss"])):
        if row["schedule"] == "linear":
            line = (ARMS[row["arm"]], row["steps"], row["greedy"])
            found.setdefault(f"{row['variant']}, {row['loss']}", []).append(line)
    return found


def main() -> None:
    """Run what is missing and gather everything in one file."""
    unseen_labs.register()
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_runs("runs/lab-schedules")
    parser.add_argument("--output", type=Path, default=Path("docs/results/lab_schedules.json"))
    parser.add_argument("--only", nargs="*", choices=LABS, default=LABS, metavar="LAB")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--workers", type=positive, help="processes; default one a core")
    args = parser.parse_args()
    if not args.gather:
        for part in args.parts:
            for variant in args.only:
                print(f"{part} {variant}", flush=True)
                jobs = make_jobs(args.runs, part, variant)
                run_jobs(jobs, num_workers=args.workers, progress=print_jobs)
    rows, machine = gathered(args.runs, ABOUT), environment()
    write_rows(args.output, {"settings": BASE, "versions": machine["versions"]}, "rows", rows)
    greedy, sampled = (table(rows, greedy=how) for how in (True, False))
    parts = [
        f"A number a seed, %. {machine['devices'][0]}.",
        "Greedy accuracy at the end, and in brackets of the best checkpoint:",
        greedy,
        "Accuracy of sampled texts at the end:",
        sampled,
    ]
    of = "Accuracy over steps under a falling rate, by lab"
    title = "The default under a falling learning rate"
    write_page(args.output, panels(rows), parts, title=title, of=of)


if __name__ == "__main__":
    main()
