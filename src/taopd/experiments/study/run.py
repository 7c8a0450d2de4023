"""Runs a study: checks everything, claims a folder, runs the arms that have not finished, analyses.

Folder: `config.json` (the study), `env.json`, `arms/<name>-seed<n>/` (a run folder each), `results.json`
(no wall-clock values), `timings.json`. An arm is finished when its `results.json` is there, which is
written last and whole. On resume a finished arm is kept if it is the one the study asks for (`kept_arms`),
and refused if it is not; an unfinished one goes on from its newest checkpoint, or starts anew.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from taopd.errors import ConfigError, DataError
from taopd.experiments.arm_settings import Arm, load_problems
from taopd.experiments.arm_student import check_arm
from taopd.experiments.evaluation.evaluate import check_rows
from taopd.experiments.kept_arms import prepare
from taopd.experiments.lab import Lab, build_lab
from taopd.experiments.lab.demo import LAB_CONFIG, VARIANT_CONFIG, lab_arm
from taopd.experiments.lab.spec import check_variant
from taopd.experiments.pool import run_pool
from taopd.experiments.study.analysis import Question, analyse, timings
from taopd.experiments.study.expand import SELECTION_KEYS, StudyArm, check_steps, expand
from taopd.experiments.study.file import StudyFile, numbers, within
from taopd.experiments.study.finished import SO_FAR, WRITTEN, read_outcome
from taopd.models.prompt_rows import read_prompt
from taopd.models.prompts import load_prompts, load_tokenizer
from taopd.models.teacher_prompts import TeacherPrompts
from taopd.runs.folder import RunFolder
from taopd.runs.jsonl import write_json
from taopd.runs.lock import hold
from taopd.trainer.environment import environment
from taopd.trainer.settings.teacher_names import OWN_TEACHERS

OWNED = ("arms", SO_FAR, *WRITTEN)
_ENDLESS = 10**9
"""Steps of an arm that stops by tokens or seconds."""
LAB_STEPS = 100
LAB_PROMPTS = 500
DEFAULT_PROMPTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """A checked study: its arms, and one `Arm` for each of them and each seed, seeds outermost."""

    study: StudyFile
    arms: list[StudyArm]
    runs: list[Arm]

    @property
    def question(self) -> Question:
        """What is held equal, with its amount."""
        equal = self.study.equal
        amount = max(r.config["max_steps"] for r in self.runs) if equal == "steps" else None
        return Question(
            equal=equal,
            amount=amount if equal == "steps" else getattr(self.study, equal),
            metric=self.study.metric,
            collapse_points=self.study.collapse_points,
            rates=tuple(self.study.rates or ()),
            shared_rate=numbers(self.study.config).get("learning_rate")
            if self.study.rates
            else None,
        )

    def folder_of(self, run: Arm, output: Path) -> Path:
        """Where an arm and seed runs."""
        return output / "arms" / run.folder_name


def base_config(study: StudyFile) -> dict[str, Any]:
    """Settings that all arms share, the lab's and those of the question included.

    Raises:
        ConfigError: an unknown lab, or no max_steps where the steps are what is equal.
    """
    if study.lab:
        check_variant(study.lab)
    lab = LAB_CONFIG | VARIANT_CONFIG.get(study.lab, {}) if study.lab else {}
    with within("config"):
        base = lab | numbers(study.config)
    if study.equal == "update_norm":
        base["match_update_norm"] = study.update_norm
    if study.equal in ("selected_tokens", "seconds"):
        base.setdefault("max_steps", _ENDLESS)
    elif study.lab:
        base.setdefault("max_steps", LAB_STEPS)
    if "max_steps" not in base:
        raise ConfigError("config.max_steps is missing: the number of optimizer steps of every arm")
    check_steps(base["max_steps"], "config")
    if not study.lab and "max_completion_length" not in base:
        raise ConfigError("config.max_completion_length is missing: tokens per completion")
    return base


def plan_study(
    study: StudyFile, *, progress: Callable[[str, int, int], object] | None = None
) -> StudyPlan:
    """Check the study down to its models and prompts; builds a tiny lab if it names one.

    Raises:
        ConfigError: settings that cannot be. DataError: models or prompts that cannot be used.
    """
    base = base_config(study)
    arms = expand(study, base)
    lab = build_lab(study.lab, progress=progress, **study.lab_sizes) if study.lab else None
    runs = [_run_of(study, lab, base, arm, seed) for seed in study.seeds for arm in arms]
    _check_inputs(runs)
    seen = []
    # Those of the file first: a fault of theirs is in their controls too.
    for _, run in sorted(zip(arms, runs, strict=False), key=lambda pair: pair[0].added):
        same = {k: v for k, v in run.config.items() if k not in SELECTION_KEYS}
        if same not in seen:
            check_arm(run)
            seen.append(same)
    return StudyPlan(study=study, arms=arms, runs=runs)


def run_study(
    plan: StudyPlan,
    *,
    output: Path,
    resume: bool = False,
    overwrite: bool = False,
    num_workers: int | None = None,
    progress: Callable[[Path, int], None] = lambda folder, step: None,
) -> dict[str, Any]:
    """Run what has not finished, write `results.json` and `timings.json`, return the results.

    Args:
        progress: called with an arm's folder and the steps it has logged.

    Raises:
        DataError: the folder cannot be used or is in use, an arm failed, or the disk is full; what had
            finished is kept.
    """
    claim: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "also_owns": OWNED}
    RunFolder.check(output, command="compare", **claim)
    with _disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        # Before the folder is emptied.
        with hold(output):
            folder = RunFolder.create(output, **claim).path
            folders = [plan.folder_of(run, folder) for run in plan.runs]
            prepare(zip(plan.runs, folders, strict=True))
            config = {"command": "compare"} | asdict(plan.study)
            config["question"] = asdict(plan.question)
            config["controls"] = {arm.name: arm.controls for arm in plan.arms}
            write_json(folder / "config.json", config)
            write_json(folder / "env.json", environment())
            devices = _devices()
            run_pool(
                folders,
                num_workers=_num_workers(plan, num_workers, devices),
                devices=devices,
                progress=progress,
            )
            return conclude(plan, folder)


def conclude(plan: StudyPlan, folder: Path) -> dict[str, Any]:
    """Analyse the finished arms of a plan; write `results.json` and `timings.json`."""
    outcomes = [read_outcome(plan.folder_of(run, folder) / "results.json") for run in plan.runs]
    controls = {arm.name: arm.controls for arm in plan.arms}
    study = plan.study
    where = f"tinylab/{study.lab}" if study.lab else f"{study.teacher} -> {study.student}"
    title = f"{study.title} ({where})" if study.title else where
    results = {"title": title} | analyse(outcomes, controls=controls, question=plan.question)
    write_json(folder / "timings.json", timings(outcomes))
    write_json(folder / "results.json", results)
    return results


def _run_of(
    study: StudyFile, lab: Lab | None, base: dict[str, Any], arm: StudyArm, seed: int
) -> Arm:
    config = base | arm.settings
    asked = study.num_test_prompts
    if lab is not None:
        run = lab_arm(lab, arm.name, config, seed=seed, steps=int(base["max_steps"]))
        run = dataclasses.replace(run, teacher=study.teacher or run.teacher)
        num_test_prompts = asked or min(LAB_PROMPTS, run.num_test_prompts)
    else:
        num_test_prompts = asked or DEFAULT_PROMPTS
        run = Arm(
            name=arm.name,
            seed=seed,
            config=config,
            student=str(study.student),
            teacher=str(study.teacher),
            prompts=str(study.prompts),
            match=study.match,
            evaluate_every=1,
            num_test_prompts=num_test_prompts,
            test_prompts=study.test_prompts,
        )
    return dataclasses.replace(
        run,
        evaluate_every=study.evaluate_every or _a_tenth(config),
        num_test_prompts=num_test_prompts,
        save_model=study.save_models,
        max_new_tokens=study.max_new_tokens,
        evaluation_batch_size=study.evaluation_batch_size,
        max_selected_tokens=study.selected_tokens,
        max_seconds=study.seconds,
    )


def _a_tenth(config: dict[str, Any]) -> int:
    steps = int(config["max_steps"])
    return 10 if steps == _ENDLESS else max(1, steps // 10)


def _check_inputs(runs: Sequence[Arm]) -> None:
    """Everything an arm would stumble over in its first minute; all of them read the same files."""
    run = runs[0]
    check_rows(load_problems(run))
    rows = load_prompts(run.prompts, split="train")
    for template in dict.fromkeys(each.config.get("teacher_prompt_template") for each in runs):
        own = TeacherPrompts(template)
        if own.used(rows.column_names):
            own.check(rows.column_names, run.prompts)
            for row, entry in enumerate(rows):
                own.of(entry, read_prompt(entry, f"row {row}"), f"row {row}")
    for model in (run.student, run.teacher):
        if model not in OWN_TEACHERS:
            load_tokenizer(model)


def _num_workers(plan: StudyPlan, asked: int | None, devices: list[str]) -> int:
    """One arm a GPU, or a core; one at a time where seconds are compared."""
    if chosen := asked or plan.study.workers:
        return chosen
    return 1 if plan.study.equal == "seconds" else len(devices) or os.cpu_count() or 1


def _devices() -> list[str]:
    """GPUs that this process may use; an arm gets one, because torch spreads it over all that it sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [str(index) for index in range(torch.cuda.device_count())]
    return named.split(",")[: len(numbers)] if named else numbers


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write below {folder}: {error.strerror or error}; finished arms are kept, make room "
            "and go on with --resume"
        ) from error
