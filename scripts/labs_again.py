"""The default on labs that are made again with other seeds. Writes docs/results/labs_again.json.

    python -m scripts.labs_again --runs runs/labs-again                  # all labs, resumable
    python -m scripts.labs_again --runs runs/labs-again --only slip --parts reach --workers 1
    python -m scripts.labs_again --runs runs/labs-again --gather         # the page of what has finished

A lab is one pair of models, and `scripts.default_method` runs every arm on the same one. Its seed decides the
models' first weights, what they are trained on, and the order of the prompts. Settings are those of
`scripts.default_method`; every arm is run once on each pair. Writes the page beside the data too.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from scripts import unseen_labs
from scripts.arguments import Arguments
from scripts.collapse import BASE
from scripts.default_method import STEPS, long_arm
from scripts.lab_results import curves_of, print_jobs, write_page, write_rows
from scripts.panels import Line
from taopd.cli import positive
from taopd.experiments.lab import VARIANTS, build_lab
from taopd.experiments.lab.stacked.jobs import Job, run_jobs
from taopd.report.generated_part import markdown_table
from taopd.trainer.environment import environment

MEASURED = Path("docs/results/default.json")
LAB_SEEDS = (1, 2)
"""`scripts.default_method` has 0."""
RIVALS = ("full", "published@0.1")
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "reach": ("reverse_kl", ("reach@0.1",)),
    "reach_sampled": ("sampled_reverse_kl", ("reach@0.1",)),
    "rivals": ("reverse_kl", RIVALS),
    "rivals_sampled": ("sampled_reverse_kl", RIVALS),
}
"""Loss and arms."""
LOSS_NAMES = {"reverse_kl": "exact", "sampled_reverse_kl": "sampled"}
ARM = "reach@0.1"
PICTURE = "Accuracy of the default over steps by lab"


def make_job(folder: Path, part: str, variant: str, lab_seed: int) -> Job:
    """The arms of a part on one pair of models, which is made where it is missing."""
    loss, names = PARTS[part]
    # In this process: another one would not know the labs that are registered here.
    lab = build_lab(variant, seed=lab_seed, parallel=False)
    arms = [long_arm(lab, name, loss, lab_seed) for name in names]
    path = folder / f"{part}__{variant}__{lab_seed}.json"
    seeds = {"variant": variant, "loss": loss, "lab_seed": lab_seed}
    about = seeds | {"models": lab.manifest["accuracy"]}
    return Job(path=path, arms=arms, about=about)


def gathered(
    folder: Path, about: Sequence[str] = ("variant", "loss", "lab_seed", "models")
) -> list[dict[str, Any]]:
    """One row an arm and lab, with its curves, and what its job says about it."""
    rows = []
    for path in sorted(folder.glob("*__*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        for arm in document["arms"]:
            rows.append(
                {key: document[key] for key in about}
                | {"arm": arm["name"], "steps": [step for step, _ in arm["accuracy_curve"]]}
                | curves_of(arm)
            )
    return rows


def first_ends() -> dict[tuple[str, str, str], float]:
    """Mean end of every (lab, loss, arm) of `scripts.default_method`, over its seeds."""
    parts = json.loads(MEASURED.read_text(encoding="utf-8"))["parts"]
    return {
        (part["variant"], part["loss"], name): mean(curve[-1] for curve in arm["greedy"])
        for part in parts
        for name, arm in part["arms"].items()
    }


def table(rows: list[dict[str, Any]], first: dict[tuple[str, str, str], float]) -> str:
    """A row a lab and loss: the default's ends on the first pair and on the others, and the rivals'."""
    heads = ["lab", "loss", "teacher", "reach, first pair", "reach", "sampled"]
    heads += ["full (best)", "published (best)", "reach, least from step 500"]
    lines = []
    for variant, loss in sorted({(row["variant"], row["loss"]) for row in rows}):
        own = [row for row in rows if (row["variant"], row["loss"]) == (variant, loss)]
        reach = [row for row in own if row["arm"] == ARM]
        rivals = [ends_and_bests(row for row in own if row["arm"] == rival) for rival in RIVALS]
        settled = [
            min(
                v for step, v in zip(row["steps"], row["greedy"], strict=True) if step >= STEPS // 2
            )
            for row in reach
        ]
        known = first.get((variant, loss, ARM))
        lines.append(
            [
                variant,
                LOSS_NAMES[loss],
                percent(list({row["lab_seed"]: row["models"]["teacher"] for row in own}.values())),
                percent([] if known is None else [known]),
                percent([row["greedy"][-1] for row in reach]),
                percent([row["sampled"][-1] for row in reach]),
                *rivals,
                percent(settled),
            ]
        )
    return "\n".join(markdown_table(heads, lines, texts=2))


def percent(values: list[float]) -> str:
    """Shares as whole per cents; a dash where there is none."""
    return ", ".join(f"{100 * value:.0f}" for value in values) or "-"


def ends_and_bests(rows: Iterable[dict[str, Any]]) -> str:
    """End and, in brackets, best of each; a dash where there is none."""
    return (
        ", ".join(f"{100 * row['greedy'][-1]:.0f} ({100 * max(row['greedy']):.0f})" for row in rows)
        or "-"
    )


def panels(rows: list[dict[str, Any]]) -> dict[str, list[Line]]:
    """Greedy accuracy of the default over steps: a panel a lab, a line a pair and loss."""
    found: dict[str, list[Line]] = {lab: [] for lab in sorted({row["variant"] for row in rows})}
    for row in sorted(rows, key=lambda row: list(LOSS_NAMES).index(row["loss"])):
        if row["arm"] == ARM:
            found[row["variant"]].append((LOSS_NAMES[row["loss"]], row["steps"], row["greedy"]))
    return found


def main() -> None:
    """Run what is missing and gather everything in one file."""
    unseen_labs.register()
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_runs("runs/labs-again")
    parser.add_argument("--output", type=Path, default=Path("docs/results/labs_again.json"))
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=[], metavar="VARIANT")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--lab-seeds", nargs="*", type=positive, default=list(LAB_SEEDS))
    parser.add_argument("--workers", type=positive, help="processes; default one a core")
    args = parser.parse_args()
    if not args.gather:
        jobs = [
            make_job(args.runs, part, variant, lab_seed)
            for part in args.parts
            for lab_seed in args.lab_seeds
            for variant in args.only or VARIANTS
        ]
        run_jobs(jobs, num_workers=args.workers, progress=print_jobs)
    rows, machine = gathered(args.runs), environment()
    write_rows(args.output, {"settings": BASE, "versions": machine["versions"]}, "rows", rows)
    about = (
        "Greedy accuracy, %, one number a pair of models; sampled where it says so.\n"
        f"{machine['devices'][0]}."
    )
    parts, title = [about, table(rows, first_ends())], "The default on labs made again"
    write_page(args.output, panels(rows), parts, title=title, of=PICTURE)


if __name__ == "__main__":
    main()
