"""What a study left in its folder: the arms that have finished, its question and its controls."""

from pathlib import Path
from typing import Any

from taopd.errors import DataError
from taopd.experiments.study.analysis import METRICS, Controls, Question, analyse, timings
from taopd.runs.paths import with_a_name
from taopd.runs.schemas import OBJECT, OUTCOME, QUESTION, check_study
from taopd.runs.validation import fit, is_there, read_document

WRITTEN = ("timings.json", "summary.md", "*.png", "*.svg")
"""What the analysis of a study leaves beside `results.json`."""
SO_FAR = "so-far"
"""Folder below a study's, for an analysis of the arms that have finished."""
NEEDED = ("name", "selector", "budget", "seed", "accuracy_curve", "accuracy_greedy")


def read_outcomes(folder: Path) -> list[dict[str, Any]]:
    """Read `results.json` of every arm below a folder (or below its `arms`), in order of their names.

    Raises:
        DataError: no arm has finished there, or a file is not an arm's results.
    """
    root = folder / "arms" if (folder / "arms").is_dir() else folder
    documents = {path: read_document(path, OBJECT) for path in sorted(root.glob("*/results.json"))}
    # Not the analysis of a call before, which may lie beside the arms.
    found = [_outcome(p, one) for p, one in documents.items() if "comparisons" not in one]
    if not found:
        raise DataError(
            f"no arm has finished in {folder}: there is no */results.json below it; a study's folder is "
            "analysed alone, others are compared with each other: taopd compare FOLDER FOLDER"
        )
    return found


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    return read_document(path, OBJECT) if is_there(path) else None


def _question(folder: Path, config: dict[str, Any] | None) -> tuple[Question, Controls | None]:
    # A demo has arms, and no question of its own.
    if config is None or config.get("command") == "demo":
        return Question(), None
    path = folder / "config.json"
    try:
        fit(config, QUESTION, "it")
    except DataError as error:
        raise DataError(f"{path} is not that of a study: {error}") from error
    asked = config["question"]
    if asked["metric"] not in METRICS:
        raise DataError(f"{path}, question, metric: expected one of {', '.join(METRICS)}")
    names = ("equal", "amount", "metric", "collapse_points")
    rates = {"rates": tuple(asked.get("rates") or ()), "shared_rate": asked.get("shared_rate")}
    return Question(**{name: asked[name] for name in names}, **rates), config["controls"]


def analyse_finished(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and timings of the arms in a folder that have finished, by its own question and controls.

    Only arms and seeds that the study has by now. `unfinished` of the results counts those of them, by
    seed, that have begun or wait.

    Raises:
        DataError: no arm has finished there, or a file is not what a study writes.
    """
    outcomes, config = read_outcomes(folder), _config(folder)
    wanted = planned(config)
    if wanted is not None:
        # Arms of an earlier form of the study, or seeds that it has no more, stay in the folder.
        outcomes = [outcome for outcome in outcomes if key_of(outcome) in wanted]
        if not outcomes:
            raise DataError(f"no arm has finished in {folder}, of those that its config.json names")
    question, controls = _question(folder, config)
    order = list(controls or ())
    outcomes.sort(key=lambda o: order.index(o["name"]) if o["name"] in order else len(order))
    begun = len(list((folder / "arms").glob("*/arm.json"))) if wanted is None else len(wanted)
    waiting = begun - len(outcomes)
    results = {"title": with_a_name(folder).name, "unfinished": max(0, waiting)}
    return results | analyse(outcomes, controls=controls, question=question), timings(outcomes)


def planned(config: dict[str, Any] | None) -> set[tuple[str, int]] | None:
    """Name and seed of every arm of a study or a demo; None where its `config.json` does not say."""
    config = config or {}
    arms, seeds = config.get("controls", config.get("arms")), config.get("seeds")
    if not isinstance(arms, dict) or not isinstance(seeds, list):
        return None
    return {(arm, seed) for arm in arms for seed in seeds if isinstance(seed, int)}


def whole_results(folder: Path) -> dict[str, Any] | None:
    """The results of a study that has finished, as it wrote them; None where arms are still missing.

    Raises:
        DataError: `results.json` is there and cannot be read, or has another shape.
    """
    path = folder / "results.json"
    if not is_there(path) or "comparisons" not in (results := read_document(path, OBJECT)):
        return None
    check_study(results, str(path))
    return None if has_other_arms(results, planned(_config(folder))) else results


def has_other_arms(results: dict[str, Any], wanted: set[tuple[str, int]] | None) -> bool:
    """Whether a study's results are of other arms and seeds than those `planned` by now."""
    rows = results.get("outcomes") or results.get("arms") or ()
    return bool(wanted and wanted != {key_of(row) for row in rows})


def key_of(arm: dict[str, Any]) -> tuple[Any, Any]:
    """Name and seed in an arm's `arm.json` or results."""
    return arm.get("name"), arm.get("seed")


def read_outcome(path: Path) -> dict[str, Any]:
    """`results.json` of an arm.

    Raises:
        DataError: it is not an arm's.
    """
    return _outcome(path, read_document(path, OBJECT))


def _outcome(path: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    fit(outcome, OUTCOME, str(path))
    missing = [key for key in NEEDED if outcome.get(key) is None]
    if missing:
        raise DataError(f"{path} is not the result of an arm: it has no {', '.join(missing)}")
    return outcome
