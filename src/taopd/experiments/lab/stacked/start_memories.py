"""`trainer.remembered_start` for the arms of a stack, from full rows of log-probs."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taopd.losses import drawn_completions
from taopd.signals import StartMemory, TokenSignals, reach_from_shares, sums_from_logprobs, taken
from taopd.signals.reach import counts
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.reach_sums import after_new_words
from taopd.trainer.settings.methods import judges


class Memories:
    """What the arms remember of the initial student; None for one that runs it on all completions.

    Args:
        ends: foreign ends of every arm.
    """

    def __init__(
        self, settings: Sequence[TeachabilityConfig], ends: Sequence[Sequence[int]]
    ) -> None:
        self._settings, self._ends = settings, ends
        self._memories = [
            StartMemory() if judges(args) and args.anchor_responses < 1.0 else None
            for args in settings
        ]

    def __call__(
        self,
        signals: TokenSignals,
        initial: Float[Tensor, "N V"],
        teacher: Float[Tensor, "N V"],
        completion: Int[Tensor, " N"],
        rows: Sequence[slice],
        step: int,
    ) -> TokenSignals:
        """The signals with what is remembered in place of r and log p_S0 where these would not be known.

        Args:
            signals: with both at every token.
        """
        for arm, own in enumerate(rows):
            if self._memories[arm] is None:
                continue
            at = torch.arange(own.start, own.stop)
            full = initial[own], teacher[own]
            reach, logprobs = self._judged(arm, taken(signals, at), *full, completion[own], step)
            assert signals.reach is not None and signals.initial_logprobs is not None
            signals = replace(
                signals,
                reach=signals.reach.index_copy(0, at, reach),
                initial_logprobs=signals.initial_logprobs.index_copy(0, at, logprobs),
            )
        return signals

    def _judged(
        self,
        arm: int,
        signals: TokenSignals,
        initial: Float[Tensor, "n V"],
        teacher: Float[Tensor, "n V"],
        completion: Int[Tensor, " n"],
        step: int,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """r and log p_S0 of one arm's tokens: exact where the initial student runs, else remembered."""
        args, memory, tokens = self._settings[arm], self._memories[arm], signals.token_ids
        reach, exact = signals.reach, signals.initial_logprobs
        student, sampled = signals.student_logprobs, signals.teacher_logprobs
        assert memory is not None and tokens is not None and reach is not None
        assert exact is not None and student is not None and sampled is not None
        here = torch.ones_like(completion, dtype=torch.bool)
        if not memory.empty:
            draw = {"responses": args.anchor_responses, "seed": args.seed, "step": step}
            here = drawn_completions(completion, **draw)
        known = here & ~after_new_words(exact, student, sampled, completion=completion)
        counted = counts(initial[known], args.reach_threshold, (), self._ends[arm])
        memory.add(sums_from_logprobs(counted, teacher[known], tokens[known], exact[known]))
        found = reach_from_shares(teacher, memory.shares())
        said = memory.logprobs(tokens, student)
        return torch.where(here, reach, found), torch.where(here, exact, said)
