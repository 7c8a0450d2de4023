"""The signal tables of a stack: one an arm, from the positions of all arms one after the other."""

from collections.abc import Collection, Sequence, Set
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from taopd.models.batch import Positions
from taopd.runs.signal_names import SELECTED_BY
from taopd.signals import (
    INITIAL_GIVES,
    OF_THE_START,
    SignalTable,
    TokenSignals,
    reach_from_logprobs,
    signal_table,
    signals_from_logprobs,
)
from taopd.signals.merge_stops import sampled_logprobs
from taopd.trainer.config import TeachabilityConfig


def rows_by_arm(positions: Positions, num_arms: int) -> list[slice]:
    """The positions of every arm."""
    size = positions.shape[0] // num_arms
    counts = torch.bincount(positions.row // size, minlength=num_arms).tolist()
    starts = [sum(counts[:arm]) for arm in range(len(counts))]
    return [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]


def with_initial(
    signals: TokenSignals,
    initial_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    rows: Sequence[slice],
    settings: Sequence[TeachabilityConfig],
    ends: Sequence[Sequence[int]],
    *,
    needs: Set[str],
) -> TokenSignals:
    """The signals with those of the initial student that the arms read."""
    if needs & INITIAL_GIVES:
        of_arms = list(zip(rows, settings, ends, strict=True))
        signals = _with_reach(signals, initial_logprobs, teacher_logprobs, of_arms)
    if needs & OF_THE_START:
        assert signals.token_ids is not None
        start = signals_from_logprobs(
            initial_logprobs, teacher_logprobs, signals.token_ids, k=settings[0].score_top_k
        )
        signals = replace(
            signals,
            initial_disagreement=start.disagreement,
            initial_compatibility=start.compatibility,
        )
    return signals


def _with_reach(
    signals: TokenSignals,
    initial: Float[Tensor, "N V"],
    teacher: Float[Tensor, "N V"],
    of_arms: Sequence[tuple[slice, TeachabilityConfig, Sequence[int]]],
) -> TokenSignals:
    """The signals with log p_S0 of the sampled token, r and f of every position, by the threshold and the
    foreign ends of its arm."""
    found = [
        reach_from_logprobs(
            initial[own], teacher[own], threshold=args.reach_threshold, foreign_ends=ends
        )
        for own, args, ends in of_arms
    ]
    mass = [teacher[own][:, list(ends)].exp().sum(1) for own, _, ends in of_arms]
    assert signals.token_ids is not None
    return replace(
        signals,
        reach=torch.cat(found),
        foreign=torch.cat(mass) if any(ends for *_, ends in of_arms) else None,
        initial_logprobs=sampled_logprobs(initial, signals.token_ids),
    )


def tables_by_arm(
    signals: TokenSignals,
    positions: Positions,
    rows: Sequence[slice],
    settings: Sequence[TeachabilityConfig],
    needs: Collection[str],
) -> list[SignalTable]:
    """The table of every arm, with what the arm calls compatibility."""
    whole = {
        name: signal_table(
            signals,
            completion=positions.row,
            position=positions.column,
            valid=torch.ones_like(positions.row, dtype=torch.bool),
            compatibility=name,
            needs=needs,
        )
        for name in {args.compatibility for args in settings}
    }
    return [
        take_rows(whole[args.compatibility], own) for own, args in zip(rows, settings, strict=True)
    ]


def take_rows(table: SignalTable, rows: slice) -> SignalTable:
    """A part of a table, as a view."""
    columns = (*SELECTED_BY, "completion", "position", "valid")
    return replace(
        table,
        extra={name: value[rows] for name, value in table.extra.items()},
        **{name: getattr(table, name)[rows] for name in columns},
    )
