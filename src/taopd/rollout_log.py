"""What a report needs of single tokens: sampled completions with their signals, written as they come.

`rollouts.jsonl` holds a few completions per generation batch as a person would read them; with
`log_selection` every token of every batch goes to `selection/step-*.parquet`, one row per token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from taopd.choose import Choice
from taopd.records import append_jsonl, rewind_jsonl
from taopd.scoring import Positions
from taopd.signals import TokenSignals


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """This rank's part of a generation batch after selection: what an observer of the trainer sees."""

    step: int
    batch: dict[str, Any]
    """TRL's padded batch: prompt_ids, prompt_mask, completion_ids, completion_mask."""
    positions: Positions
    """The N valid positions of this rank."""
    signals: TokenSignals
    """Of these N positions."""
    choice: Choice
    """Of all ranks' positions; `mine` cuts out this rank's N."""
    mine: slice
    tokenizer: PreTrainedTokenizerBase

    @property
    def token_ids(self) -> Int[Tensor, " N"]:
        """The sampled tokens."""
        return self.batch["completion_ids"][self.positions.row, self.positions.column]


class RolloutLog:
    """Writes the rollouts of the main process below a run folder.

    Args:
        num_rollouts: completions per generation batch in `rollouts.jsonl`; 0 writes none.
        every_token: also write `selection/step-*.parquet`.
    """

    def __init__(self, folder: str, num_rollouts: int, every_token: bool) -> None:
        self._folder = Path(folder)
        self._num_rollouts = num_rollouts
        self._every_token = every_token
        self._begun = False

    def __call__(self, scored: ScoredBatch) -> None:
        """Write what is asked for of one generation batch."""
        if not self._every_token and self._num_rollouts == 0:
            return
        columns = _columns(scored)
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self._begun:
            rewind_jsonl(self._folder / "rollouts.jsonl", scored.step)
            self._begun = True
        if self._every_token:
            path = self._folder / "selection" / f"step-{scored.step:06d}.parquet"
            path.parent.mkdir(exist_ok=True)
            partial = path.with_suffix(".partial")
            pq.write_table(pa.table(columns), partial)
            partial.replace(path)
        if self._num_rollouts > 0:
            for row in range(min(self._num_rollouts, scored.positions.shape[0])):
                append_jsonl(self._folder / "rollouts.jsonl", _rollout(row, scored, columns))


def _columns(scored: ScoredBatch) -> dict[str, list]:
    """One list per column, one entry per valid position of this rank."""
    selection, mine, signals = scored.choice.selection, scored.mine, scored.signals
    return {
        "step": [scored.step] * len(scored.positions),
        "completion": scored.positions.row.tolist(),
        "position": scored.positions.column.tolist(),
        "token_id": scored.token_ids.tolist(),
        "disagreement": _rounded(signals.disagreement),
        "compatibility": _rounded(signals.compatibility),
        "entropy": _rounded(signals.entropy),
        "score": _rounded(selection.scores[mine]),
        "rank": selection.ranks[mine].tolist(),
        "kept": selection.kept[mine].tolist(),
        "anchored": (scored.choice.anchor_weights[mine] > 0).tolist(),
        "quadrant": selection.quadrant[mine].tolist(),
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.double().tolist()]


def _rollout(row: int, scored: ScoredBatch, columns: dict[str, list]) -> dict[str, Any]:
    """One completion: its prompt, its tokens, and per token the signals and whether it was kept."""
    here = [index for index, completion in enumerate(columns["completion"]) if completion == row]
    batch, tokenizer = scored.batch, scored.tokenizer
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
    token_ids = [columns["token_id"][index] for index in here]
    names = ("disagreement", "compatibility", "entropy", "score", "rank", "kept")
    return {
        "step": scored.step,
        "prompt": tokenizer.decode(prompt),
        "tokens": tokenizer.convert_ids_to_tokens(token_ids),
        "token_ids": token_ids,
    } | {name: [columns[name][index] for index in here] for name in names}
