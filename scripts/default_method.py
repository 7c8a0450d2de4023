"""Candidates for the default on the tiny lab. Writes docs/results/default.json.

    python -m scripts.default_method --runs runs/default              # all variants, resumable
    python -m scripts.default_method --runs runs/default --only reversal --parts main --workers 1
    python -m scripts.pages.default_method docs/results/default.json  # the page and its picture

As in scripts/collapse.py: constant learning rate 3e-4, 32 rollouts a step, 1,000 steps, 200 held-out prompts
every 20 steps. Seeds that docs/results/collapse.json (same settings) or the output file holds of an arm are
taken from there and not run again, unless with `--again`: a machine that rounds otherwise trains other models
for the same lab, and arms are to be compared on the same ones. A killed run goes on with the jobs that are
missing.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts import unseen_labs
from scripts.arguments import Arguments
from scripts.collapse import BASE
from scripts.lab_results import curves_of, print_jobs, write_rows
from taopd.cli import positive
from taopd.experiments.arm_settings import Arm
from taopd.experiments.lab import VARIANTS, Lab, build_lab
from taopd.experiments.lab.demo import lab_arm
from taopd.experiments.lab.stacked.jobs import Job, run_jobs
from taopd.trainer.environment import environment

MEASURED = Path("docs/results/collapse.json")
SEEDS, STEPS = 5, 1000
ARMS: dict[str, dict[str, Any]] = {
    "full": {"selector": "full"},
    "published@0.1": {"budget": 0.1},
    "anchored@0.1": {"budget": 0.1, "method": "anchored"},
    "reach@0.1": {"budget": 0.1, "method": "reach"},
    "reach@0.05": {"budget": 0.05, "method": "reach"},
    "raw C@0.1": {"budget": 0.1, "method": "anchored", "selector": "teachability_raw_c"},
    "random@0.1": {"budget": 0.1, "selector": "random"},
}
"""`raw C` is anchored with D~ C in place of D~ C~."""
MAIN, REACH = ("full", "published@0.1", "anchored@0.1"), ("reach@0.1",)
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "main": ("reverse_kl", MAIN),
    "reach": ("reverse_kl", REACH),
    "sampled": ("sampled_reverse_kl", MAIN),
    "reach_sampled": ("sampled_reverse_kl", REACH),
    "reach_half": ("reverse_kl", ("reach@0.05",)),
    "reach_half_sampled": ("sampled_reverse_kl", ("reach@0.05",)),
    "more": ("reverse_kl", ("raw C@0.1", "random@0.1")),
}
"""Loss and arms, the most important part first."""
Part = dict[str, Any]


def known_parts(*files: Path) -> dict[tuple[str, str], Part]:
    """Arms by (variant, loss) that earlier runs measured; a later file's replace an earlier one's."""
    found: dict[tuple[str, str], Part] = {}
    for file in files:
        if not file.exists():
            continue
        for part in json.loads(file.read_text())["parts"]:
            if part.get("part") == "causes":
                continue
            own = {name: arm for name, arm in part["arms"].items() if name in ARMS}
            if file == MEASURED:
                for name, arm in own.items():
                    kept = 1.0 if name == "full" else arm["budget"]
                    own[name] = {key: arm[key] for key in ("greedy", "sampled")}
                    own[name] |= {"kept": kept, "from": str(MEASURED)}
            lab = part["variant"], part["loss"]
            known = found.setdefault(lab, {"steps": part["steps"], "arms": {}})
            if known["steps"] != part["steps"]:
                raise SystemExit(f"{file}: {lab[0]} has other checkpoints than {MEASURED}")
            known["arms"] |= own
    return found


def long_arm(lab: Lab, name: str, loss: str, seed: int) -> Arm:
    """An arm of this study on a lab."""
    settings = BASE | ARMS[name] | {"loss": loss}
    arm = lab_arm(lab, name, settings, seed=seed, steps=STEPS)
    return replace(arm, evaluate_every=20, num_test_prompts=200)


def make_jobs(
    folder: Path, only: list[str], parts: list[str], known: dict[tuple[str, str], Part], seeds: int
) -> list[Job]:
    """One job for every part and variant, with the arms and seeds that `known` lacks."""
    jobs = []
    for part in parts:
        loss, names = PARTS[part]
        for variant in only or VARIANTS:
            have = known.get((variant, loss), {"arms": {}})["arms"]
            missing = [
                (name, seed)
                for name in names
                for seed in range(len(have[name]["greedy"]) if name in have else 0, seeds)
            ]
            if not missing:
                continue
            # In this process: another one would not know the labs that are registered here.
            lab = build_lab(variant, parallel=False)
            arms = [long_arm(lab, name, loss, seed) for name, seed in missing]
            path = folder / f"{part}__{variant}__{missing[0][1]}_to_{seeds - 1}.json"
            jobs.append(Job(path=path, arms=arms, about={"variant": variant, "loss": loss}))
    return jobs


def part_of(rows: list[dict[str, Any]], about: dict[str, str], known: Part | None) -> Part:
    """Curves [seeds, checkpoints] of every arm of a variant, those that were measured before included."""
    assert rows or known is not None
    steps = [step for step, _ in rows[0]["accuracy_curve"]] if rows else known["steps"]  # type: ignore[index]
    if known is not None and known["steps"] != steps:
        raise SystemExit(f"{about['variant']}: its earlier arms have other checkpoints")
    before = {} if known is None else known["arms"]
    arms: dict[str, Part] = {}
    for name in ARMS:
        own = [row for row in rows if row["name"] == name]
        if own:
            arms[name] = _with_seeds(before.get(name), own)
        elif name in before:
            arms[name] = before[name]
    return about | {"steps": steps, "arms": arms}


def _with_seeds(known: Part | None, rows: list[dict[str, Any]]) -> Part:
    """An arm's curves by seed, 0 first: those known before, with the seeds of `rows` added or replaced."""
    curves: dict[int, tuple[float, list[float], list[float]]] = {}
    if known is not None:
        both = zip(known["greedy"], known["sampled"], strict=True)
        curves = {seed: (known["kept"], *each) for seed, each in enumerate(both)}
    for row in rows:
        curves[row["seed"]] = row["kept_fraction"], *curves_of(row).values()
    if sorted(curves) != list(range(len(curves))):
        raise SystemExit(f"{rows[0]['name']}: seeds {sorted(curves)} have a gap")
    kept, all_greedy, all_sampled = zip(*(curves[seed] for seed in sorted(curves)), strict=True)
    return {
        "kept": sum(kept) / len(kept),
        "greedy": list(all_greedy),
        "sampled": list(all_sampled),
    }


def main() -> None:
    """Run what is missing and gather everything in one file."""
    unseen_labs.register()
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_runs("runs/default")
    parser.add_argument("--output", type=Path, default=Path("docs/results/default.json"))
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=[], metavar="VARIANT")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--seeds", type=positive, default=SEEDS, help=f"of every arm; default {SEEDS}"
    )
    parser.add_argument("--workers", type=positive, help="processes; default one a core")
    parser.add_argument(
        "--again", action="store_true", help="run also the seeds that the output file holds"
    )
    args = parser.parse_args()
    known = known_parts(MEASURED, args.output)
    if not args.gather:
        run_jobs(
            make_jobs(args.runs, args.only, args.parts, {} if args.again else known, args.seeds),
            num_workers=args.workers,
            progress=print_jobs,
        )
    # Labs without a run of their own have the arms that were measured before.
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {lab: [] for lab in known}
    for path in sorted(args.runs.glob("*__*.json")):
        document, names = json.loads(path.read_text()), PARTS[path.stem.split("__")[0]][1]
        # What a part no longer has stays out: the arm may have been another rule then.
        own = [row for row in document["arms"] if row["name"] in names]
        rows.setdefault((document["variant"], document["loss"]), []).extend(own)
    parts = [
        part_of(own, {"variant": lab[0], "loss": lab[1]}, known.get(lab))
        for lab, own in rows.items()
    ]
    about = {"settings": BASE, "versions": environment()["versions"]}
    write_rows(args.output, about, "parts", parts)


if __name__ == "__main__":
    main()
