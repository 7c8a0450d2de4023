"""What a report needs of single tokens: sampled completions with their signals, written as they come.

`rollouts.jsonl` holds a few completions per generation batch as a person would read them: the tokens,
both models' top-K lists at each, signals, score, rank and fate, and how many tokens of the batch the
budget paid for. With `log_selection` every token of every batch goes to `selection/step-*.parquet`, one
row per token, without the lists.

Why compact: a token with two whole top-16 lists takes 400 bytes of JSON. Numbers are rounded (four
digits, log-probs to 0.01 nats) and an id is written only where one of the two models gives it at least
`LIST_FLOOR`; the signals beside them come from the whole lists.

`rollouts.jsonl` is bounded (`taopd.runs.bounded_log`).
"""

import math
from bisect import bisect_left
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from taopd.models.batch import TEACHER_PROMPT, unpadded
from taopd.runs.bounded_log import BoundedLog
from taopd.runs.limits import LIST_FLOOR
from taopd.runs.signal_names import SELECTED_BY
from taopd.signals import TokenSignals
from taopd.trainer.scored_batch import ScoredBatch

_SIGNALS = (*SELECTED_BY, "score")


class RolloutLog:
    """Writes the rollouts of the main process below a run folder.

    Args:
        num_rollouts: completions per generation batch in `rollouts.jsonl`; 0 writes none.
        every_token: also write `selection/step-*.parquet`.
        steps_per_batch: optimizer steps from one generation batch to the next.
    """

    def __init__(
        self, folder: str, num_rollouts: int, every_token: bool, *, steps_per_batch: int = 1
    ) -> None:
        self._folder = Path(folder)
        self._num_rollouts = num_rollouts
        self._every_token = every_token
        self._last: int | None = None
        """The step of the newest batch."""
        self._log = BoundedLog(self._folder / "rollouts.jsonl", distance=steps_per_batch)

    def __call__(self, scored: ScoredBatch) -> None:
        """Write what is asked for of one generation batch."""
        if not self._every_token and self._num_rollouts == 0:
            return
        columns = _columns(scored)
        self._folder.mkdir(parents=True, exist_ok=True)
        # Not in the constructor: a run that is refused must leave the folder as it was.
        if self._last is None or scored.number <= self._last:
            self._rewind(scored.number)
        self._last = scored.number
        if self._every_token:
            self._write_tokens(columns, scored.number)
        if self._log.keeps(scored.number):
            rows = range(min(self._num_rollouts, scored.positions.shape[0]))
            self._log.append(*[_rollout(row, scored, columns) for row in rows])

    def _rewind(self, step: int) -> None:
        """Drop what an interrupted run wrote of this step and later ones."""
        self._log.rewind(step)
        for path in (self._folder / "selection").glob("step-*"):
            if path.suffix != ".parquet" or int(path.stem.removeprefix("step-")) >= step:
                path.unlink()

    def _write_tokens(self, columns: dict[str, list], step: int) -> None:
        path = self._folder / "selection" / f"step-{step:06d}.parquet"
        path.parent.mkdir(exist_ok=True)
        # Renamed when it is whole: a reader never sees half a file.
        partial = path.with_suffix(".partial")
        try:
            pq.write_table(pa.table(columns), partial)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        partial.replace(path)


def _columns(scored: ScoredBatch) -> dict[str, list]:
    """One list per column, one entry per valid position of this rank."""
    selection, local, signals = scored.choice.selection, scored.local, scored.signals
    of = scored.of_teacher
    return {
        "step": [scored.number] * len(scored.positions),
        "completion": scored.positions.row.tolist(),
        "position": scored.positions.column.tolist(),
        "token_id": scored.token_ids.tolist(),
        **{name: _rounded(getattr(signals, name)) for name in SELECTED_BY},
        "score": _rounded(selection.scores[local]),
        "rank": selection.order[local].tolist(),
        "kept": selection.kept[local].tolist(),
        # What trains and was not selected: with method reach also towards the teacher, or there alone.
        "anchored": (scored.choice.trains & ~selection.kept)[local].tolist(),
        "quadrant": selection.quadrant[local].tolist(),
        **({} if of is None else {"teacher": [scored.teachers[place] for place in of.tolist()]}),
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.double().tolist()]


def _rollout(row: int, scored: ScoredBatch, columns: dict[str, list]) -> dict[str, Any]:
    """One completion: its prompt, its tokens, per token the signals and fate, and both top-K lists."""
    here = [index for index, completion in enumerate(columns["completion"]) if completion == row]
    batch, tokenizer, selection = scored.batch, scored.tokenizer, scored.choice.selection
    sampled = unpadded(batch, "completion", row)
    own = {name: [values[index] for index in here] for name, values in columns.items()}
    student, teacher = _lists(scored.signals, here)
    listed = {token for ids in (*student["ids"], *teacher["ids"]) for token in ids}
    names = ("rank", "kept", "anchored", "quadrant")
    return {
        "step": scored.number,
        "completion": row,
        "prompt": tokenizer.decode(unpadded(batch, "prompt", row)),
        **_of_teacher(row, scored),
        "answer": batch.get("answers", {row: None})[row],
        "truncated": bool(sampled) and sampled[-1] not in scored.stop_ids,
        "num_valid": selection.num_valid,
        "cut": _cut(scored),
        "tokens": tokenizer.convert_ids_to_tokens(own["token_id"]),
        "token_ids": own["token_id"],
        **{name: [_short(value) for value in own[name]] for name in _SIGNALS},
        **{name: own[name] for name in names},
        **_parts(scored, here),
        **_tool_results(row, scored, own["position"]),
        "student_top": student,
        "teacher_top": teacher,
        "vocabulary": {token: tokenizer.convert_ids_to_tokens(token) for token in sorted(listed)},
    }


def _cut(scored: ScoredBatch) -> int | None:
    """How many places of the order are kept from the first on; None where others are, or it is not known."""
    selection = scored.choice.selection
    if selection.kept_fraction == 1.0:
        return selection.num_valid
    if not scored.table.ranks.alone:
        return None
    # One budget for each completion or teacher, and a draw, leave out some of the first places.
    places, cut = selection.order, selection.num_budget
    return cut if bool(selection.kept[(places >= 0) & (places < cut)].all()) else None


def _of_teacher(row: int, scored: ScoredBatch) -> dict[str, str]:
    """The name of a completion's teacher where there are several, and a prompt of the teacher's own."""
    batch, found = scored.batch, {}
    if scored.teachers:
        found["teacher"] = scored.teachers[int(batch["teacher_index"][row])]
    if TEACHER_PROMPT[0] in batch:
        ids = unpadded(batch, "teacher_prompt", row)
        found["teacher_prompt"] = scored.tokenizer.decode(ids)
    return found


def _parts(scored: ScoredBatch, here: list[int]) -> dict[str, list[float]]:
    """D^L and D^I, and both models' log-probs of the sampled token where they are known."""
    selection, signals = scored.choice.selection, scored.signals
    values = {
        "learnable": selection.learnable[scored.local],
        "incompatible": selection.incompatible[scored.local],
        "reach": signals.reach,
        "student_logprob": signals.student_logprobs,
        "teacher_logprob": signals.teacher_logprobs,
    }
    return {
        name: [_short(value) for value in column[here].double().tolist()]
        for name, column in values.items()
        if column is not None
    }


def _tool_results(row: int, scored: ScoredBatch, columns: list[int]) -> dict[str, list[Any]]:
    """What tools answered, each after how many of the tokens; nothing where no tool was called.

    Args:
        columns: of the tokens in the padded batch, ascending.
    """
    batch = scored.batch
    if "tool_mask" not in batch:
        return {}
    told = (batch["completion_mask"][row].bool() & ~batch["tool_mask"][row].bool()).tolist()
    results: list[Any] = []
    start = 0
    for is_told, run in groupby(told):
        end = start + len(list(run))
        if is_told:
            ids = batch["completion_ids"][row][start:end].tolist()
            results.append([bisect_left(columns, start), scored.tokenizer.decode(ids)])
        start = end
    return {"tool_results": results} if results else {}


def _lists(signals: TokenSignals, here: list[int]) -> tuple[dict[str, list], dict[str, list]]:
    """Both models' lists at some positions, best first, without what neither finds likely."""
    floor = math.log(LIST_FLOOR)
    student = signals.student_topk_ids[here], signals.student_topk_logprobs[here]
    teacher = signals.teacher_topk_ids[here], signals.teacher_topk_logprobs[here]
    both = []
    for (ids, logprobs), (other_ids, other_logprobs) in ((student, teacher), (teacher, student)):
        shared = ids.unsqueeze(2) == other_ids.unsqueeze(1)
        # An id that one model finds likely is written for both: the reader compares the two lists.
        likely_there = (shared & (other_logprobs > floor).unsqueeze(1)).any(2)
        written = (ids >= 0) & ((logprobs > floor) | likely_there)
        rows = zip(ids.tolist(), logprobs.tolist(), written.tolist(), strict=True)
        out: dict[str, list] = {"ids": [], "logprobs": []}
        for row_ids, row_logprobs, row_written in rows:
            places = [place for place, kept in enumerate(row_written) if kept]
            out["ids"].append([row_ids[place] for place in places])
            out["logprobs"].append([round(row_logprobs[place], 2) for place in places])
        both.append(out)
    return both[0], both[1]


def _short(value: float) -> float:
    # Four digits: a person reads them, and the file is a third of its size.
    return float(f"{value:.4g}")
