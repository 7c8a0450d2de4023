"""Folders of `taopd evaluate`: whose model each is of, and differences problem by problem."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from taopd.experiments.study.statistics import Estimate, cut, t_estimate
from taopd.runs.jsonl import read_jsonl
from taopd.runs.schemas import EVALUATION, TRANSCRIPT
from taopd.runs.validation import is_there, read_document

LEAST_PROBLEMS = 2
"""In common; fewer have no error."""


FROM_HERE = "model_from_here"
"""Key of `results.json`: where a model on disk was, seen from the evaluation's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation: its rates, and the share of right samples of every problem."""

    name: str
    path: Path
    model: str
    """The path or hub id that was evaluated."""
    results: dict[str, Any]
    shares: Mapping[str, float] = field(default_factory=dict)
    """By prompt and answer; empty without transcripts."""
    num_missing: int = 0
    """Completions that the rates count and the transcripts lack."""
    color: int = 0

    @property
    def decoding(self) -> str:
        """How the completions were made, in words."""
        settings = self.results.get("settings", {})
        if not settings.get("do_sample", True):
            return "greedy"
        samples = self.results.get("num_samples", 1)
        words = [f"{samples} samples" if samples != 1 else "1 sample"]
        for name, plain in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
            if (value := settings.get(name, plain)) != plain:
                words.append(f"{name} {value}")
        return ", ".join(words)

    @property
    def match(self) -> str:
        """How the completions were graded."""
        return str(self.results.get("settings", {}).get("match", "auto"))


def read_evaluation(path: Path) -> Evaluation | None:
    """The evaluation in a folder, None if it holds none.

    Raises:
        DataError: a file that is there and cannot be read, or has another shape.
    """
    file, transcripts = path / "results.json", path / "transcripts.jsonl"
    if not is_there(file):
        return None
    results = read_document(file, EVALUATION)
    if "pass_at_k" not in results or "model" not in results:
        return None
    lines = read_jsonl(transcripts, TRANSCRIPT) if is_there(transcripts) else []
    right: dict[str, list[bool]] = {}
    for line in lines:
        problem = f"{line.get('prompt')}\n{line.get('answer')}"
        right.setdefault(problem, []).append(bool(line.get("correct")))
    shares = {problem: sum(found) / len(found) for problem, found in right.items()}
    counted = results.get("num_problems", 0) * results.get("num_samples", 1)
    return Evaluation(
        name=path.name,
        path=path,
        model=str(results["model"]),
        results=results,
        shares=shares,
        num_missing=max(0, counted - len(lines)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two evaluations over the problems that both have."""

    one: Evaluation
    other: Evaluation
    estimate: Estimate
    """Of `one` minus `other`, a share; the problem is the unit."""


def unlike(one: Evaluation, other: Evaluation) -> str:
    """Why two evaluations cannot be compared problem by problem, in words; empty if they can."""
    if one.match != other.match:
        return f"the answers are graded by {one.match!r} in one, by {other.match!r} in the other"
    lengths = [each.results.get("settings", {}).get("max_new_tokens") for each in (one, other)]
    if None not in lengths and lengths[0] != lengths[1]:
        return f"completions are cut at {lengths[0]} tokens in one, at {lengths[1]} in the other"
    shown = [
        each.results.get("settings", {}).get("chat_template_kwargs") or {} for each in (one, other)
    ]
    if shown[0] != shown[1]:
        return (
            f"their prompts are rendered with chat_template_kwargs {shown[0]} in one, {shown[1]} in the "
            "other (a column of that name in the dataset sets them for any model)"
        )
    for each in (one, other):
        if not each.shares:
            return (
                f"{each.path.name} has no transcripts.jsonl, which says which problems were right"
            )
        if each.num_missing:
            return f"{each.path.name}/transcripts.jsonl lacks {each.num_missing} completions: it was cut"
    common = len(set(one.shares) & set(other.shares))
    if common < LEAST_PROBLEMS:
        counts = f"{len(one.shares)} and {len(other.shares)} problems, {common} in common"
        return f"their prompts and answers differ ({counts})"
    return ""


def differences(evaluations: Sequence[Evaluation]) -> list[Difference]:
    """Every pair that decoded and graded the same problems in the same way; the better one first."""
    found = []
    for one, other in combinations(evaluations, 2):
        if one.decoding != other.decoding or unlike(one, other):
            continue
        common = sorted(set(one.shares) & set(other.shares))
        apart = [one.shares[problem] - other.shares[problem] for problem in common]
        pair = (one, other) if sum(apart) >= 0 else (other, one)
        signed = apart if pair[0] is one else [-value for value in apart]
        # No interval is shorter than with one sample that differs: without any a t interval has no width.
        step = math.sqrt(12.0 / len(common)) / max(1, one.results.get("num_samples", 1))
        estimate = cut(t_estimate(signed, resolution=step), -1.0)
        found.append(Difference(one=pair[0], other=pair[1], estimate=estimate))
    return found
