"""The public scoring functions: one signature, three implementations, checks in front.

"auto" is `triton` for 16-bit states on a GPU, where it was measured 4.6 times as fast as `chunked` with a
seventeenth of its memory (benchmarks/results/accelerator-head__nvidia-h200.json); `chunked` for float32
states, where it is 2.5 times as fast, and on a CPU. An implementation asked for by name runs or raises.
"""

import logging
from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.errors import ConfigError, ShapeError, require_known
from taopd.kernels import chunked, fused, reference
from taopd.kernels.head import Head
from taopd.kernels.scores import PairScores, TopKScores, pair_from_scans, scores_from_scan

IMPLS = ("auto", "reference", "chunked", "triton")

logger = logging.getLogger("taopd.kernels")


@cache
def _choose(device: torch.device, dtype: torch.dtype, k: int, full_kl: bool) -> str:
    """What "auto" means for an input."""
    fused_is_better = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    able = not full_kl and fused.why_not(device, dtype, k) is None
    chosen = "triton" if fused_is_better and able else "chunked"
    _say(chosen, str(dtype).removeprefix("torch."), str(device))
    return chosen


@cache
def _say(chosen: str, dtype: str, device: str) -> None:
    """Once for a number format, whatever else a choice depends on."""
    how = "by a Triton program" if chosen == "triton" else "in blocks, by PyTorch"
    logger.info("logits are computed %s (%s on %s)", how, dtype, device)


def _resolve(impl: str, hidden: Tensor, k: int, *, full_kl: bool = False) -> str:
    require_known("impl", impl, IMPLS)
    if impl != "auto":
        return impl
    if torch.compiler.is_compiling():
        return "chunked"
    return _choose(hidden.device, hidden.dtype, k, full_kl)


def _check(hidden: Tensor, head: Head, target_ids: Tensor, k: int, temperature: float) -> None:
    if hidden.shape[0] != target_ids.shape[0]:
        raise ShapeError(
            f"hidden has {hidden.shape[0]} positions, target_ids {target_ids.shape[0]}; both must agree"
        )
    if hidden.shape[1] != head.weight.shape[1]:
        raise ShapeError(
            f"hidden has width {hidden.shape[1]}, the head {head.weight.shape[1]}; are they of one model?"
        )
    vocab_size = head.weight.shape[0]
    if not 1 <= k <= vocab_size:
        fault = "less than 1" if k < 1 else f"larger than the vocabulary of {vocab_size} ids"
        raise ConfigError(f"score_top_k={k}: {fault}")
    if temperature <= 0:
        raise ConfigError(f"temperature={temperature}: must be greater than 0")


def topk_score(
    hidden: Float[Tensor, "N D"],
    lm_head: Float[Tensor, "V _"] | Head,
    target_ids: Int[Tensor, " _"],
    *,
    k: int,
    temperature: float = 1.0,
    impl: str = "auto",
    want_ids: Int[Tensor, "N W"] | None = None,
) -> TopKScores:
    """Top-K, log-sum-exp, entropy and given ids' log-probs of N positions; nats.

        p = softmax(z / temperature),  z = softcap(scale (W h + b))

    Only `reference` has a gradient; the others detach. A row with a NaN comes out as NaN. A logit of -inf
    (through the bias) is probability 0.

    Args:
        lm_head: a weight, or a `Head` with bias, scale and soft cap, cut to the real ids.
        want_ids: further ids per position whose log-probs are returned.

    Raises:
        ConfigError: if k or temperature is out of range, or `impl` is unknown or cannot run here.
        ShapeError: if lengths or widths disagree.
    """
    head = lm_head if isinstance(lm_head, Head) else Head(weight=lm_head)
    _check(hidden, head, target_ids, k, temperature)
    impl = _resolve(impl, hidden, k)
    if impl == "triton":
        with torch.no_grad():
            scan = fused.scan_head(hidden, head, k, temperature)
            return scores_from_scan(scan, hidden, head, target_ids, want_ids, temperature)
    score = reference.topk_score if impl == "reference" else chunked.topk_score
    return score(hidden, head, target_ids, k=k, temperature=temperature, want_ids=want_ids)


@torch.no_grad()
def probabilities_at(
    hidden: Float[Tensor, "N D"], head: Head, ids: Sequence[int], *, temperature: float = 1.0
) -> Float[Tensor, "N M"]:
    """Probability of the same M ids at every position; float32. Either may be empty."""
    if not len(hidden) or not ids:
        return torch.zeros(len(hidden), len(ids), device=hidden.device)
    wanted = torch.tensor(list(ids), device=hidden.device).expand(len(hidden), -1).contiguous()
    scores = topk_score(
        hidden, head, wanted[:, 0].contiguous(), k=1, temperature=temperature, want_ids=wanted
    )
    assert scores.want_logprobs is not None
    return scores.want_logprobs.exp().float()


def pair_score(
    student_hidden: Float[Tensor, "N Ds"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "_ Dt"],
    teacher_head: Head,
    target_ids: Int[Tensor, " _"],
    *,
    k: int,
    temperature: float = 1.0,
    impl: str = "auto",
    full_kl: bool = False,
) -> PairScores:
    """Both models at N positions, D on the union of their supports, C, and on request both full KLs; nats.

    D, C and the rest as in docs/math.md with both models' true probabilities. A row whose logits are not
    all finite is flagged in `student_finite` or `teacher_finite`, and its values mean nothing.

    Args:
        temperature: divides the logits of both models.
        full_kl: also both KL divergences over the full vocabulary; not in `triton`.

    Raises:
        ConfigError: if k or temperature is out of range, or `impl` is unknown or cannot run here.
        ShapeError: if the heads' vocabularies, lengths or widths disagree.
    """
    num_ids = student_head.weight.shape[0], teacher_head.weight.shape[0]
    if num_ids[0] != num_ids[1]:
        raise ShapeError(
            f"the student's head has {num_ids[0]} ids and the teacher's {num_ids[1]}; cut both to the ids "
            "their tokenizers share"
        )
    if not student_hidden.shape[0] == teacher_hidden.shape[0] == target_ids.shape[0]:
        raise ShapeError(
            f"student_hidden has {student_hidden.shape[0]} positions, teacher_hidden "
            f"{teacher_hidden.shape[0]}, target_ids {target_ids.shape[0]}; all must agree"
        )
    _check(student_hidden, student_head, target_ids, k, temperature)
    _check(teacher_hidden, teacher_head, target_ids, k, temperature)
    impl = _resolve(impl, student_hidden, k, full_kl=full_kl)
    student, teacher = (student_hidden, student_head), (teacher_hidden, teacher_head)
    if impl != "triton":
        score = reference.pair_score if impl == "reference" else chunked.pair_score
        return score(*student, *teacher, target_ids, k=k, temperature=temperature, full_kl=full_kl)
    if full_kl:
        raise ConfigError('impl="triton" has no full-vocabulary KL; use impl="chunked"')
    with torch.no_grad():
        own, other = (fused.scan_head(*model, k, temperature) for model in (student, teacher))
        return pair_from_scans(own, other, student, teacher, target_ids, temperature, full_kl=False)
