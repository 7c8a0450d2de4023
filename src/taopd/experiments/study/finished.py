"""What a study left in its folder: the arms that have finished, its question and its controls."""

from pathlib import Path
from typing import Any

from taopd.errors import DataError
from taopd.experiments.study.analysis import METRICS, Controls, Question, analyse, timings
from taopd.runs.schemas import OUTCOME, QUESTION
from taopd.runs.validation import fit, read_document

NEEDED = ("name", "selector", "budget", "seed", "accuracy_curve", "accuracy_greedy")


def read_outcomes(folder: Path) -> list[dict[str, Any]]:
    """Read `results.json` of every arm below a folder (or below its `arms`), in order of their names.

    Raises:
        DataError: no arm has finished there, or a file is not an arm's results.
    """
    root = folder / "arms" if (folder / "arms").is_dir() else folder
    found = [_read(path) for path in sorted(root.glob("*/results.json"))]
    if not found:
        raise DataError(
            f"no arm has finished in {folder}: there is no */results.json below it; a study's folder is "
            "analysed alone, others are compared with each other: taopd compare FOLDER FOLDER"
        )
    return found


def read_question(folder: Path) -> tuple[Question, Controls | None]:
    """The question and the controls that a study left in its `config.json`; defaults without one."""
    path = folder / "config.json"
    if not path.is_file():
        return Question(), None
    config = read_document(path)
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

    `unfinished` of the results counts the arms, by seed, that have begun or wait in the folder.

    Raises:
        DataError: no arm has finished there, or a file is not what a study writes.
    """
    outcomes = read_outcomes(folder)
    question, controls = read_question(folder)
    order = list(controls or ())
    outcomes.sort(key=lambda o: order.index(o["name"]) if o["name"] in order else len(order))
    waiting = len(list((folder / "arms").glob("*/arm.json"))) - len(outcomes)
    results = {"title": folder.name, "unfinished": max(0, waiting)}
    return results | analyse(outcomes, controls=controls, question=question), timings(outcomes)


def _read(path: Path) -> dict[str, Any]:
    outcome = read_document(path, OUTCOME)
    missing = [key for key in NEEDED if outcome.get(key) is None]
    if missing:
        raise DataError(f"{path} is not the result of an arm: it has no {', '.join(missing)}")
    return outcome
