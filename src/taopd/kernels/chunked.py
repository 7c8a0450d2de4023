"""Scoring in tiles of rows x vocabulary with running sums: bounded memory, any device, plain torch.

    for each tile of the vocabulary                     (the head is read, and cast, once)
        for each block of rows
            z = finish(h W_tile^T)                      one matmul
            peak of every group of 64 columns           gives max z, and says where the top-K can be
            top-K <- best K of (top-K, best K groups)   64 K candidates instead of a whole tile
            m, s, u <- rescale and add                  online log-sum-exp and entropy

Why groups: `torch.topk` over all columns costs as much as the matmul at width 64. The K best of a tile lie
in the K groups with the largest peaks (a group outside has K elements before it, ties by lower id
included), so the selection runs over 1/64 of the columns and then over 64 K of them.

Why exp2: on a CPU `torch.exp` goes through MKL at 0.8 ns an element, `torch.exp2` takes 0.3, so the sums are
kept in powers of 2 and converted at the end.

No gradient: everything here runs without one; `reference` is differentiable.

Source: online log-sum-exp, Milakov and Gimelshein (2018).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.kernels.head import Head
from taopd.kernels.scores import (
    PairScores,
    Scan,
    TopKScores,
    pair_from_scans,
    scores_from_scan,
    select_top,
    start_scan,
)
from taopd.kernels.tiles import GROUP, TILES, Tile

LN_2 = math.log(2.0)
LOWEST_EXPONENT = -1e4
"""exp2 of this is 0 in float32 and float64; stands in for -inf where 0 * -inf must be 0."""


def tile_for(device: torch.device) -> Tile:
    """The default tile of a device."""
    return TILES["cpu"] if device.type == "cpu" else TILES["other"]


def tile_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(best values [n, k'], their columns, largest value [n]) of a tile, k' = min(k, columns).

    Columns ascend, so that a later stable selection breaks ties by the lower one.
    """
    num_columns = logits.shape[1]
    if num_columns <= 2 * k * GROUP:
        columns = select_top(logits, min(k, num_columns)).sort(dim=-1).values
        values = logits.gather(1, columns)
        return values, columns, values.amax(-1)
    whole = num_columns - num_columns % GROUP
    peaks = logits[:, :whole].unflatten(1, (-1, GROUP)).amax(-1)
    if whole < num_columns:
        peaks = torch.cat([peaks, logits[:, whole:].amax(-1, keepdim=True)], dim=1)
    groups = select_top(peaks, k).sort(dim=-1).values
    inside = torch.arange(GROUP, device=logits.device)
    columns = (groups.unsqueeze(2) * GROUP + inside).flatten(1)
    values = logits.gather(1, columns.clamp_max(num_columns - 1))
    values = values.masked_fill(columns >= num_columns, -torch.inf)
    best = select_top(values, k).sort(dim=-1).values
    return values.gather(1, best), columns.gather(1, best), peaks.amax(-1)


class Folded(NamedTuple):
    """One tile after `fold`: what the cross sums need."""

    exponents: Tensor
    """x = (z - m) / ln 2, [n, columns]."""
    powers: Tensor
    """2**x."""
    kept: Tensor
    """Mass of the earlier tiles at the new peak, [n]."""
    shrink: Tensor
    """exp(old m - new m), [n]."""
    drop: Tensor
    """(old m - new m) / ln 2, [n]."""


def fold(scan: Scan, rows: slice, logits: Tensor, first_id: int, *, clamp: bool) -> Folded:
    """Take one tile [n, columns] of finished logits, overwriting it, into the sums of its rows."""
    k = scan.topk_ids.shape[1]
    values, columns, highest = tile_topk(logits, k)
    ids = columns + first_id
    if first_id > 0:
        # Earlier ids are lower and stand first; equal ones among them ascend: columns break ties as ids do.
        values = torch.cat([scan.topk_logits[rows], values], dim=1)
        ids = torch.cat([scan.topk_ids[rows], ids], dim=1)
    best = select_top(values, k)
    scan.topk_logits[rows] = values.gather(1, best)
    scan.topk_ids[rows] = ids.gather(1, best)

    peak = torch.maximum(scan.peak[rows], highest)
    drop = (scan.peak[rows] - peak) / LN_2
    shrink = torch.exp2(drop)
    kept = shrink * scan.mass[rows]
    exponents = logits.sub_(peak.unsqueeze(1)).mul_(1.0 / LN_2)
    if clamp:
        exponents.clamp_min_(LOWEST_EXPONENT)
    powers = torch.exp2(exponents)
    scan.mass[rows] = kept + powers.sum(-1)
    scan.peak[rows] = peak
    return Folded(exponents, powers, kept, shrink, drop)


def fold_weighted(scan: Scan, rows: slice, own: Folded) -> None:
    """Add sum 2**x x of this tile to the weighted sums, overwriting the tile; comes last."""
    earlier = own.shrink * scan.weighted[rows] + own.kept * own.drop
    scan.weighted[rows] = earlier + own.powers.mul_(own.exponents).sum(-1)


def fold_cross(scan: Scan, rows: slice, own: Folded, other: Folded) -> None:
    """Add sum 2**x x' of this tile to the cross sums, after both models' tiles were folded."""
    earlier = own.shrink * scan.cross[rows] + own.kept * other.drop
    scan.cross[rows] = earlier + (own.powers * other.exponents).sum(-1)


def scan_heads(
    models: list[tuple[Tensor, Head]],
    k: int,
    temperature: float,
    tile: Tile,
    *,
    cross: bool = False,
) -> list[Scan]:
    """One pass over the shared vocabulary for one model, or for two with their cross sums.

    Args:
        models: (hidden [N, D], head) of each.
    """
    num_rows, vocab_size = models[0][0].shape[0], models[0][1].vocab_size
    num_columns = max(k, min(tile.columns, vocab_size))
    num_rows_per_block = max(1, tile.elements // num_columns)
    # A CPU multiplies float32 faster than 16-bit numbers, and the products come out in float32.
    states = [
        hidden.float() if hidden.device.type == "cpu" and hidden.element_size() < 4 else hidden
        for hidden, _ in models
    ]
    scans = [start_scan(hidden, k) for hidden in states]
    for first_id in range(0, vocab_size, num_columns):
        # Rounded as the model's forward has it first: a float32 head beside 16-bit states is another head.
        heads = [
            head.tile(first_id, first_id + num_columns).cast(given.dtype).cast(hidden.dtype)
            for hidden, (given, head) in zip(states, models, strict=True)
        ]
        for start in range(0, num_rows, num_rows_per_block):
            rows = slice(start, start + num_rows_per_block)
            folded = []
            for hidden, head, scan in zip(states, heads, scans, strict=True):
                raw = head.project(hidden[rows])
                # A sum is finite only if every entry is: one pass, and before the soft cap hides an infinity.
                scan.finite[rows] &= raw.sum(-1).isfinite()
                logits = head.finish(raw, temperature)
                folded.append(fold(scan, rows, logits, first_id, clamp=head.bias is not None))
            if cross:
                fold_cross(scans[0], rows, folded[0], folded[1])
                fold_cross(scans[1], rows, folded[1], folded[0])
            for scan, own in zip(scans, folded, strict=True):
                fold_weighted(scan, rows, own)
    return [
        scan._replace(
            weighted=scan.weighted * LN_2,
            cross=scan.cross * LN_2,
            topk_ids=scan.topk_ids.clamp_max(vocab_size - 1),  # arbitrary in a row with NaN
        )
        for scan in scans
    ]


@torch.no_grad()
def topk_score(
    hidden: Float[Tensor, "N D"],
    head: Head,
    target_ids: Int[Tensor, " N"],
    *,
    k: int,
    temperature: float = 1.0,
    want_ids: Int[Tensor, "N W"] | None = None,
    tile: Tile | None = None,
) -> TopKScores:
    """`TopKScores` of N positions, tile by tile; without gradient."""
    (scan,) = scan_heads([(hidden, head)], k, temperature, tile or tile_for(hidden.device))
    return scores_from_scan(scan, hidden, head, target_ids, want_ids, temperature)


@torch.no_grad()
def pair_score(
    student_hidden: Float[Tensor, "N Ds"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "N Dt"],
    teacher_head: Head,
    target_ids: Int[Tensor, " N"],
    *,
    k: int,
    temperature: float = 1.0,
    full_kl: bool = False,
    tile: Tile | None = None,
) -> PairScores:
    """`PairScores` of N positions, tile by tile; without gradient."""
    student, teacher = (student_hidden, student_head), (teacher_hidden, teacher_head)
    tile = tile or tile_for(student_hidden.device)
    scans = scan_heads([student, teacher], k, temperature, tile, cross=full_kl)
    return pair_from_scans(
        scans[0], scans[1], student, teacher, target_ids, temperature, full_kl=full_kl
    )
