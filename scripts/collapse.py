"""Long runs on the tiny lab: what collapses, why, and what holds. Writes docs/results/collapse.json.

    python scripts/collapse.py --runs runs/collapse             # about 45 minutes on two cores
    python -m scripts.pages.collapse docs/results/collapse.json  # the page and its pictures

Every arm at a constant learning rate of 3e-4, 32 rollouts a step, exact reverse KL unless it says otherwise.
`main`: the default against the published method, C-only and full distillation, 1,000 steps, 5 seeds, five
variants. `sampled`: the same with the paper's sampled loss, at 10 %. `causes`: one change at a time,
400 steps, 3 seeds. A killed run goes on with the jobs that are missing.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.arguments import Arguments
from scripts.lab_results import curves_of, print_jobs, write_rows
from taopd.experiments.lab import build_lab
from taopd.experiments.lab.demo import lab_arm
from taopd.experiments.lab.stacked.jobs import Job, run_jobs
from taopd.trainer.environment import environment

BASE = {"per_device_train_batch_size": 32, "learning_rate": 3e-4, "loss": "reverse_kl"}
LABS = ("bilingual", "dialect", "reversal", "termination", "fallible")
FULL, C_ONLY = {"selector": "full"}, {"selector": "compatible"}
ANCHORED: dict[str, Any] = {"method": "anchored"}
MAIN = {
    f"{name}@{budget:g}": settings | {"budget": budget}
    for budget in (0.1, 0.05)
    for name, settings in (("anchored", ANCHORED), ("published", {}), ("C-only", C_ONLY))
} | {"full": FULL}
SAMPLED = {name: MAIN[name] for name in ("anchored@0.1", "published@0.1", "C-only@0.1", "full")}
# Floor and replay are measured too (docs/results/collapse.json): taopd at commit 3000965 has their options.
CAUSES: dict[str, dict[str, Any]] = {
    "published": {},
    "full": FULL,
    "C-only": C_ONLY,
    "random": {"selector": "random"},
    "divergence": {"selector": "divergence"},
    "completion denominator": {"denominator": "completion"},
    "update norm 0.008": {"match_update_norm": 0.008},
    "trust region 0.008": {"max_update_norm": 0.008},
    "anchor 0.1": ANCHORED | {"anchor_coef": 0.1},
    "anchor": ANCHORED,
    "anchor, every token": ANCHORED | {"anchor_fraction": 1.0, "anchor_responses": 1.0},
    "anchor, 2 % of a tenth": ANCHORED | {"anchor_fraction": 0.02, "anchor_responses": 0.1},
    "anchor, random": ANCHORED | {"selector": "random"},
    "anchor, divergence": ANCHORED | {"selector": "divergence"},
    "anchor, C-only": ANCHORED | C_ONLY,
}
ALONE: dict[str, dict[str, Any]] = {
    # Jobs of their own: most change what all arms of one job share.
    "anchor, in an eighth": ANCHORED | {"anchor_responses": 0.125},
    "anchor, forward KL": ANCHORED | {"anchor_loss": "forward_kl"},
    "Adam epsilon 0.01": {"adam_epsilon": 1e-2},
    "learning rate / 3": {"learning_rate": 1e-4},
    "published, as many tokens": {"budget": 0.145},  # As the anchored arm trains: 0.1 + 0.05 * 0.9.
}


def make_jobs(folder: Path) -> list[Job]:
    """All jobs, the most important ones first."""
    labs = {variant: build_lab(variant) for variant in LABS}

    def job(part: str, variant: str, arms: dict[str, Any], seeds: int, steps: int, **more) -> Job:
        made = [
            replace(
                lab_arm(labs[variant], name, BASE | settings | more, seed=seed, steps=steps),
                evaluate_every=20,
                num_test_prompts=200,
            )
            for name, settings in arms.items()
            for seed in range(seeds)
        ]
        stem = f"{part}__{variant}__{next(iter(arms))}".replace("/", "per").replace(" ", "_")
        about = {"part": part, "variant": variant, "loss": made[0].config["loss"]}
        return Job(path=folder / f"{stem}.json", arms=made, about=about, trace_every=10)

    jobs = [job("main", variant, MAIN, 5, 1000) for variant in labs]
    for variant in ("dialect", "fallible"):
        jobs.append(job("causes", variant, CAUSES, 3, 400))
        jobs += [job("causes", variant, {name: ALONE[name]}, 3, 400) for name in ALONE]
    return jobs + [job("sampled", v, SAMPLED, 5, 1000, loss="sampled_reverse_kl") for v in labs]


def mean_of_known(values: tuple[float | None, ...]) -> float | None:
    """Mean over the seeds that have a value here; None where no seed has one."""
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 5) if known else None


def shorten(document: dict[str, Any], job: Job) -> dict[str, Any]:
    """Curves [seeds, checkpoints] and warnings of every arm; for `causes` also the mean trace."""
    rows = document["arms"]
    arms: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(arm.name for arm in job.arms):
        own = [row for row in rows if row["name"] == name]
        arms[name] = {
            "budget": own[0]["budget"],
            **{how: [curves_of(row)[how] for row in own] for how in ("greedy", "sampled")},
            "warned": [row["warned"] for row in own],
        }
        if document["part"] == "causes":
            arms[name]["trace"] = {
                column: [
                    mean_of_known(at)
                    for at in zip(*(row["trace"][column] for row in own), strict=True)
                ]
                for column in own[0]["trace"]
            }
    steps = [step for step, _ in rows[0]["accuracy_curve"]]
    about = {name: document[name] for name in ("part", "variant", "loss")}
    return about | {"steps": steps, "arms": arms}


def main() -> None:
    """Run what is missing and gather everything in one file."""
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_runs("runs/collapse")
    parser.add_argument("--output", type=Path, default=Path("docs/results/collapse.json"))
    args = parser.parse_args()
    jobs = make_jobs(args.runs)
    if not args.gather:
        run_jobs(jobs, progress=print_jobs)
    parts = [shorten(json.loads(job.path.read_text()), job) for job in jobs if job.path.exists()]
    about = {"settings": BASE, "versions": environment()["versions"]}
    write_rows(args.output, about, "parts", parts)


if __name__ == "__main__":
    main()
