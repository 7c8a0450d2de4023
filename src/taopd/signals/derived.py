"""Further named signals of a position, and the table that a selector reads.

What: some are fields of `TokenSignals` as they are, others are computed from both models' top-K lists and
the sampled token, and only if someone names them in `needs`: the paper's own selectors pay for none.

A source that lacks what a signal reads (two top-K lists hold no student log-prob at the teacher's ids) makes
that signal an error, never an approximation under the same name.

Notation: p student, q teacher, S and T their top-K sets, y the sampled token; p' is p renormalized on the
support that a formula names.

Source: each function's docstring.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.errors import ConfigError, NumericsError, suggest
from taopd.runs.signal_names import SELECTED_BY
from taopd.signals.types import SignalTable, TokenSignals, compatibility_proxy

LOG_RATIO_CLIP = 30.0
"""Largest |log p - log q| that a variance sees, nats (arXiv 2609.24432)."""
LOGPROB_FLOOR = -12.0
"""Smallest log-prob in `information_to_error_ratio`, nats (arXiv 2609.24432)."""
LARGEST_IER = 1e9
AGREEMENT = 1e-12
"""Variance of the log ratio below which two distributions agree, nats squared."""
ACCEPT_TOP = 5
"""The teacher's list in the acceptance gate (arXiv 2510.24021)."""

ALWAYS = (
    "teacher_entropy",
    "student_logprobs",
    "teacher_logprobs",
    "forward_kl",
    "reverse_kl",
    "overlap",
    "reach",
    "foreign",
    "initial_logprobs",
    "initial_disagreement",
    "initial_compatibility",
)
"""Fields of `TokenSignals` that every table holds, where the source gives them."""
INITIAL_GIVES = frozenset({"reach", "foreign", "initial_logprobs"})
"""What comes of the initial student in training, whatever gives the rest."""
OF_THE_START = frozenset({"initial_disagreement", "initial_compatibility"})
"""What comes of the initial student and of a teacher whose full distribution is at hand."""


def union_logprobs(
    signals: TokenSignals, *, with_sampled: bool
) -> tuple[Float[Tensor, "N U"], Float[Tensor, "N U"], Bool[Tensor, "N U"]]:
    """log p, log q (float64) on S u T, or on S u T u {y}, and which entries count; each id counts once."""
    student_ids, teacher_ids = signals.student_topk_ids, signals.teacher_topk_ids
    assert signals.student_at_teacher_ids is not None
    assert signals.teacher_at_student_ids is not None
    only_teacher = ~(teacher_ids.unsqueeze(2) == student_ids.unsqueeze(1)).any(2)
    only_teacher &= teacher_ids >= 0
    log_p = [signals.student_topk_logprobs, signals.student_at_teacher_ids]
    log_q = [signals.teacher_at_student_ids, signals.teacher_topk_logprobs]
    counts = [torch.ones_like(only_teacher), only_teacher]
    if with_sampled:
        assert signals.token_ids is not None
        assert signals.student_logprobs is not None and signals.teacher_logprobs is not None
        sampled = signals.token_ids.unsqueeze(1)
        log_p.append(signals.student_logprobs.unsqueeze(1))
        log_q.append(signals.teacher_logprobs.unsqueeze(1))
        known = (student_ids == sampled).any(1) | (teacher_ids == sampled).any(1)
        counts.append(~known.unsqueeze(1))
    return torch.cat(log_p, 1).double(), torch.cat(log_q, 1).double(), torch.cat(counts, 1)


def log_ratio_variance(signals: TokenSignals) -> Float[Tensor, " N"]:
    """Var_p'[log q - log p] on S u T, nats squared: the Fisher energy of the reverse KL's natural gradient.

    Log ratios are clipped to +-30. Zero iff q is proportional to p there. Source: PGT; it is also the
    numerator of `information_to_error_ratio` (arXiv 2609.24432).
    """
    log_p, log_q, counts = union_logprobs(signals, with_sampled=False)
    weight = log_p.masked_fill(~counts, -torch.inf).softmax(1)
    ratio = _clipped_ratio(log_p, log_q, counts)
    return _variance(weight, ratio)


def information_to_error_ratio(signals: TokenSignals) -> Float[Tensor, " N"]:
    """IER: squared mean over mean squared error of the one-sample gradient of the reverse KL.

        IER = Var_p'[r] / (E_p'[(r - b)^2 L] - Var_p'[r]),   r = log p - log q,  L = (1 - p') / p',
        b = E_p'[r L] / E_p'[L]

    on S u T u {y}, log-probs floored at -12 and r clipped to +-30, in the Fisher norm of the logits. 0 where
    the two agree; at most 1e9, which two ids reach: their gradient has no error at the best baseline b.
    1 / IER is the relative error of the estimate. Source: arXiv 2609.24432.
    """
    log_p, log_q, counts = union_logprobs(signals, with_sampled=True)
    log_p, log_q = log_p.clamp_min(LOGPROB_FLOOR), log_q.clamp_min(LOGPROB_FLOOR)
    weight = log_p.masked_fill(~counts, -torch.inf).softmax(1)
    ratio = _clipped_ratio(log_p, log_q, counts)
    information = _variance(weight, ratio)
    unlikely = torch.where(counts, 1.0 - weight, 0.0)  # p' L
    baseline = (ratio * unlikely).sum(1) / unlikely.sum(1).clamp_min(torch.finfo(ratio.dtype).tiny)
    second_moment = ((ratio - baseline.unsqueeze(1)) ** 2 * unlikely).sum(1)
    error = second_moment - information
    bounded = torch.maximum(error, information / LARGEST_IER)
    # At agreement both are rounding errors around 0.
    return torch.where(information > AGREEMENT, information / bounded, 0.0)


def corrective_mass(signals: TokenSignals) -> Float[Tensor, " N"]:
    """Mass that the teacher would move onto the student's support: sum over S of max(q - p, 0), in [0, 1].

    Unlike C it does not count mass that the student already has. Source: RAC (the reachable part of total
    variation), as collected in the survey of the field.
    """
    assert signals.teacher_at_student_ids is not None
    q, p = signals.teacher_at_student_ids.double(), signals.student_topk_logprobs.double()
    return (q.exp() - p.exp()).clamp_min(0.0).sum(1)


def teacher_margin(signals: TokenSignals) -> Float[Tensor, " N"]:
    """How far the teacher prefers one of the student's top-K ids to all others: q1 - q2, in [0, 1].

    q1 and q2 are the two largest of the teacher's probabilities on S, renormalized there; 1 for K = 1. The
    teacher tells the student's candidates apart where it is large. Source: the margin over the student's
    top-K of arXiv 2605.13643; that paper's own definition may differ.
    """
    assert signals.teacher_at_student_ids is not None
    q = signals.teacher_at_student_ids.double().softmax(1)
    if q.shape[1] == 1:
        return torch.ones_like(q[:, 0])
    first, second = q.topk(2, dim=1).values.unbind(1)
    return first - second


def student_top1_accepted(signals: TokenSignals) -> Float[Tensor, " N"]:
    """1 where the student's first id is among the teacher's first five (K of them, if fewer), else 0.

    Source: SelecTKD, arXiv 2510.24021.
    """
    first = signals.student_topk_ids[:, :1]
    return (signals.teacher_topk_ids[:, :ACCEPT_TOP] == first).any(1).double()


_LISTS = ("student_topk_ids", "teacher_topk_ids")
_CROSS = ("student_at_teacher_ids", "teacher_at_student_ids")
_SAMPLED = ("token_ids", "student_logprobs", "teacher_logprobs")

COMPUTED: dict[str, tuple[Callable[[TokenSignals], Tensor], tuple[str, ...]]] = {
    "corrective_mass": (corrective_mass, ("teacher_at_student_ids",)),
    "ier": (information_to_error_ratio, (*_CROSS, *_SAMPLED)),
    "log_ratio_variance": (log_ratio_variance, _CROSS),
    "student_top1_accepted": (student_top1_accepted, _LISTS),
    "teacher_margin": (teacher_margin, ("teacher_at_student_ids",)),
}
"""Signals made on demand: function, and the fields of `TokenSignals` that it reads."""

KNOWN_SIGNALS = tuple(sorted((*ALWAYS, "mass", *COMPUTED)))
"""Every name that a table's `extra` may hold."""

_READS = {name: (name,) for name in ALWAYS} | {name: reads for name, (_, reads) in COMPUTED.items()}


def _without(*absent: str) -> frozenset[str]:
    return frozenset(
        {name for name, reads in _READS.items() if not {*absent} & {*reads}} | {"mass"}
    )


LISTS_GIVE = _without(
    *INITIAL_GIVES, *OF_THE_START, "forward_kl", "reverse_kl", "student_at_teacher_ids"
)
"""What `lists_from_exact` leaves."""
BOUND_GIVES = _without(*INITIAL_GIVES, *OF_THE_START, "forward_kl", "reverse_kl", *_CROSS)
"""What two lists leave where nobody scored the student's ids with the teacher."""
SERVER_GIVES = _without(
    *INITIAL_GIVES, *OF_THE_START, "forward_kl", "reverse_kl", "teacher_entropy"
)
"""What a teacher leaves that sends its list and the log-probs asked for, not its full distribution."""


def available_signals(signals: TokenSignals) -> frozenset[str]:
    """The further signals that these positions' source can give."""
    return _without(
        *(column.name for column in fields(signals) if getattr(signals, column.name) is None)
    )


def signal_table(
    signals: TokenSignals,
    *,
    completion: Int[Tensor, " N"],
    position: Int[Tensor, " N"],
    valid: Bool[Tensor, " N"],
    compatibility: str = "mass",
    needs: Iterable[str] = (),
) -> SignalTable:
    """Put the columns a selector may read into one float64 table.

    Args:
        needs: further signals that must be there; computed now if they are not always.

    Raises:
        ConfigError: for an unknown signal, or one that this source cannot give.
        NumericsError: if D, C or H of a valid row is NaN or infinite (names the first such row).
    """
    extra = {
        name: value.double() for name in ALWAYS if (value := getattr(signals, name)) is not None
    }
    extra["mass"] = signals.compatibility.double()
    for name in sorted(set(needs) - set(extra)):
        extra[name] = _computed(signals, name)
    table = SignalTable(
        disagreement=signals.disagreement.double(),
        compatibility=compatibility_proxy(signals, compatibility, completion).double(),
        entropy=signals.entropy.double(),
        completion=completion,
        position=position,
        valid=valid,
        extra=extra,
    )
    for name in SELECTED_BY:
        bad = ~getattr(table, name).isfinite() & valid
        if bad.any():
            row = int(bad.nonzero()[0])
            raise NumericsError(
                f"{name} is not finite at completion {int(completion[row])}, position {int(position[row])}; "
                "look for NaN or infinite logits there"
            )
    return table


def _computed(signals: TokenSignals, name: str) -> Float[Tensor, " N"]:
    if name not in KNOWN_SIGNALS:
        raise ConfigError(f"signal {name!r} is unknown.{suggest(name, KNOWN_SIGNALS)}")
    given = available_signals(signals)
    if name not in given:
        _, reads = COMPUTED.get(name, (None, (name,)))
        missing = [read for read in reads if getattr(signals, read) is None]
        if name in INITIAL_GIVES | OF_THE_START:
            raise ConfigError(
                f"signal {name!r} needs the initial student's probabilities, which only training computes: "
                "choose another signal here"
            )
        raise ConfigError(
            f"signal {name!r} reads {', '.join(missing)}, which this source does not give; use exact "
            f"signals (full_kl=True for a full-vocabulary KL). It gives: {', '.join(sorted(given))}"
        )
    return COMPUTED[name][0](signals)


def _clipped_ratio(log_p: Tensor, log_q: Tensor, counts: Tensor) -> Tensor:
    ratio = torch.where(counts & (log_p > -torch.inf), log_p - log_q, 0.0)
    return ratio.clamp(-LOG_RATIO_CLIP, LOG_RATIO_CLIP)


def _variance(weight: Tensor, values: Tensor) -> Tensor:
    mean = (weight * values).sum(1, keepdim=True)
    return (weight * (values - mean) ** 2).sum(1)
