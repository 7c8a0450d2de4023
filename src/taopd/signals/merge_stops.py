"""All ids that end a completion as one token, before D, C and H are computed.

Why: a teacher that stops with another id than the student disagrees with it about nothing that matters; yet
C is 0 and D huge just where the student should learn to stop, or the stop is never selected and termination
is never repaired. Not for tool use, where "end of message" and "end of turn" differ.

Source: arXiv 2609.20511.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.errors import ConfigError
from taopd.kernels import PairScores, TopKScores
from taopd.kernels.scores import compare


def scan_width(k: int, stop_ids: Sequence[int], vocab_size: int) -> int:
    """How many ids a scan must return so that K are left once M stop ids may have become one: K + M - 1.

    Raises:
        ConfigError: if an id is outside the vocabulary, or K exceeds what is left of it.
    """
    outside = [token for token in stop_ids if not 0 <= token < vocab_size]
    if outside:
        raise ConfigError(
            f"stop id {outside[0]} is outside the shared vocabulary of {vocab_size} ids: set stop_token_ids "
            "to ends that both models know, or stop_tokens='train'"
        )
    wide = k + max(0, len(stop_ids) - 1)
    if wide > vocab_size:
        merged = f" with {len(stop_ids)} merged ids" if stop_ids else ""
        raise ConfigError(
            f"score_top_k={k}{merged}: larger than the vocabulary of {vocab_size} ids"
        )
    return wide


def merge_stop_class(
    pair: PairScores,
    student_stops: Float[Tensor, "N M"],
    teacher_stops: Float[Tensor, "N M"],
    target_ids: Int[Tensor, " N"],
    *,
    stop_ids: Sequence[int],
    k: int,
) -> tuple[PairScores, Int[Tensor, " N"]]:
    """The scores of both models if the M stop ids were one token, and the sampled tokens so named.

        p(stop) = sum over M of p(v);   the class bears the first of `stop_ids`

    Exact: `pair` must hold `scan_width` ids per list, of which K are left.

    Args:
        student_stops: log p of the stop ids, in their order.
    """
    inside = target_ids.new_tensor(list(stop_ids))
    stopped = torch.isin(target_ids, inside)
    p, q = student_stops.logsumexp(1), teacher_stops.logsumexp(1)
    forward, reverse = pair.forward_kl, pair.reverse_kl
    if forward is not None and reverse is not None:
        forward = forward + _kl_change(teacher_stops, student_stops, q, p)
        reverse = reverse + _kl_change(student_stops, teacher_stops, p, q)
    merged = compare(
        _merged(pair.student, pair.teacher, student_stops, teacher_stops, inside, stopped, k),
        _merged(pair.teacher, pair.student, teacher_stops, student_stops, inside, stopped, k),
        student_finite=pair.student_finite,
        teacher_finite=pair.teacher_finite,
        forward_kl=forward,
        reverse_kl=reverse,
    )
    return merged, torch.where(stopped, inside[0], target_ids)


def _merged(
    own: TopKScores,
    other: TopKScores,
    own_stops: Tensor,
    other_stops: Tensor,
    inside: Tensor,
    stopped: Tensor,
    k: int,
) -> TopKScores:
    """One model's list with the class in place of its members; its log-probs at the other's list likewise."""
    assert own.want_logprobs is not None
    mass = own_stops.logsumexp(1)
    ids, logprobs, _ = _list(own, own_stops, inside, k)
    _, _, place = _list(other, other_stops, inside, k)
    at_other = torch.cat([own.want_logprobs, mass.unsqueeze(1)], dim=1).gather(1, place)
    probs = own_stops.exp()
    return TopKScores(
        target_logprobs=torch.where(stopped, mass, own.target_logprobs),
        topk_logprobs=logprobs,
        topk_ids=ids,
        logsumexp=own.logsumexp,
        entropy=own.entropy - torch.special.entr(probs).sum(1) + torch.special.entr(mass.exp()),
        want_logprobs=at_other,
    )


def _list(
    scores: TopKScores, stops: Tensor, inside: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and log-probs of the K best once the class is one entry, and their columns; the class's is the
    last of the unmerged list."""
    member = torch.isin(scores.topk_ids, inside)
    mass = stops.logsumexp(1, keepdim=True)
    logprobs = torch.cat([scores.topk_logprobs.masked_fill(member, -torch.inf), mass], dim=1)
    ids = torch.cat([scores.topk_ids, inside[0].expand(len(mass), 1)], dim=1)
    by_id = ids.argsort(dim=1, stable=True)
    best = logprobs.gather(1, by_id).argsort(dim=1, descending=True, stable=True)[:, :k]
    place = by_id.gather(1, best)
    return ids.gather(1, place), logprobs.gather(1, place), place


def _kl_change(own: Tensor, other: Tensor, own_mass: Tensor, other_mass: Tensor) -> Tensor:
    """KL of the merged distributions minus that of the unmerged ones; <= 0."""
    apart = torch.where(own > -torch.inf, own.exp() * (own - other), 0.0).sum(1)
    together = torch.where(own_mass > -torch.inf, own_mass.exp() * (own_mass - other_mass), 0.0)
    return together - apart


def sampled_logprobs(
    logprobs: Float[Tensor, "N V"], token_ids: Int[Tensor, " N"], *, merged_ids: Sequence[int] = ()
) -> Float[Tensor, " N"]:
    """Log-prob of the sampled token; of the whole class where it is one of the merged ids."""
    own = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    if not merged_ids:
        return own
    inside = torch.tensor(merged_ids, device=logprobs.device)
    return torch.where(torch.isin(token_ids, inside), logprobs[:, inside].logsumexp(-1), own)
