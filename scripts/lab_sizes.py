"""The default on labs with models of other sizes. Writes docs/results/lab_sizes.json.

    python -m scripts.lab_sizes --runs runs/lab-sizes             # all twelve, resumable
    python -m scripts.lab_sizes --runs runs/lab-sizes --gather    # the page of what has finished

Every other page about the labs has one width, one depth and one length of pretraining, and a student that
forgets the carry in half of the texts it learns from. Here one or two of these are changed. Settings are
those of `scripts.default_method`; every arm is run once on each pair. The list was written before the runs.
Writes the page beside the data too.
"""

from pathlib import Path
from typing import Any

from scripts import unseen_labs
from scripts.arguments import Arguments
from scripts.collapse import BASE
from scripts.default_method import long_arm
from scripts.lab_results import print_jobs, write_page, write_rows
from scripts.labs_again import (
    ARM,
    LOSS_NAMES,
    PARTS,
    PICTURE,
    RIVALS,
    ends_and_bests,
    gathered,
    panels,
    percent,
)
from taopd.cli import positive
from taopd.experiments.lab import build_lab
from taopd.experiments.lab.stacked.jobs import Job, run_jobs
from taopd.report.generated_part import markdown_table
from taopd.trainer.environment import environment

LABS: dict[str, tuple[str, dict[str, Any]]] = {
    # The student never writes a carry: what it lacks is the answer itself.
    "dialect, no carry": ("dialect", {"carryless_share": 1.0}),
    "bilingual, no carry": ("bilingual", {"carryless_share": 1.0}),
    "jargon, carries": ("jargon", {"carryless_share": 0.1}),
    # A student too small for the task, and one as large as its teacher.
    "termination, small": ("termination", {"carryless_share": 0.9, "student_width": 32}),
    "fallible, equal": ("fallible", {"rewrite_share": 0.9, "student_width": 64}),
    "loanwords, large": (
        "loanwords",
        {"student_width": 96, "teacher_width": 96, "num_layers": 3},
    ),
    "accent, large teacher": ("accent", {"teacher_width": 128}),
    # A student that learned little, and one that learned long.
    "reversal, short": ("reversal", {"student_steps": 1000}),
    "dialect, short": ("dialect", {"student_steps": 600, "carryless_share": 0.8}),
    "farewell, long": ("farewell", {"student_steps": 6000}),
    # A teacher that has seldom read the student's words.
    "signoff, stranger": ("signoff", {"rewrite_share": 0.1}),
    "envoi, stranger": ("envoi", {"rewrite_share": 0.2}),
}
"""Variant and sizes, which `build_lab` takes by name."""
SEED = 1
ABOUT = ("variant", "loss", "models")
"""What a job says about its rows."""


def make_job(folder: Path, part: str, name: str) -> Job:
    """The arms of a part on one pair of models, which is made where it is missing."""
    loss, arm_names = PARTS[part]
    variant, sizes = LABS[name]
    lab = build_lab(variant, parallel=False, **sizes)
    arms = [long_arm(lab, arm, loss, SEED) for arm in arm_names]
    about = {"variant": name, "loss": loss, "models": lab.manifest["accuracy"]}
    return Job(path=folder / f"{part}__{name.replace(', ', '-')}.json", arms=arms, about=about)


def table(rows: list[dict[str, Any]]) -> str:
    """A row a lab and loss: both models, the end of the default, and end and best of the rivals."""
    heads = ["lab", "loss", "teacher", "student", "reach", "sampled"]
    heads += ["full (best)", "published (best)"]
    lines = []
    for name, loss in sorted({(row["variant"], row["loss"]) for row in rows}):
        own = [row for row in rows if (row["variant"], row["loss"]) == (name, loss)]
        reach = [row for row in own if row["arm"] == ARM]
        lines.append(
            [
                name,
                LOSS_NAMES[loss],
                percent([own[0]["models"]["teacher"]]),
                percent([own[0]["models"]["student"]]),
                percent([row["greedy"][-1] for row in reach]),
                percent([row["sampled"][-1] for row in reach]),
                *(ends_and_bests(row for row in own if row["arm"] == rival) for rival in RIVALS),
            ]
        )
    return "\n".join(markdown_table(heads, lines, texts=2))


def main() -> None:
    """Run what is missing and gather everything in one file."""
    unseen_labs.register()
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_runs("runs/lab-sizes")
    parser.add_argument("--output", type=Path, default=Path("docs/results/lab_sizes.json"))
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--workers", type=positive, help="processes; default one a core")
    args = parser.parse_args()
    if not args.gather:
        for name in LABS:
            print(name, flush=True)
            jobs = [make_job(args.runs, part, name) for part in args.parts]
            run_jobs(jobs, num_workers=args.workers, progress=print_jobs)
    rows, machine = gathered(args.runs, ABOUT), environment()
    write_rows(args.output, {"settings": BASE, "versions": machine["versions"]}, "rows", rows)
    about = f"Greedy accuracy, %; sampled where it says so. {machine['devices'][0]}."
    title = "The default on labs of other sizes"
    write_page(args.output, panels(rows), [about, table(rows)], title=title, of=PICTURE)


if __name__ == "__main__":
    main()
