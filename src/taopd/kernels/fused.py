"""Scoring in one Triton kernel: logits live in registers, nothing of size [N, V] or [N, tile] in memory.

Maths, per row and tile of the vocabulary, z = finish(h W_tile^T) / temperature:

    m' = max(m, max z)      r = exp(m - m')
    u' = r (u + s (m - m')) + sum exp(z - m') (z - m')      H = log s - u / s
    s' = r s + sum exp(z - m')                              log-sum-exp = m + log s
    top-K: while the largest z left in the tile exceeds the worst of the K kept, exchange them

The exchange loop ends at once for most tiles: over a vocabulary in random order a row makes about
K ln(V / K) exchanges, 150 for K = 16 and V = 151,936, in 1,187 tiles of 128.

                 V (a loop)                     One program owns BLOCK_N rows and keeps
              +----+----+----+----+             m, s, u [BLOCK_N] and the K best [BLOCK_N, K]
      N     0 | -> | -> | -> | -> |             in registers. Inside a tile it loops over D in
  (programs)  +----+----+----+----+             steps of BLOCK_D with tl.dot in float32.
            1 | -> |    |    |    |
              +----+----+----+----+

Memory traffic: N D + N (3 + 2 K) words to and from HBM, and the head: V D words once per wave of programs.
The head is read by all programs at about the same time, so within a wave it should come from L2.

Target and given ids: gathered afterwards (`scores.logits_at`), N (1 + W) D multiplications.

Known limits: forward only; K <= 32; float32, bfloat16 and float16; one program per 64 rows, so that fewer
than 64 x (number of SMs) rows leave part of a GPU idle; no full-vocabulary divergence of a pair. Checked
against `reference` in float64 on an H200 (tests marked gpu) and in Triton's interpreter, and compiled ahead
of time for sm_90. Measured on an H200 at V = 151,936: in bfloat16 0.44 of the speed of a plain matrix
product; in float32 0.26, less than `chunked`, so `impl="auto"` takes it for 16-bit states only.
"""

import os

import torch
from jaxtyping import Float
from torch import Tensor

from taopd.errors import ConfigError
from taopd.kernels.head import Head
from taopd.kernels.scores import Scan, start_scan

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_K = 32
BLOCK_N, BLOCK_V, BLOCK_D = 64, 128, 64
"""Rows of a program, columns of a tile, depth of one step; powers of two, at least 16 for tl.dot."""
WIDE_BLOCK_V = 256
"""Columns for 16-bit states where shared memory holds them: 15.9 ms instead of 24.8 on an H200, and the best
of nine shapes there (benchmarks/results/accelerator-tune__nvidia-h200.json)."""
WIDE_CAPABILITIES = {(8, 0), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0)}
"""GPUs with at least 163 KiB of shared memory a block (CUDA's programming guide); a wide tile takes 120 KiB,
and others have 99."""
NUM_WARPS, NUM_STAGES = 8, 3
LOWEST = -3.0e38
"""Stands in for a logit of -inf, so that it still beats a place of the top-K that is empty."""


def interpreted() -> bool:
    """Whether Triton simulates kernels on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device, dtype: torch.dtype, k: int) -> str | None:
    """Why the kernel cannot run on such an input, or None."""
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda" and not interpreted():
        return f"it needs a CUDA device, the hidden states are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 or float16, not {dtype}"
    if k > MAX_K:
        return f"it keeps at most {MAX_K} ids a row, asked for k={k}"
    return None


if triton is not None:

    @triton.jit
    def _tile_logits(
        h_ptr, w_ptr, b_ptr, rows, columns, num_rows, vocab_size, width, h_stride, w_stride,
        HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """W h + b of BLOCK_N rows and BLOCK_V columns, float32; 0 outside the matrices."""
        raw = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        row_offsets = rows.to(tl.int64)[:, None] * h_stride
        column_offsets = columns.to(tl.int64)[:, None] * w_stride
        for first in range(0, width, BLOCK_D):
            depth = first + tl.arange(0, BLOCK_D)
            inside = depth[None, :] < width
            h = tl.load(
                h_ptr + row_offsets + depth[None, :],
                mask=(rows[:, None] < num_rows) & inside,
                other=0.0,
            )
            w = tl.load(
                w_ptr + column_offsets + depth[None, :],
                mask=(columns[:, None] < vocab_size) & inside,
                other=0.0,
            )
            if WIDEN:
                h, w = h.to(tl.float32), w.to(tl.float32)
            raw = tl.dot(h, tl.trans(w), raw, input_precision="ieee")
        if HAS_BIAS:
            bias = tl.load(b_ptr + columns, mask=columns < vocab_size, other=0.0)
            raw += bias.to(tl.float32)[None, :]
        return raw

    @triton.jit
    def _exchange(logits, first, top_values, top_ids, BLOCK_V: tl.constexpr, LOWEST: tl.constexpr):
        """Move what beats the worst kept value out of the tile; -inf marks a column that is spent."""
        place = tl.arange(0, BLOCK_V)[None, :]
        best = tl.max(logits, axis=1)
        worst = tl.min(top_values, axis=1)
        while tl.max((best > worst).to(tl.int32), axis=0) > 0:
            take = (best > worst)[:, None]
            column = tl.argmax(logits, axis=1)  # the lower of equals
            # Among equally bad places the one with the highest id goes: lower ids win ties.
            tied = top_values == worst[:, None]
            last = tl.max(tl.where(tied, top_ids, -1), axis=1)
            here = take & tied & (top_ids == last[:, None])
            top_values = tl.where(here, best[:, None], top_values)
            top_ids = tl.where(here, (first + column)[:, None], top_ids)
            logits = tl.where(take & (place == column[:, None]), -float("inf"), logits)
            best = tl.max(logits, axis=1)
            worst = tl.min(top_values, axis=1)
        return top_values, top_ids

    @triton.jit
    def _scan_kernel(
        h_ptr,  # [N, D] hidden states, unit stride in D
        w_ptr,  # [V, D] head, the dtype of the states, unit stride in D
        b_ptr,  # [V] bias; not read without HAS_BIAS
        sums_ptr,  # [3, N] float32 out: peak, mass, weighted
        broken_ptr,  # [N] int32 out: 1 where a logit is NaN or infinite before the soft cap
        values_ptr,  # [N, BLOCK_K] float32 out, in no order
        ids_ptr,  # [N, BLOCK_K] int32 out
        num_rows, vocab_size, width, h_stride, w_stride, k, scale, softcap, inverse_temperature,
        HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WIDEN: tl.constexpr, LOWEST: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        slots = tl.arange(0, BLOCK_K)[None, :]
        empty = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        # Places beyond K hold +inf and are never the worst. Ids beyond the vocabulary mark empty places.
        top_values = empty + tl.where(slots < k, -float("inf"), float("inf"))
        top_ids = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.int32) + vocab_size + slots
        peak = tl.zeros((BLOCK_N,), dtype=tl.float32) + LOWEST / 4
        mass = tl.zeros((BLOCK_N,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
        broken = tl.zeros((BLOCK_N,), dtype=tl.int32)
        for first in range(0, vocab_size, BLOCK_V):
            columns = first + tl.arange(0, BLOCK_V)
            inside = (columns < vocab_size)[None, :]
            logits = _tile_logits(
                h_ptr, w_ptr, b_ptr, rows, columns, num_rows, vocab_size, width, h_stride, w_stride,
                HAS_BIAS, WIDEN, BLOCK_N, BLOCK_V, BLOCK_D,
            )  # fmt: skip
            bad = (logits != logits) | (tl.abs(logits) == float("inf"))
            broken = tl.maximum(broken, tl.max((inside & bad).to(tl.int32), axis=1))
            logits = logits * scale
            if HAS_SOFTCAP:  # tanh x = 2 sigmoid(2 x) - 1
                logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
            logits = tl.where(inside, logits * inverse_temperature, -float("inf"))

            new_peak = tl.maximum(peak, tl.max(logits, axis=1))
            drop = peak - new_peak
            kept = mass * tl.exp(drop)
            powers = tl.exp(logits - new_peak[:, None])
            exponents = tl.where(powers == 0.0, 0.0, logits - new_peak[:, None])
            weighted = tl.exp(drop) * weighted + kept * drop + tl.sum(powers * exponents, axis=1)
            mass = kept + tl.sum(powers, axis=1)
            peak = new_peak

            ranked = tl.where(inside, tl.maximum(logits, LOWEST), -float("inf"))
            top_values, top_ids = _exchange(ranked, first, top_values, top_ids, BLOCK_V, LOWEST)
        here = rows < num_rows
        tl.store(sums_ptr + rows, peak, mask=here)
        tl.store(sums_ptr + num_rows + rows, mass, mask=here)
        tl.store(sums_ptr + 2 * num_rows + rows, weighted, mask=here)
        tl.store(broken_ptr + rows, broken, mask=here)
        places = rows.to(tl.int64)[:, None] * BLOCK_K + slots
        tl.store(values_ptr + places, top_values, mask=here[:, None])
        tl.store(ids_ptr + places, top_ids, mask=here[:, None])


def columns_of_a_tile(device: torch.device, dtype: torch.dtype) -> int:
    """BLOCK_V or WIDE_BLOCK_V."""
    if dtype.itemsize > 2:
        return BLOCK_V
    if device.type != "cuda":  # The interpreter: the shape that a GPU takes.
        return WIDE_BLOCK_V
    wide = torch.cuda.get_device_capability(device) in WIDE_CAPABILITIES
    return WIDE_BLOCK_V if wide else BLOCK_V


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def scan_head(hidden: Float[Tensor, "N D"], head: Head, k: int, temperature: float) -> Scan:
    """One fused pass over the vocabulary for one model.

    Raises:
        ConfigError: if the kernel cannot run on this input; the message says why.
    """
    if (reason := why_not(hidden.device, hidden.dtype, k)) is not None:
        raise ConfigError(f'impl="triton" cannot run: {reason}; use impl="chunked"')
    num_rows, width = hidden.shape
    if num_rows == 0:
        return start_scan(hidden, k)
    head = head.cast(hidden.dtype)
    hidden, weight = _unit_stride(hidden), _unit_stride(head.weight)
    block_k = triton.next_power_of_2(k)
    device = hidden.device
    sums = torch.empty((3, num_rows), dtype=torch.float32, device=device)
    broken = torch.empty(num_rows, dtype=torch.int32, device=device)
    values = torch.empty((num_rows, block_k), dtype=torch.float32, device=device)
    ids = torch.empty((num_rows, block_k), dtype=torch.int32, device=device)
    _scan_kernel[(triton.cdiv(num_rows, BLOCK_N),)](
        hidden, weight, weight if head.bias is None else head.bias.contiguous(),
        sums, broken, values, ids,
        num_rows, head.vocab_size, width, hidden.stride(0), weight.stride(0), k,
        float(head.scale), float(head.softcap or 1.0), 1.0 / temperature,
        HAS_BIAS=head.bias is not None, HAS_SOFTCAP=head.softcap is not None,
        # Triton 3.9's interpreter multiplies the bit patterns of bfloat16 as integers.
        WIDEN=interpreted() and hidden.dtype == torch.bfloat16, LOWEST=LOWEST,
        BLOCK_N=BLOCK_N, BLOCK_V=columns_of_a_tile(device, hidden.dtype), BLOCK_D=BLOCK_D,
        BLOCK_K=block_k, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    ids, by_id = ids[:, :k].long().sort(dim=-1)
    values = values[:, :k].gather(1, by_id)
    values, by_value = values.sort(dim=-1, descending=True, stable=True)
    return Scan(
        peak=sums[0],
        mass=sums[1],
        weighted=sums[2],
        cross=torch.zeros_like(sums[0]),
        topk_logits=values.masked_fill(values <= LOWEST, -torch.inf),
        topk_ids=ids.gather(1, by_value).clamp_max(head.vocab_size - 1),
        finite=broken == 0,
    )
