"""Reader of the folders that a report shows: runs, studies, banks, gains and diagnostic reports.

Reads files only, tolerates every one that is absent, and imports no torch. A study's or demo's arms are
runs of their own, below `arms/`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from taopd.errors import DataError
from taopd.experiments.study.finished import analyse_finished, has_other_arms, key_of, planned
from taopd.report.evaluations import Evaluation, read_evaluation
from taopd.runs import schemas
from taopd.runs.folder import CONFIG_BESIDE_MODEL
from taopd.runs.jsonl import read_jsonl
from taopd.runs.paths import refuse_twice, with_a_name
from taopd.runs.validation import NUMBER, is_there, read_document

_LOGS, _WARNED = ("metrics.jsonl", "rollouts.jsonl"), "warnings.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run. What a file would hold is empty where there is no file."""

    name: str
    """Unique in the report."""
    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    """Every setting of `config.json`; of an arm: the settings that it changes."""
    changed: dict[str, Any] | None = None
    """Settings that differ from the defaults; None: not recorded."""
    env: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    warned: list[dict[str, Any]] = field(default_factory=list)
    """`warnings.jsonl`: what the guards saw, with source and step."""
    teacher: dict[str, Any] = field(default_factory=dict)
    """`teacher.json`: a teacher that was asked over the network."""
    check: list[dict[str, Any]] = field(default_factory=list)
    """The verdicts of `check.json`, the look before the first step."""
    torn: list[str] = field(default_factory=list)
    """Files whose last line is cut."""
    match: str = "auto"
    """How its completions are graded."""
    color: int = 0
    """Of its arm, on the page; see `report.arms`."""

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a metric at every line that has it."""
        return [
            (line["step"], line[key])
            for line in self.metrics
            if "step" in line and NUMBER.fits(line.get(key))
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Arms that are compared: a `results.json` with a list "arms"."""

    name: str
    path: Path
    results: dict[str, Any]
    env: dict[str, Any] = field(default_factory=dict)
    colors: dict[str, int] = field(default_factory=dict)
    """By arm, on the page."""

    @property
    def outcomes(self) -> list[dict[str, Any]]:
        """One mapping per arm and seed."""
        rows = self.results.get("outcomes") or self.results.get("arms", [])
        return [row for row in rows if isinstance(row, dict) and row.get("accuracy_curve")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Everything that the named folders hold."""

    runs: list[Run] = field(default_factory=list)
    studies: list[Study] = field(default_factory=list)
    banks: list[Path] = field(default_factory=list)
    gains: list[Path] = field(default_factory=list)
    diagnostics: list[Path] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    one_steps: list[Path] = field(default_factory=list)


def read_folders(paths: list[Path]) -> Sources:
    """Find out what every folder is, and read its small files.

    Raises:
        ConfigError: a folder twice, also as an arm of another one.
        DataError: a folder that is missing or holds nothing that a report could show.
    """
    refuse_twice(paths)
    found = Sources()
    for path in paths:
        if not path.is_dir():
            what = f"{path} is a file; a report is made from folders"
            raise DataError(what if path.is_file() else f"no such folder: {path}")
        if not _add(with_a_name(path), found):
            raise DataError(
                f"{path} holds nothing to report: no metrics.jsonl, rollouts.jsonl, results.json of "
                "an evaluation or of arms, bank, gains, one-step table or verdicts.json"
            )
    refuse_twice(run.path for run in found.runs)
    return found


def _add(path: Path, found: Sources) -> bool:
    before = _size(found)
    kind = read_json(path / "manifest.json", schemas.MANIFEST).get("format")
    if kind == schemas.BANK_FORMAT:
        found.banks.append(path)
    elif kind == schemas.GAIN_FORMAT:
        found.gains.append(path)
    elif kind == schemas.ONE_STEP_FORMAT:
        found.one_steps.append(path)
    if is_there(path / "verdicts.json"):
        found.diagnostics.append(path)
    results = read_json(path / "results.json", schemas.STUDY)
    wanted = planned(read_json(path / "config.json")) if (path / "arms").is_dir() else None
    of_arms = _arms(path, wanted)
    if results and has_other_arms(results, wanted):
        results = {}  # of an earlier form of the study
    if not results and any(is_there(folder / "results.json") for folder in of_arms):
        # A study that runs or was stopped, perhaps with other seeds than before: the arms that have finished.
        results, _ = analyse_finished(path)
    arms = results.get("arms", [])
    name = _unique(path.name, found.studies)
    if arms:
        env = read_json(path / "env.json", schemas.ENV)
        found.studies.append(Study(name=name, path=path, results=results, env=env))
    if arms or (path / "arms").is_dir():
        for folder in of_arms:
            if _is_run(folder):
                found.runs.append(_run(folder, f"{name}/{folder.name}", found.runs))
    elif (evaluation := read_evaluation(path)) is not None:
        name = _unique(path.name, found.evaluations)
        found.evaluations.append(replace(evaluation, name=name))
    elif _is_run(path):
        found.runs.append(_run(path, path.name, found.runs))
    return _size(found) > before


def _arms(study: Path, wanted: set[tuple[str, int]] | None) -> list[Path]:
    """The folders of a study's arms, the first seed of each before the second: few show most arms.

    Arms of an earlier form of the study, or seeds that it has no more, stay in its folder and are left out.
    """
    found = {
        folder: read_json(folder / "arm.json", schemas.ARM)
        for folder in (study / "arms").glob("*/")
    }
    seeds = {
        folder: arm.get("seed") or 0
        for folder, arm in found.items()
        if wanted is None or "name" not in arm or key_of(arm) in wanted
    }
    return sorted(seeds, key=lambda folder: (seeds[folder], folder.name))


def _unique(name: str, others: Sequence[Any]) -> str:
    """The name, numbered if others bear it."""
    taken, number = {other.name for other in others}, 2
    unique = name
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique


def _size(found: Sources) -> int:
    return sum(len(getattr(found, part.name)) for part in fields(found))


def _is_run(path: Path) -> bool:
    return any(is_there(path / name) for name in _LOGS)


def _run(path: Path, name: str, others: list[Run]) -> Run:
    from taopd.experiments.evaluation.grading import grading_of

    beside = (path / CONFIG_BESIDE_MODEL).is_file()
    config = read_json(path / (CONFIG_BESIDE_MODEL if beside else "config.json"), schemas.CONFIG)
    arm = read_json(path / "arm.json", schemas.ARM)
    changed = config.pop("changed", None)
    if arm:
        config = {"seed": arm.get("seed"), **arm.get("config", {})}
        changed = config
    return Run(
        name=_unique(name, others),
        path=path,
        config=config,
        changed=changed,
        env=read_json(path / "env.json", schemas.ENV),
        results=read_json(path / "results.json"),
        metrics=read_lines(path / "metrics.jsonl", schemas.METRICS),
        warned=read_lines(path / _WARNED),
        teacher=read_json(path / "teacher.json"),
        check=read_json(path / "check.json", schemas.CHECK).get("items", []),
        torn=[name for name in (*_LOGS, _WARNED) if is_torn(path / name)],
        match=arm.get("match") or grading_of(config.get("dataset_name")),
    )


def read_json(path: Path, shape: Any = schemas.OBJECT) -> dict[str, Any]:
    """A JSON object of a given shape, empty if the file is missing.

    Raises:
        DataError: the file is there and cannot be read, or has another shape.
    """
    return read_document(path, shape) if is_there(path) else {}


def read_lines(path: Path, shape: Any = schemas.OBJECT) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none if it is missing.

    Raises:
        DataError: a line other than the last is not JSON, or one has another shape.
    """
    return read_jsonl(path, shape) if is_there(path) else []


def is_torn(path: Path) -> bool:
    """Whether the last line of a file has no end: its writer was killed, or is writing."""
    if not is_there(path) or not path.stat().st_size:
        return False
    with open(path, "rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() != b"\n"
