"""What `method: reach` reads of the initial student where this one runs on some completions alone.

It runs on those in which tokens are held (`anchor_responses`). What it would say in the others is remembered
by token id (`signals.remembered`). In the first generation batch it runs on all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import TrainerCallback

from taopd.kernels import Head
from taopd.losses import drawn_completions
from taopd.models.batch import Positions
from taopd.signals import (
    INITIAL,
    StartMemory,
    TokenSignals,
    reach_by_teacher,
    remembered_reach,
    sums_from_states,
)
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.gather import ranks_of
from taopd.trainer.reach_sums import after_new_words

OfTeacher = tuple[Int[Tensor, " _"] | slice, Float[Tensor, "_ _"], Head]
"""The tokens of a teacher, its states there, and its head."""


class RememberedStart(TrainerCallback):
    """The memory of a run, the same on all processes, with its state in checkpoints.

    Args:
        rule: keyword arguments of `signals.reach_from_states`.
    """

    def __init__(
        self, args: TeachabilityConfig, accelerator: Accelerator, rule: dict[str, Any]
    ) -> None:
        self._args, self._accelerator, self._rule = args, accelerator, rule
        self._ranks = ranks_of(accelerator)
        self._memory = StartMemory()

    def checkpoint_state(self) -> dict[str, Any]:
        """The sums; None before the first batch."""
        return {"sums": self._memory.sums}

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint."""
        sums = state["sums"]
        self._memory = StartMemory(None if sums is None else sums.to(self._accelerator.device))

    def where(self, positions: Positions, step: int) -> Bool[Tensor, " N"]:
        """The positions at which the initial student is to be run; a collective."""
        if self._memory.empty:
            return torch.ones_like(positions.row, dtype=torch.bool)
        return drawn_completions(
            positions.row,
            responses=self._args.anchor_responses,
            seed=self._args.seed,
            step=step,
            ranks=self._ranks,
        )

    def judge(
        self,
        signals: TokenSignals,
        positions: Positions,
        here: Bool[Tensor, " N"],
        initial: tuple[Float[Tensor, "m D"], Head],
        teachers: Sequence[OfTeacher],
    ) -> dict[str, Float[Tensor, " N"]]:
        """r and log p_S0 of every token: exact at the m tokens of `here`, remembered at the others.

        Args:
            initial: the initial student's states at `here`, and its head.
        """
        tokens, (states, head) = signals.token_ids, initial
        students, sampled = signals.student_logprobs, signals.teacher_logprobs
        assert tokens is not None and students is not None and sampled is not None
        numbers, place = torch.arange(len(here), device=here.device), here.long().cumsum(0) - 1
        inside, outside = [], []
        for index, hidden, own in teachers:
            at, run = numbers[index], here[index]
            inside.append((place[at[run]], hidden[run], own))
            outside.append((at[~run], hidden[~run], own))
        # Of the m tokens: exact, and what is remembered of them.
        exact, said = reach_by_teacher(initial, inside, tokens[here], **self._rule)
        known = ~after_new_words(
            said, students[here], sampled[here], completion=positions.row[here]
        )
        sums = torch.zeros(4, head.vocab_size, dtype=torch.float64, device=here.device)
        for index, hidden, own in inside:
            at, teacher = index[known[index]], (hidden[known[index]], own)
            sums += sums_from_states(
                (states[at], head), teacher, tokens[here][at], said[at], **self._rule
            )
        self._memory.add(self._ranks.sums(sums))
        reach, logprobs = torch.zeros_like(sampled), torch.zeros_like(sampled)
        reach[here], logprobs[here] = exact, said
        for at, hidden, own in outside:
            reach[at] = remembered_reach(
                hidden, own, self._memory.shares(), temperature=self._rule["temperature"]
            )
            logprobs[at] = self._memory.logprobs(tokens[at], students[at])
        return {"reach": reach, INITIAL: logprobs}
