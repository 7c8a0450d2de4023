"""The lab's prompts as one tensor, and the accuracy of every arm of a stack on them."""

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor

from taopd.errors import DataError
from taopd.experiments.arm_settings import Arm, load_problems
from taopd.experiments.evaluation.grading import Grader
from taopd.experiments.lab.stacked.model import Shape, Weights, generate
from taopd.models.prompts import load_tokenizer

ROWS_AT_ONCE = 2_000
"""Completions generated together, over all arms."""


def encoded(arm: Arm, rows: Dataset) -> Int[Tensor, "N P"]:
    """Token ids of the prompts of some rows.

    Raises:
        DataError: if the prompts differ in length.
    """
    ids = load_tokenizer(arm.student)(list(rows["prompt"]))["input_ids"]
    if len({len(prompt) for prompt in ids}) != 1:
        raise DataError(f"{arm.prompts}: a stack needs prompts of one length")
    return torch.tensor(ids)


class Exam:
    """Greedy or sampled accuracy of all arms on the test prompts."""

    def __init__(self, arm: Arm) -> None:
        rows = load_problems(arm)
        self._prompts, self._answers = encoded(arm, rows), list(rows["answer"])
        self._length = arm.config["max_completion_length"]
        self._grade = Grader(arm.match)
        self._tokenizer = load_tokenizer(arm.student)
        self._words = self._tokenizer.convert_ids_to_tokens(range(len(self._tokenizer)))
        self._special = set(self._tokenizer.all_special_ids)

    def __call__(self, shape: Shape, weights: Weights, *, greedy: bool) -> list[float]:
        """Share of right answers, one number an arm; every arm draws with the same uniforms."""
        num_arms, count = len(weights["norm"]), len(self._answers)
        size = max(1, ROWS_AT_ONCE // num_arms)
        right = [0] * num_arms
        for start in range(0, count, size):
            prompts = self._prompts[start : start + size]
            generator = torch.Generator().manual_seed(start)
            noise = torch.rand((len(prompts), self._length), generator=generator)
            completions = generate(
                shape,
                weights,
                prompts.expand(num_arms, -1, -1),
                max_new_tokens=self._length,
                eos_id=self._tokenizer.eos_token_id,
                pad_id=self._tokenizer.pad_token_id,
                uniforms=None if greedy else noise.expand(num_arms, -1, -1),
            )
            answers = self._answers[start : start + size]
            for arm, rows in enumerate(completions.tolist()):
                right[arm] += sum(
                    self._grade(self._text(ids), answer).correct
                    for ids, answer in zip(rows, answers, strict=True)
                )
        return [number / count for number in right]

    def _text(self, ids: list[int]) -> str:
        return " ".join(self._words[index] for index in ids if index not in self._special)
