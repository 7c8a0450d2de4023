"""What an arm is called and which color it has: the same in every chart, table and list of the page."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from taopd.report.charts import NUM_COLORS
from taopd.report.evaluations import FROM_HERE, Evaluation
from taopd.report.folders import Run, Sources, Study
from taopd.runs.paths import expanded

GREY = 3
"""The control: tokens drawn at random."""
_OTHERS = (0, 1, 2, 4, 5, 6, 7)
_SEED = re.compile(r"-seed\d+$")


def named(sources: Sources) -> Sources:
    """The sources with short names and a color for every arm.

    What all names begin or end with says nothing: the study's name goes where there is one study, the seed
    where there is one seed.
    """
    names = _short(sources.runs)
    colors = _colors(sources)
    runs = [replace(run, name=names[run.name], color=colors[_arm(run)]) for run in sources.runs]
    studies = [replace(study, colors=colors) for study in sources.studies]
    used = len([color for color in colors.values() if color != GREY])
    evaluations = []
    for each in sources.evaluations:
        evaluations.append(_evaluation(each, runs, used))
        used += owner_of(each, runs) is None
    return replace(sources, runs=runs, studies=studies, evaluations=evaluations)


def _evaluation(found: Evaluation, runs: list[Run], place: int) -> Evaluation:
    """With the name and the color of the run whose model it is of, if that is on the page.

    Args:
        place: of its own color among the others, if it needs one.
    """
    owner = owner_of(found, runs)
    if owner is None:
        return replace(found, color=_other_color(place))
    part = Path(found.model).name
    part = part if part.startswith("checkpoint-") else ""
    same = owner.name == found.name
    name = owner.name if same else f"{owner.name} ({' '.join(filter(None, (part, found.name)))})"
    return replace(found, name=name, color=owner.color)


def owner_of(found: Evaluation, runs: Sequence[Run]) -> Run | None:
    """The run whose model was evaluated, if it is one of these; the inner one of nested folders."""
    model = expanded(found.model)
    if FROM_HERE in found.results:
        # As typed it may be another model, seen from another folder than then.
        there = found.path / found.results[FROM_HERE]
        model = there if there.exists() else model
    places = {run.name: run.path.resolve() for run in runs}
    holders = [run for run in runs if model.resolve().is_relative_to(places[run.name])]
    return max(holders, key=lambda run: len(places[run.name].parts), default=None)


def is_arm(run: Run) -> bool:
    """A run of a study, below its `arms`."""
    return run.path.parent.name == "arms"


def _arm(run: Run) -> str:
    return plain_arm(_SEED.sub("", run.path.name)) if is_arm(run) else run.name


def plain_arm(arm: str) -> str:
    """The arm at any of its learning rates."""
    return arm.partition(",lr=")[0]


def _short(runs: list[Run]) -> dict[str, str]:
    arms = [run for run in runs if is_arm(run)]
    one_study = len({run.path.parent for run in arms}) == 1
    one_seed = len({_seed(run) for run in arms}) == 1
    short = {}
    for run in runs:
        name = run.name
        if is_arm(run):
            name = name.partition("/")[2] or name if one_study else name
            name = _SEED.sub("", name) if one_seed else name
        short[run.name] = name
    return short if len(set(short.values())) == len(short) else {run.name: run.name for run in runs}


def _seed(run: Run) -> str:
    found = _SEED.search(run.path.name)
    return found.group() if found else ""


def _colors(sources: Sources) -> dict[str, int]:
    """By arm; the first arm of random tokens is grey, the others take the colors in order."""
    selectors: dict[str, Any] = {}
    for study in sources.studies:
        for row in study.outcomes:
            selectors.setdefault(plain_arm(str(row.get("name", "?"))), row.get("selector"))
    for run in sources.runs:
        selectors.setdefault(_arm(run), run.config.get("selector"))
    random = next((arm for arm, selector in selectors.items() if selector == "random"), None)
    others = [arm for arm in selectors if arm != random]
    colors = {arm: _other_color(place) for place, arm in enumerate(others)}
    return colors if random is None else colors | {random: GREY}


def _other_color(place: int) -> int:
    """The color at a place in the order; after the last one the first again, with another line."""
    rounds, index = divmod(place, len(_OTHERS))
    return _OTHERS[index] + NUM_COLORS * min(rounds, 1)


def color_of(study: Study, arm: str) -> int:
    """The color of an arm of a study."""
    return study.colors.get(plain_arm(arm), 0)
