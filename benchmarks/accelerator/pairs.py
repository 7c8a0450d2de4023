"""Stage 4: SmolLM2-135M pairs on a GPU, with the study files of `recipes/studies`.

The pair is made on this machine from the GGUF file in `--cache` (docs/offline.md), then arms are run side by
side. What has finished when the time is up is kept; the next call goes on.
"""

import dataclasses
import itertools
import json
import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.accelerator.measure import DEVICE
from scripts.arguments import Arguments
from scripts.pages.smollm2_cpu import shown
from taopd.cli import positive
from taopd.experiments.smollm2 import Pair, make_pair
from taopd.experiments.smollm2.pair import PairSpec
from taopd.experiments.study.file import StudyFile, load_study_file
from taopd.experiments.study.run import plan_study, run_study
from taopd.runs.jsonl import read_jsonl

STUDIES = Path(__file__).parents[2] / "recipes" / "studies"
PARTS = (
    *("pair1-long", "pair2-long", "pair2-forward"),
    *("pair1-rates", "pair1-all", "pair2-all"),
)
"""The studies in order of worth."""
CORE = ("full", "published-10", "reach-10", "random-10")
LONG_STEPS = 200
RESERVE_SECONDS = 20.0
"""Kept for the end of the stage."""


def parts(pair: Pair) -> dict[str, StudyFile]:
    """The studies of `PARTS`: name -> study."""
    models = {key: str(getattr(pair, key)) for key in ("student", "teacher", "prompts")}
    untouched = {"student": str(pair.instruct), "title": "SmolLM2-135M, untouched student"}
    base, rates, forward = (
        dataclasses.replace(load_study_file(STUDIES / f"{name}.yaml"), **models)
        for name in ("smollm2", "smollm2-rates", "smollm2-forward")
    )
    long = dataclasses.replace(
        base,
        config=base.config | {"max_steps": LONG_STEPS},
        arms=[arm for arm in base.arms if arm["name"] in CORE],
        title=f"SmolLM2-135M, {LONG_STEPS} steps",
    )
    studies = (
        *(long, dataclasses.replace(long, **untouched)),
        dataclasses.replace(forward, student=untouched["student"], seeds=base.seeds),
        *(rates, base, dataclasses.replace(base, **untouched)),
    )
    return dict(zip(PARTS, studies, strict=True))


def toy(study: StudyFile) -> StudyFile:
    """Two steps of four rollouts, one seed."""
    config = study.config | {"max_steps": 2, "per_device_train_batch_size": 4}
    return dataclasses.replace(
        study, config=config, seeds=[0], num_test_prompts=4, evaluate_every=1, arms=study.arms[:2]
    )


class TimeIsUp(Exception):
    """Raised by the alarm: arms that run are stopped, finished ones are kept."""


LOGGED = (
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
    "signal/disagreement_nats/mean",
    "signal/compatibility/mean",
    "guard/idle_drift_nats",
)
"""Metrics of every step that are kept as means between two evaluations."""


def outcomes(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Study -> results of its finished arms, with `LOGGED`, without what only a page of one run shows."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(root.glob("*/arms/*/results.json")):
        row = json.loads(path.read_text())
        row.pop("selected_by_kind_curve", None)
        lines = [line for line in read_jsonl(path.parent / "metrics.jsonl") if "loss" in line]
        row["logged"] = logged(lines, [step for step, _ in row["accuracy_curve"]])
        row["peak_mib"] = max(line.get("perf/peak_memory_mib", 0) for line in lines)
        if row["seed"] == 0:
            row["first_rollouts"] = shown(path.parent, step=0)
        found.setdefault(path.parents[2].name, []).append(row)
    return found


def logged(lines: list[dict[str, Any]], steps: list[int]) -> dict[str, list[float | None]]:
    """Key of `LOGGED` -> mean over the steps between two evaluations; None: not logged there."""
    found: dict[str, list[float | None]] = {}
    for key in LOGGED:
        for first, last in itertools.pairwise(steps):
            values = [x[key] for x in lines if first < x["step"] <= last and key in x]
            mean = round(statistics.mean(values), 5) if values else None
            found.setdefault(key, []).append(mean)
    return found


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--pair", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--cache", type=Path, help="folder of the GGUF file")
    parser.add_argument("--base", type=Path, help="a model folder in place of SmolLM2's weights")
    parser.add_argument("--root", type=Path, default=Path("runs/accelerator-pairs"))
    parser.add_argument("--studies", nargs="+", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument("--workers", type=positive, default=None)
    options = parser.parse_args()
    started = time.monotonic()

    def alarm(*_: Any) -> None:
        raise TimeIsUp

    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes - RESERVE_SECONDS)
    unfinished: list[str] = ["the pair"]
    accuracies: dict[str, Any] = {}
    try:
        spec = PairSpec(device=DEVICE)
        if options.toy:
            spec = dataclasses.replace(
                spec, teacher_steps=2, student_step=1, batch_size=2, num_train=16, num_test=8
            )
        pair = make_pair(
            options.pair, cache=options.cache, spec=spec, base=options.base, progress=_say
        )
        print(f"pair ready after {time.monotonic() - started:.0f} s", flush=True)
        accuracies = pair.teacher_accuracy
        print(json.dumps(accuracies), flush=True)
        studies = {name: study for name, study in parts(pair).items() if name in options.studies}
        unfinished = list(studies)
        for name, study in studies.items():
            output = options.root / name
            plan = plan_study(toy(study) if options.toy else study)
            run_study(
                plan,
                output=output,
                resume=output.exists(),
                num_workers=options.workers or (min(12, os.cpu_count() or 1)),
            )
            unfinished.remove(name)
            print(f"{name}: done after {time.monotonic() - started:.0f} s", flush=True)
    except TimeIsUp:
        print(f"time is up: {', '.join(unfinished)} to go", flush=True)
    print(
        json.dumps(
            {"unfinished": unfinished, "teacher": accuracies, "studies": outcomes(options.root)}
        )
    )


def _say(what: str, done: int, total: int) -> None:
    if done == total or done % 10 == 0:
        print(f"{what}: {done} of {total}", flush=True)


if __name__ == "__main__":
    main()
