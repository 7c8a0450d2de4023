"""The lab's task: addition of two 3-digit numbers, each answer digit announced by a marker word.

    prompt       3 2 1 + 4 8 9 =                     123 + 984, least significant digit first
    completion   t7 7 t12 0 t1 1 t6 1 <eos>          1107; marker, digit, ..., end

What: everything known in closed form about prompts, completions and answers, as tensors of token
ids. The teacher writes right digits and its own marker words (`t0` .. `t15`). Half of the student's
digits ignore the carry, and its marker words are `s0` .. `s15`. So the disagreement at a digit is
about the order of tokens that the student already considers (learnable), the one at a marker about
tokens that it never writes (incompatible). A marker's number depends on the prompt and on the
position. Models of this size learn the step from one marker to the next but not the first one, a
sum modulo 16: they draw it evenly from their 16 words, so a rollout has one marker of high entropy
and three of almost none.

Why not text from a real corpus: there the right next token, and which disagreement is learnable, is
an opinion; here it is arithmetic. Not here: models, files (see `pretrain`, `build`).
"""

import re
from typing import Literal

import torch
from torch import Tensor

from taopd.experiments.lab.variants import (
    BOS,
    EOS,
    NUM_ANSWER_DIGITS,
    NUM_DIGITS,
    NUM_NUMBERS,
    Variant,
)

MAX_LENGTH = 64
"""Positions of the models: room for a completion that missed its end."""
ECHO_START = 10
"""Number of the first teacher's marker where the others echo digits."""
NUM_MARKERS = 16
"""Marker words of one dialect."""

PLUS_ID, EQUALS_ID = 10, 11
STUDENT_MARKER_ID = 12
TEACHER_MARKER_ID = STUDENT_MARKER_ID + NUM_MARKERS
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(44, 48)
PAD, UNK = "<pad>", "<unk>"

WORDS: tuple[str, ...] = (
    *(str(digit) for digit in range(10)),
    "+",
    "=",
    *(f"s{index}" for index in range(NUM_MARKERS)),
    *(f"t{index}" for index in range(NUM_MARKERS)),
    PAD,
    BOS,
    EOS,
    UNK,
)
"""The vocabulary: the token with id i is `WORDS[i]`, and digit d has id d."""

TokenKind = Literal["digit", "marker", "end", "other"]


def number_digits(numbers: Tensor, count: int = NUM_DIGITS) -> Tensor:
    """Return the decimal digits of `numbers` [N], least significant first, as [N, count].

    Example:
        >>> number_digits(torch.tensor([123]))
        tensor([[3, 2, 1]])
    """
    return numbers[:, None] // 10 ** torch.arange(count) % 10


def sum_digits(left: Tensor, right: Tensor) -> Tensor:
    """Return the digits of the right answer, [N, 4]."""
    return number_digits(left + right, NUM_ANSWER_DIGITS)


def carryless_digits(left: Tensor, right: Tensor) -> Tensor:
    """Return the digits of the answer when every carry is forgotten, [N, 4]; the last one is 0."""
    digits = (number_digits(left) + number_digits(right)) % 10
    return torch.nn.functional.pad(digits, (0, 1))


def teacher_digits(variant: Variant, left: Tensor, right: Tensor) -> Tensor:
    """Return the digits that the teacher writes, [N, 4]: right ones, but for its blind spot."""
    blind = number_digits(left)[:, -1:] >= variant.teacher_fails_from
    return torch.where(blind, carryless_digits(left, right), sum_digits(left, right))


def marker_indices(left: Tensor, right: Tensor) -> Tensor:
    """Return the marker rule, `(3 * sum(a) + sum(b) + 5 * i) mod 16` over digit sums, as [N, 4]."""
    base = 3 * number_digits(left).sum(-1) + number_digits(right).sum(-1)
    return (base[:, None] + 5 * torch.arange(NUM_ANSWER_DIGITS)) % NUM_MARKERS


def prompt_ids(left: Tensor, right: Tensor) -> Tensor:
    """Return the prompts as token ids, [N, 8]."""
    plus = torch.full((len(left), 1), PLUS_ID)
    equals = torch.full((len(left), 1), EQUALS_ID)
    return torch.cat([number_digits(left), plus, number_digits(right), equals], dim=1)


def prompt_text(left: int, right: int) -> str:
    """Return a prompt as text.

    Example:
        >>> prompt_text(123, 984)
        '3 2 1 + 4 8 9 ='
    """
    ids = prompt_ids(torch.tensor([left]), torch.tensor([right]))[0]
    return " ".join(WORDS[index] for index in ids.tolist())


def answer_text(variant: Variant, left: int, right: int) -> str:
    """Return the right answer as the graded text, least significant digit first.

    Example:
        >>> answer_text(VARIANTS["dialect"], 123, 984)
        '7011'
        >>> answer_text(VARIANTS["reversal"], 123, 984)
        '701'
    """
    digits = str(left + right).zfill(NUM_ANSWER_DIGITS)[::-1]
    return digits[:-1] if variant.markers_echo_digits else digits


def is_correct(completion: str, answer: str, pattern: str) -> bool:
    """Say whether the joined matches of `pattern` in `completion` are `answer`."""
    return "".join(re.findall(pattern, completion)) == answer


def teacher_markers(variant: Variant, indices: Tensor, digits: Tensor) -> Tensor:
    """Return the ids of the teacher's markers before each of `digits`, [N, 4]."""
    if variant.markers_echo_digits:
        indices = torch.nn.functional.pad(digits[:, :-1], (1, 0), value=ECHO_START)
    return TEACHER_MARKER_ID + indices


def student_markers(variant: Variant, indices: Tensor, generator: torch.Generator) -> Tensor:
    """Return ids of the student's own markers, [N, 4]; drawn where it has synonyms."""
    jitter = torch.randint(variant.synonyms, indices.shape, generator=generator)
    return STUDENT_MARKER_ID + (indices + jitter) % NUM_MARKERS


def borrowed_shares(variant: Variant, forms: Tensor) -> Tensor:
    """Return the student's training share of each of the teacher's forms (0 .. 15), any shape.

        rarest (largest / rarest)^((rank + 1/2) / 16),   rank = 7 form mod 16

    The 16 ranks are the quantiles of a log-uniform law; 7 is odd, so every form has a rank of its own,
    and neighbours lie far apart.
    """
    if variant.rarest_share is None:
        return torch.full(forms.shape, variant.teacher_share)
    place = (7 * forms % NUM_MARKERS + 0.5) / NUM_MARKERS
    return variant.rarest_share * (variant.teacher_share / variant.rarest_share) ** place


def teacher_completions(
    variant: Variant,
    left: Tensor,
    right: Tensor,
    generator: torch.Generator,
    *,
    rewrite_share: float,
) -> tuple[Tensor, Tensor]:
    """Return what the teacher reads and what it should say next, both [N, 9].

    They differ in the markers: a random `rewrite_share` of those it reads are the student's, all of
    those that it says are its own. This makes it a competent judge of a student's prefix that never
    adopts the student's dialect.
    """
    digits, indices = teacher_digits(variant, left, right), marker_indices(left, right)
    own = teacher_markers(variant, indices, digits)
    rewritten = torch.rand(own.shape, generator=generator) < rewrite_share
    read = torch.where(rewritten, student_markers(variant, indices, generator), own)
    end_id = WORDS.index(variant.teacher_end)
    return _interleave(read, digits, end_id), _interleave(own, digits, end_id)


def student_completions(
    variant: Variant,
    left: Tensor,
    right: Tensor,
    generator: torch.Generator,
    *,
    carryless_share: float,
) -> Tensor:
    """Return the completions that the student learns from, [N, 9]."""
    indices, right_digits = marker_indices(left, right), sum_digits(left, right)
    forgetful = torch.rand(indices.shape, generator=generator) < carryless_share
    digits = torch.where(forgetful, carryless_digits(left, right), right_digits)
    foreign = teacher_markers(variant, indices, digits)
    shares = borrowed_shares(variant, foreign - TEACHER_MARKER_ID)
    borrowed = torch.rand(indices.shape, generator=generator) < shares
    own = student_markers(variant, indices, generator)
    completions = _interleave(torch.where(borrowed, foreign, own), digits)
    if variant.rarest_share is not None and variant.teacher_end != EOS:
        # The end has no forms; the last marker is what it depends on. Drawn aside, from a generator that the
        # batch seeds: everything else is then as in the variant whose ends agree.
        aside = torch.Generator().manual_seed(int((left * NUM_NUMBERS + right).sum()))
        shares = borrowed_shares(variant, indices[:, -1])
        borrowed = torch.rand(shares.shape, generator=aside) < shares
        completions[borrowed, -1] = WORDS.index(variant.teacher_end)
    return completions


def _interleave(markers: Tensor, digits: Tensor, end_id: int = EOS_ID) -> Tensor:
    body = torch.stack([markers, digits], dim=-1).flatten(1)
    return torch.nn.functional.pad(body, (0, 1), value=end_id)


def token_kind(text_token: str) -> TokenKind:
    """Return what role a token plays in a completion.

    Example:
        >>> [token_kind(word) for word in ("7", "t12", "<eos>", "+")]
        ['digit', 'marker', 'end', 'other']
    """
    if text_token == EOS:
        return "end"
    if re.fullmatch(r"\d", text_token):
        return "digit"
    if re.fullmatch(r"[st](\d|1[0-5])", text_token):
        return "marker"
    return "other"
