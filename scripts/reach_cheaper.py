"""`method: reach` with the initial student on a quarter of the completions. Writes a page of docs/results.

    python -m scripts.reach_cheaper --runs runs/reach_cheaper            # what is missing, resumable
    python -m scripts.reach_cheaper --runs runs/reach_cheaper --labs dialect --seeds 1
    python -m scripts.reach_cheaper --gather     # the table of the page from its saved file

Settings as in scripts/default_method.py (exact reverse KL, 10 %, 1,000 steps), a checkpoint every 50 steps.
With `anchor_responses=0.25` what the initial student would say in the other completions is remembered by
token id (docs/math.md, reach).
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scripts import unseen_labs
from scripts.arguments import Arguments
from scripts.collapse import BASE
from scripts.lab_results import curves_of, write_rows
from scripts.reach_forms import cell
from taopd.cli import positive
from taopd.experiments.lab import VARIANTS, build_lab
from taopd.experiments.lab.demo import lab_arm
from taopd.experiments.lab.stacked import run_stack
from taopd.report.generated_part import markdown_table, write_generated
from taopd.runs.jsonl import write_json

LABS = (
    "dialect",
    "reversal",
    "termination",
    "fallible",
    "accent",
    "loanwords",
    "jargon",
    "signoff",
)
ARMS = {"on all": {}, "on a quarter": {"anchor_responses": 0.25}}
"""Where the initial student runs."""


def run(file: Path, variant: str, steps: int, seed: int) -> None:
    """Train both arms in one lab; one file for them."""
    lab = build_lab(variant, parallel=False)
    settings = BASE | {"method": "reach", "budget": 0.1}
    arms = [
        replace(
            lab_arm(lab, name, settings | own, seed=seed, steps=steps),
            evaluate_every=50,
            num_test_prompts=200,
        )
        for name, own in ARMS.items()
    ]
    rows = [
        {"arm": row["name"], "variant": variant, "steps": steps, "seed": seed} | curves_of(row)
        for row in run_stack(arms, output_dir=str(file.parent))
    ]
    write_json(file, rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Greedy end, lowest of the second half, sampled end: means over the seeds, one row a lab."""
    lines = []
    for lab in sorted({row["variant"] for row in rows}):
        own = [row for row in rows if row["variant"] == lab]
        lines.append([lab, *(cell([row for row in own if row["arm"] == name]) for name in ARMS)])
    return "\n".join(markdown_table(["lab", *ARMS], lines))


def main() -> None:
    """Run what is missing, gather, and put the table into the page."""
    unseen_labs.register()
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_runs("runs/reach_cheaper", from_saved=True)
    parser.add_argument("--output", type=Path, default=Path("docs/results/reach_cheaper.json"))
    parser.add_argument(
        "--labs", nargs="*", choices=list(VARIANTS), default=list(LABS), metavar="LAB"
    )
    parser.add_argument("--steps", type=positive, default=1000)
    parser.add_argument("--seeds", type=positive, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [] if args.gather else list(itertools.product(range(args.seeds), args.labs))
    for seed, variant in wanted:
        file = args.runs / f"{variant}__{args.steps}__seed{seed}.json"
        if not file.exists():
            args.runs.mkdir(parents=True, exist_ok=True)
            run(file, variant, args.steps, seed)
            print(f"{variant}, seed {seed}", flush=True)
    known = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    for path in [] if args.runs is None else sorted(args.runs.glob("*.json")):
        known += json.loads(path.read_text())
    # A run that was made again replaces the one that was saved.
    keys = "variant", "seed", "steps", "arm"
    rows = {tuple(row[key] for key in keys): row for row in known}
    write_rows(args.output, {"settings": BASE}, "rows", (rows[key] for key in sorted(rows)))
    write_generated(args.output.with_suffix(".md"), table(list(rows.values())))


if __name__ == "__main__":
    main()
