"""Every selector on every variant of the tiny lab, at equal budgets: the runs behind the leaderboard.

    cell = (variant, loss, selector, budget), a curve of accuracies for every seed

What: 60 optimizer steps of 32 rollouts at a constant learning rate of 1e-3. That is short in steps and
long in distance (Adam moves as far as in 200 steps at the demo's 3e-4): the learnable part is learned
after about ten steps, and who collapses does so before the end. Arms of one variant, loss and selector
run as one stack, budgets and seeds side by side.
Why not the demo's settings: a leaderboard of thousands of runs has to end within the hour on two cores.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from taopd.errors import DataError
from taopd.experiments.lab import VARIANTS, Lab, build_lab
from taopd.experiments.lab.demo import lab_arm
from taopd.experiments.lab.spec import check_variant
from taopd.experiments.lab.stacked.jobs import Job, run_jobs
from taopd.runs.folder import cannot_write_to
from taopd.runs.jsonl import write_json
from taopd.selectors import SELECTORS, resolve_selector
from taopd.trainer.environment import environment

BUDGETS = (0.02, 0.05, 0.1, 0.3)
LOSSES = ("sampled_reverse_kl", "reverse_kl")
STEPS = 60
EVALUATE_EVERY = 15
NUM_TEST_PROMPTS = 200
STACK_CONFIG: dict[str, Any] = {"per_device_train_batch_size": 32, "learning_rate": 1e-3}
SETTINGS = STACK_CONFIG | {"steps": STEPS, "test_prompts": NUM_TEST_PROMPTS}
"""What all rows of the leaderboard's file have in common."""
WITH_METHOD: dict[str, dict[str, Any]] = {
    "teachability, anchored": {
        "selector": "teachability",
        "method": "anchored",
        "anchor_fraction": 0.1,
        "anchor_responses": 1.0,
    },
    "teachability, reach": {"selector": "teachability", "method": "reach"},
    "full, IDA-OPD": {"selector": "full", "loss": "sampled_ida"},
    "full, TV-OPD": {"selector": "full", "loss": "sampled_tv"},
    "full, sampled tail": {"selector": "full", "loss": "sampled_tail_kl"},
}
"""Entries that are more than a selector; one with a loss of its own is a kind of sampled reverse KL."""
LEFT_OUT = ("q3_", "reverse_kl")
"""Beginnings of selectors that run only when they are named: the paper's ablations of one quadrant."""


def entries(names: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Settings of the entries of these names, by name; without names of all but `LEFT_OUT`.

    Raises:
        ConfigError: for a name that is neither an entry nor a selector.
    """
    names = list(names)
    known = {name: {"selector": name} for name in SELECTORS} | WITH_METHOD
    if not names:
        return {name: entry for name, entry in known.items() if not name.startswith(LEFT_OUT)}
    for name in set(names) - set(known):
        resolve_selector(name)
    return {name: known.get(name, {"selector": name}) for name in names}


def jobs_of(
    lab: Lab,
    folder: Path,
    chosen: dict[str, dict[str, Any]],
    *,
    num_seeds: int,
    steps: int,
) -> list[Job]:
    """One job for every loss and entry on one lab."""
    jobs = []
    for loss in LOSSES:
        for name, settings in chosen.items():
            if "loss" in settings and loss != "sampled_reverse_kl":
                continue
            # The full selector has no budget.
            shares = [1.0] if settings["selector"] == "full" else BUDGETS
            arms = [
                replace(
                    lab_arm(
                        lab,
                        name,
                        STACK_CONFIG | {"loss": loss, "budget": budget} | settings,
                        seed=seed,
                        steps=steps,
                    ),
                    evaluate_every=min(EVALUATE_EVERY, steps),
                    num_test_prompts=min(
                        NUM_TEST_PROMPTS, lab.manifest["spec"]["num_test_prompts"]
                    ),
                )
                for budget in shares
                for seed in range(num_seeds)
            ]
            stem = _stem(f"{lab.variant}__{loss}__{name}")
            about = {"variant": lab.variant, "loss": loss, "selector": name}
            jobs.append(Job(path=folder / f"{stem}.json", arms=arms, about=about))
    return jobs


def _stem(name: str) -> str:
    """A file's name of at most 150 characters; two that would be the same differ in a digest."""
    plain = name.replace("/", "_").replace(" ", "")
    if len(plain) <= 150 and len(plain.encode()) <= 150:
        return plain
    return f"{plain.encode()[:130].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def cells_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of one finished job: per budget, the curves of all seeds."""
    by_budget: dict[float, list[dict[str, Any]]] = {}
    for row in document["arms"]:
        by_budget.setdefault(row["budget"], []).append(row)

    def curves(rows: list[dict[str, Any]], name: str) -> list[list[float]]:
        return [[round(value, 4) for _, value in row[name]] for row in rows]

    return [
        {
            "variant": document["variant"],
            "loss": document["loss"],
            "selector": document["selector"],
            "budget": budget,
            "seeds": [row["seed"] for row in rows],
            "steps": [step for step, _ in rows[0]["accuracy_curve"]],
            "greedy": curves(rows, "accuracy_curve"),
            "sampled": curves(rows, "accuracy_sampled_curve"),
            "kept_fraction": round(sum(row["kept_fraction"] for row in rows) / len(rows), 4),
            "kept_by_kind": _mean_shares([row["selected_share_by_kind"] for row in rows]),
            "cpu_seconds": round(document["cpu_seconds"] * len(rows) / len(document["arms"]), 1),
        }
        for budget, rows in by_budget.items()
    ]


def _mean_shares(shares: list[dict[str, float]]) -> dict[str, float]:
    kinds = sorted({kind for share in shares for kind in share})
    return {kind: round(sum(s.get(kind, 0.0) for s in shares) / len(shares), 3) for kind in kinds}


def key(cell: dict[str, Any]) -> tuple[str, str, str, float]:
    """What identifies a cell."""
    return cell["variant"], cell["loss"], cell["selector"], cell["budget"]


def merge(path: Path, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the cells of finished jobs into the leaderboard's file; cells of other entries stay.

    Raises:
        DataError: if the file is not a leaderboard, or one of other settings.
    """
    cells: dict[tuple, dict[str, Any]] = {}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            cells = {key(cell): cell for cell in before["cells"]}
            known = dict(before["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a leaderboard ({error}); move it away") from error
        if other := sorted(name for name in SETTINGS if known.get(name) != SETTINGS[name]):
            raise DataError(
                f"{path}: its rows were run with other settings ({', '.join(other)}); move it away"
            )
    for document in documents:
        cells |= {key(cell): cell for cell in cells_of(document)}
    board = {
        "settings": SETTINGS,
        "versions": environment()["versions"],
        "cells": [cells[name] for name in sorted(cells)],
    }
    write_json(path, board)
    return board


def run_leaderboard(
    *,
    folder: Path,
    path: Path,
    names: Iterable[str] = (),
    variants: Iterable[str] = (),
    num_seeds: int = 5,
    steps: int = STEPS,
    num_workers: int | None = None,
    lab_sizes: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Run what is missing and return the whole leaderboard.

    Args:
        folder: keeps one file a finished job; delete a file to run its job again.
        path: the leaderboard's JSON; cells of other selectors stay in it.
        names: selectors or expressions; default every registered selector, and `WITH_METHOD`.
        variants: of the lab; default all.
        progress: called with ("teacher" | "student" | "jobs", done, total).

    Raises:
        ConfigError: for an unknown selector or variant. DataError: if a job fails.
    """
    chosen = entries(names)
    variants = list(variants) or list(VARIANTS)
    for variant in variants:
        check_variant(variant)  # of all, before the first is built
    for place in folder, path.parent:
        with cannot_write_to(place):
            place.mkdir(parents=True, exist_ok=True)
    jobs = [
        job
        for variant in variants
        for job in jobs_of(
            build_lab(variant, progress=progress, **(lab_sizes or {})),
            folder,
            chosen,
            num_seeds=num_seeds,
            steps=steps,
        )
    ]
    run_jobs(
        jobs, num_workers=num_workers, progress=lambda done, total: progress("jobs", done, total)
    )
    return merge(path, [json.loads(job.path.read_text(encoding="utf-8")) for job in jobs])
