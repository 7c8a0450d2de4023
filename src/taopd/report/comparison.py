"""Arms from finished folders: whose model every evaluation graded, and paired differences between them.

Takes what `folders.read_folders` found, in any mixture: runs, their evaluations, studies, one-step tables.
Two evaluations are compared where they decoded and graded in the same way and have problems in common. The
unit is the problem: the samples of one problem count as one value, its share of right answers.
"""

import shlex
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from rich import box
from rich.table import Table

from taopd.errors import DataError
from taopd.experiments.study.statistics import holm
from taopd.report.arms import is_arm, owner_of
from taopd.report.evaluations import Difference, Evaluation, differences, unlike
from taopd.report.folders import Run, Sources
from taopd.report.generated_part import markdown_table
from taopd.report.study_table import p_words
from taopd.runs.shares import per_cent

UNIT = (
    "95 % intervals over the problems (of differences: paired by problem, samples of a problem together). "
    "They say which of these models is better. Which way of training is better takes several seeds: "
    "taopd compare STUDY.yaml"
)


def compare(sources: Sources) -> dict[str, Any]:
    """Arms, their evaluations and every paired difference, as JSON holds them; shares, not percent.

    Raises:
        DataError: fewer than two evaluations, or two that do not fit together.
    """
    rated = [each for each in sources.evaluations if "1" in each.results["pass_at_k"]]
    # The arms of a study were evaluated by it.
    runs = [run for run in sources.runs if not is_arm(run)]
    owners = [owner_of(each, sources.runs) for each in rated]
    missing = [run for run in runs if not any(owner is run for owner in owners)]
    if len(rated) < 2:
        raise DataError(_too_few(rated, missing))
    _check_fit(rated)
    pairs = differences(rated)
    adjusted = holm([pair.estimate.p for pair in pairs])
    return {
        "arms": [_arm(each, owner) for each, owner in zip(rated, owners, strict=True)],
        "differences": [
            _difference(pair, p, sources.runs) for pair, p in zip(pairs, adjusted, strict=True)
        ],
        "without_evaluation": [run.name for run in missing],
    }


def tables(compared: dict[str, Any]) -> list[Table]:
    """One row an evaluation, and one a pair; accuracies in %, differences in points."""
    arms = _empty(
        "Accuracy of each arm, %",
        ("arm (evaluation)", "settings", "decoding"),
        ("accuracy", "95 %", "problems"),
    )
    for row in arm_rows(compared):
        arms.add_row(*row)
    if not compared["differences"]:
        return [arms]
    pairs = _empty(
        "On the same problems, points",
        ("arm", "less"),
        ("difference", "95 %", "p", "problems"),
    )
    for row in difference_rows(compared):
        pairs.add_row(*row)
    return [arms, pairs]


def markdown(compared: dict[str, Any]) -> str:
    """The same tables as a page."""
    heads = ("arm (evaluation)", "settings", "decoding", "accuracy, %", "95 %", "problems")
    lines = ["# Arms compared", "", *markdown_table(heads, arm_rows(compared), texts=6)]
    heads = ("arm", "less", "difference, points", "95 %", "p", "problems")
    lines += ["", "## On the same problems", ""]
    lines += markdown_table(heads, difference_rows(compared), texts=6)
    return "\n".join([*lines, "", f"{UNIT}. p: two-sided, Holm-corrected over these rows.", ""])


def arm_rows(compared: dict[str, Any]) -> list[list[str]]:
    """Cells of every evaluation."""
    return [
        [
            _called(row["arm"], row["evaluation"]),
            _settings(row),
            row["decoding"],
            per_cent(row["accuracy"]),
            _span(row["low"], row["high"], sign=""),
            "-" if row["num_problems"] is None else f"{row['num_problems']:,}",
        ]
        for row in compared["arms"]
    ]


def difference_rows(compared: dict[str, Any]) -> list[list[str]]:
    """Cells of every pair."""
    return [
        [
            _called(row["arm"], row["evaluation"]),
            _called(row["less"], row["less_evaluation"]),
            f"{100 * row['difference']:+.1f}",
            _span(row["low"], row["high"], sign="+"),
            "-" if row["p_holm"] is None else p_words(row["p_holm"]),
            f"{row['num_problems']:,}",
        ]
        for row in compared["differences"]
    ]


def _check_fit(rated: Sequence[Evaluation]) -> None:
    """Refuse two that decoded alike and cannot be compared, in one message.

    Raises:
        DataError: names the two folders and what differs.
    """
    for one, other in combinations(rated, 2):
        if one.decoding != other.decoding:
            continue
        if reason := unlike(one, other):
            raise DataError(
                f"{one.path} and {other.path} do not fit together: {reason}. Evaluate both models with the "
                "same --dataset, --split and --match, or compare them apart"
            )
    kinds = {each.decoding for each in rated}
    if len(kinds) == len(rated):
        raise DataError(
            f"no two of these evaluations decoded in the same way ({', '.join(sorted(kinds))}): evaluate "
            "both models with --greedy, or with the same --num-samples, --temperature, --top-p and --top-k"
        )


def _too_few(rated: Sequence[Evaluation], missing: Sequence[Run]) -> str:
    text = f"{len(rated)} of the folders hold{'s' if len(rated) == 1 else ''} an evaluation; two are compared"
    if not missing:
        return f"{text}. Write each with: taopd evaluate MODEL --dataset FILE --output FOLDER"
    path, quoted = missing[0].path, shlex.quote
    data = quoted(str(rated[0].results.get("dataset", "FILE"))) if rated else "FILE"
    also = f" --match {quoted(rated[0].match)}" if rated and rated[0].match != "auto" else ""
    greedy = " --greedy" if rated and rated[0].decoding == "greedy" else ""
    return (
        f"{text}. Evaluate the model of {path} first: taopd evaluate {quoted(f'{path}/model')} --dataset "
        f"{data}{also}{greedy} --output {quoted(f'{path}-eval')}"
    )


def _arm(found: Evaluation, run: Run | None) -> dict[str, Any]:
    low, high = found.results.get("intervals", {}).get("1", (None, None))
    config = {} if run is None else run.config
    return {
        "arm": _name(found, run),
        "evaluation": found.path.name,
        "model": found.model,
        "selector": config.get("selector"),
        "budget": config.get("budget"),
        "seed": config.get("seed"),
        "decoding": found.decoding,
        "match": found.match,
        "accuracy": found.results["pass_at_k"]["1"],
        "low": low,
        "high": high,
        "num_problems": found.results.get("num_problems"),
    }


def _difference(pair: Difference, p: float | None, runs: Sequence[Run]) -> dict[str, Any]:
    found = pair.estimate
    one, other = (_name(each, owner_of(each, runs)) for each in (pair.one, pair.other))
    return {
        "arm": one,
        "evaluation": pair.one.path.name,
        "less": other,
        "less_evaluation": pair.other.path.name,
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "p_holm": p,
        "num_problems": found.n,
    }


def _name(found: Evaluation, run: Run | None) -> str:
    """The run, with a checkpoint's step; of a model that no run wrote the end of its path."""
    parts = found.model.rstrip("/").split("/")
    if run is None:
        return "/".join(parts[-2:])
    return f"{run.name} {parts[-1]}" if parts[-1].startswith("checkpoint-") else run.name


def _called(arm: str, evaluation: str) -> str:
    return f"{arm} ({evaluation})"


def _settings(row: dict[str, Any]) -> str:
    """What an arm was trained with, as far as its run says."""
    selector, budget, seed = (row[name] for name in ("selector", "budget", "seed"))
    if selector is None:
        return "-"
    share = f" {100 * budget:g} %" if isinstance(budget, float) and selector != "full" else ""
    return f"{selector}{share}" + ("" if seed is None else f", seed {seed}")


def _span(low: float | None, high: float | None, *, sign: str) -> str:
    if low is None or high is None:
        return "-"
    return f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def _empty(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (*texts, *numbers):
        number = name in numbers
        made.add_column(
            name, justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    return made
