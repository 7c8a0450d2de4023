"""The rollouts that the inspector shows: read from run folders, thinned, graded, made readable.

Where there are more than fit, whole generation batches are dropped evenly over the run, the first and
the last one kept, so that what is left still shows how a run went.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from taopd.errors import TaopdError
from taopd.report.folders import Run, read_lines
from taopd.report.text import plain, readable, shared, tokenizer_kind
from taopd.runs.limits import entropy_unit
from taopd.runs.schemas import check_rollout
from taopd.runs.signal_names import SignalName

MAX_TOKENS = 200_000
"""Tokens in one report, of all rollouts together."""
LEAST_TEMPLATE = 12
"""Characters; a shorter beginning or end in common is no template, unless it holds a control token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One logged completion, with the run it is from."""

    run: str
    step: int
    line: dict[str, Any]
    """The line of `rollouts.jsonl`, tokens as the vocabulary writes them."""
    pieces: list[str]
    """The tokens readable."""
    correct: bool | None
    """None: no answer, or nothing that could be graded."""
    kind: str
    prompt: str = ""
    """Without what the chat template adds to all prompts."""
    around: tuple[str, str] = ("", "")
    """What that is, before and after."""
    unit_of_h: str = "nats"

    def __len__(self) -> int:
        return len(self.pieces)


def unit_of(signal: SignalName, rollouts: Iterable[Rollout]) -> str:
    """The unit of a signal in these rollouts; of H it depends on the run, and may be either."""
    units = {one.unit_of_h for one in rollouts} if signal.key == "entropy" else {signal.unit}
    return " or ".join(sorted(units))


def read_rollouts(
    runs: Iterable[Run], *, limit: int, match: str | None = None, max_tokens: int = MAX_TOKENS
) -> list[Rollout]:
    """At most `limit` rollouts and `max_tokens` tokens, shared evenly among the runs that logged any.

    Args:
        match: how completions are graded where the run does not say; see `experiments.evaluation.grading`.
    """
    return shown(logged(runs), limit=limit, match=match, max_tokens=max_tokens)


def logged(runs: Iterable[Run]) -> list[tuple[Run, list[dict[str, Any]]]]:
    """The lines of `rollouts.jsonl` of every run that has some."""
    return [(run, lines) for run in runs if (lines := _lines(run))]


def shown(
    found: list[tuple[Run, list[dict[str, Any]]]], *, limit: int, match: str | None, max_tokens: int
) -> list[Rollout]:
    """`read_rollouts` of lines that were read."""
    rollouts: list[Rollout] = []
    for index, (run, lines) in enumerate(found):
        left = len(found) - index
        share, room = (limit - len(rollouts)) // left, max_tokens - sum(map(len, rollouts))
        chosen = _fitting(lines, max(1, share), room // left)
        entries = {token for line in chosen for token in line["tokens"]}
        for line in chosen:
            entries.update(line.get("vocabulary", {}).values())
        kind = tokenizer_kind(token for token in entries if token)
        grade = _grader(match or run.match)
        prompts, before, after = bare([str(line.get("prompt", "")) for line in chosen])
        unit = entropy_unit(str(run.config.get("signals")))
        rollouts += [
            replace(
                _rollout(run.name, line, kind, grade),
                prompt=prompt,
                around=(before, after),
                unit_of_h=unit,
            )
            for line, prompt in zip(chosen, prompts, strict=True)
        ]
    return rollouts


def bare(prompts: Sequence[str]) -> tuple[list[str], str, str]:
    """Prompts without the words of the chat template that begin and end all of them, and these two.

    Both are cut at the end of a line or of a control token, so that no word of a prompt goes with them; with
    fewer than three different prompts nobody can say what is shared.

    Example:
        >>> bare(["<u>1 + 1<end>", "<u>1 + 2<end>", "<u>2<end>"])
        (['1 + 1', '1 + 2', '2'], '<u>', '<end>')
    """
    if len(set(prompts)) < 3:
        return list(prompts), "", ""
    start = shared(prompts)
    start = start[: max(start.rfind("\n"), start.rfind(">")) + 1]
    # A shared beginning leaves each prompt something of its own, and so must a shared end.
    rest = [prompt[len(start) :] for prompt in prompts]
    end = shared([prompt[::-1] for prompt in rest])[::-1]
    cuts = [place for place in (end.find("\n"), end.find("<")) if place >= 0]
    end = end[min(cuts) :] if cuts else ""
    start, end = (
        part if len(part) >= LEAST_TEMPLATE or "<" in part else "" for part in (start, end)
    )
    return [prompt[len(start) : len(prompt) - len(end)] for prompt in prompts], start, end


def _fitting(lines: list[dict[str, Any]], limit: int, room: int) -> list[dict[str, Any]]:
    """At most `limit` lines, and fewer until their tokens fit into `room`; one stays."""
    while True:
        chosen = _thin(lines, limit)
        total = sum(len(line["tokens"]) for line in chosen)
        if total <= room or len(chosen) == 1:
            return chosen
        # By the mean length: a few rounds, and not one for every line.
        limit = max(1, min(len(chosen) - 1, len(chosen) * room // total))


def _lines(run: Run) -> list[dict[str, Any]]:
    """The lines that hold what a page needs; those of an older taopd may lack the lists."""
    path = run.path / "rollouts.jsonl"
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        check_rollout(line, f"{path}, line {number}")
    # A column without values is an absent one.
    known = ({name: value for name, value in line.items() if value is not None} for line in lines)
    return [line for line in known if line.get("tokens")]


def _thin(lines: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    if len(lines) <= limit:
        return lines
    by_step: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        by_step.setdefault(line.get("step", 0), []).append(line)
    steps = list(by_step)
    wanted = max(1, limit // max(map(len, by_step.values())))
    if wanted < len(steps):
        places = {round(i * (len(steps) - 1) / max(1, wanted - 1)) for i in range(wanted)}
        steps = [steps[place] for place in sorted(places)]
    return [line for step in steps for line in by_step[step]][:limit]


def _grader(match: str) -> Any:
    from taopd.experiments.evaluation.grading import Grader, answer_text

    grade = Grader(match)
    return lambda completion, answer: grade(completion, answer_text(answer))


def _rollout(run: str, line: dict[str, Any], kind: str, grade: Any) -> Rollout:
    pieces = [readable(token, kind) for token in line["tokens"]]
    answer, correct = line.get("answer"), None
    if isinstance(answer, str | int | float) and answer != "":
        try:
            # As `taopd evaluate` reads it: without the end token, and characters as they are.
            written = line["tokens"][:-1] if line.get("truncated") is False else line["tokens"]
            verdict = grade(plain(written, kind), answer)
            correct = bool(verdict.correct)
        except (TaopdError, ValueError):
            correct = None
    return Rollout(
        run=run, step=int(line.get("step", 0)), line=line, pieces=pieces, correct=correct, kind=kind
    )
