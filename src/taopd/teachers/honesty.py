"""What a teacher's lists reveal about a server that answers consistently, but wrongly.

    shift        its list at token t fits the student's list at t - 1 or t + 1 better than the one at t
    temperature  log-probs at temperature T are log_softmax(z / T): gaps in a list are 1/T of the true ones
    model        the lists share no more ids than two models without relation would

Related models agree on about a third of their lists, and spread them alike. Without relation nothing can be
said about the temperature.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.models.batch import Positions
from taopd.signals import TokenSignals

FEWEST = 32
"""Tokens that a judgement needs."""
MOST = 4096
"""Tokens that are looked at."""
RELATED = 0.2
"""Share of common ids above which two models are related enough to compare how their lists spread."""
HOT, COLD = 1.75, 0.55
"""Ratios of spread that only another temperature gives: four pairs of 135M models had 0.93 to 1.49."""
CHANGED = 0.2
"""Mean nats by which the same question may be answered otherwise: servers in bfloat16 differ by less."""


class Fault(NamedTuple):
    """What is wrong: the words, and which of the module's three kinds it is."""

    text: str
    kind: Literal["shift", "temperature", "model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of the lists of teacher and student over a micro-batch or more."""

    overlap: dict[int, float]
    """Mean share of common ids between the teacher's list at t + offset and the student's at t."""
    spread_ratio: float
    """Gaps within the student's lists over those within the teacher's: T, if they are related."""
    shifted_by: int
    """The offset at which the lists fit best, where that is certain; else 0."""
    tokens: int

    def fault(self, vocab_size: int, k: int) -> Fault | None:
        """What is wrong with the answers, None if nothing shows."""
        if self.tokens < FEWEST:
            return None
        shares = " / ".join(f"{self.overlap[offset]:.2f}" for offset in (-1, 0, 1))
        if self.shifted_by:
            return Fault(
                f"the teacher answers shifted by {self.shifted_by:+d} token: its lists share {shares} of "
                "their ids with the student's one token before, at, and one token after. Each log-prob "
                "belongs to another token: check the server's version, or the proxy in front of it",
                "shift",
            )
        if self.overlap[0] >= RELATED and not COLD < self.spread_ratio < HOT:
            # A teacher that was sharpened a lot looks the same: `taopd check` fails, a run only warns.
            return Fault(
                f"the teacher answers at a temperature of about {self.spread_ratio:.1f}: the gaps within its "
                f"lists are {1 / self.spread_ratio:.1f} times the student's. Log-probs must be those at "
                "temperature 1: check the server's and any proxy's temperature and log-prob settings",
                "temperature",
            )
        if self.overlap[0] < 2 * min(1.0, k / vocab_size):
            return Fault(
                f"the lists of teacher and student share {self.overlap[0]:.2f} of their ids, no more than "
                "models without relation would: another model or tokenizer may be served",
                "model",
            )
        return None


def agreement(signals: TokenSignals, positions: Positions) -> Agreement:
    """Compare the lists of both models, at the same and at neighboring tokens."""
    count = min(len(positions), MOST)
    row, column = positions.row[:count], positions.column[:count]
    teacher, student = signals.teacher_topk_ids[:count], signals.student_topk_ids[:count]
    here = _shared(teacher, student)
    overlap = {0: float(here.mean()) if count else 0.0}
    shifted_by, best = 0, overlap[0]
    for offset in (-1, 1):
        size = max(0, count - 1)
        first, second = (
            (slice(1, None), slice(size)) if offset < 0 else (slice(size), slice(1, None))
        )
        # `first` is the student's token, `second` the teacher's; both of one completion, next to each other.
        pairs = (row[first] == row[second]) & (column[second] - column[first] == offset)
        there = _shared(teacher[second][pairs], student[first][pairs])
        overlap[offset] = float(there.mean()) if len(there) else 0.0
        gain = there - here[first][pairs]
        # Pairs of the same student token, so that lists which repeat themselves gain nothing.
        error = float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        if len(gain) and float(gain.mean()) > max(5.0 * error, 0.02) and overlap[offset] > best:
            shifted_by, best = offset, overlap[offset]
    spreads = (_spread(signals.student_topk_logprobs), _spread(signals.teacher_topk_logprobs))
    return Agreement(
        overlap=overlap,
        spread_ratio=spreads[0] / max(spreads[1], 1e-6),
        # An answer about the token after is a list that came one place too early.
        shifted_by=shifted_by,
        tokens=count,
    )


class Answer(NamedTuple):
    """Scores of one sequence, on the CPU."""

    logprobs: Float[Tensor, " n"]
    topk_ids: Int[Tensor, "n K"]
    topk_logprobs: Float[Tensor, "n K"]


def changed(before: Answer, now: Answer) -> str:
    """How a second answer to the same question differs from the first; "" if it does not."""
    apart = float((before.logprobs - now.logprobs).abs().mean())
    if apart < CHANGED:
        return ""
    same = float(_shared(now.topk_ids, before.topk_ids).mean())
    ratio = _spread(before.topk_logprobs) / max(_spread(now.topk_logprobs), 1e-6)
    later = now.topk_ids[1:], before.topk_ids[:-1]
    earlier = now.topk_ids[:-1], before.topk_ids[1:]
    shifted = max(
        (float(_shared(*pair).mean()) for pair in (later, earlier) if len(pair[0])), default=0
    )
    kind = "another model"
    if same > 0.9 and not 0.9 < ratio < 1.1:
        kind = f"the same model at a temperature of about {ratio:.1f}"
    elif shifted > max(same, 0.9):
        kind = "the same model, shifted by one token"
    return (
        f"the teacher now answers a question of the first batch otherwise, by {apart:.2f} nats a token: "
        f"it is {kind}. Was the server restarted, or its model or adapter replaced?"
    )


def _shared(one: Int[Tensor, "n K"], other: Int[Tensor, "n K"]) -> Float[Tensor, " n"]:
    """Share of common ids, row by row."""
    same = (one.unsqueeze(2) == other.unsqueeze(1)) & (one >= 0).unsqueeze(2)
    return same.any(2).double().mean(1)


def _spread(logprobs: Float[Tensor, "n K"]) -> float:
    """Mean gap in nats between the best id of a list and the others; 1/T of it at temperature T."""
    listed = logprobs.isfinite()
    gaps = torch.where(listed, logprobs[:, :1] - logprobs, 0.0).double()
    return float(gaps.sum() / (listed.sum() - len(logprobs)).clamp_min(1))
