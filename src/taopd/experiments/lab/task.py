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

Nine variants, because a lab in which a method always wins proves nothing:

- `dialect`: the two sets of markers are disjoint, and only the digits are graded.
- `bilingual`: one in ten of the markers that the student learned from is the teacher's.
- `reversal`: a teacher's marker echoes the digit before it in words (`t0` .. `t9`; the first one is
  `t10`), and those words are the graded answer. The student wrote them 1 % of the time, below eight
  equally likely words of its own, so they lie outside its top 4: a selector that avoids off-support
  tokens avoids the answer. Three markers have a digit before them, hence three graded digits.
- `termination`: the teacher ends its answers with another word than the student (`<bos>`, as in
  models whose texts end with the token that begins them), and the sampler stops at the student's
  word alone. Who copies the teacher's ending forgets how to stop, and what it writes after the
  answer is graded too.
- `fallible`: on three prompts in ten (leading digit of the left summand 7, 8 or 9) the teacher
  forgets the carry as well. It is sure of itself there, and its wrong digit is one that the student
  considers, so the disagreement looks as learnable as any.
- `accent`: the student of `bilingual`, the teacher of `termination`.

In three more the student has written each of the teacher's words at a rate of its own, over three decades
and even in the logarithm (`borrowed_shares`), so that no threshold has a gap to lie in:

- `loanwords`: `dialect` with such rates. The words do not matter.
- `jargon`: `reversal` with such rates. The words are the answer.
- `signoff`: `loanwords`, and the student has used the teacher's end too, at a rate that depends on the
  last marker. The end does harm, as in `termination`.

Why not text from a real corpus: there the right next token, and which disagreement is learnable, is
an opinion; here it is arithmetic. Not here: models, files (see `pretrain`, `build`).
Source: design A ("carry and dialect addition") of this project's survey of synthetic tasks.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NUM_DIGITS = 3
"""Digits of a summand."""
NUM_ANSWER_DIGITS = NUM_DIGITS + 1
NUM_NUMBERS = 10**NUM_DIGITS
COMPLETION_LENGTH = 2 * NUM_ANSWER_DIGITS + 1
NUM_EXTRA_TOKENS = 4
"""Tokens that a completion may go on for where ending it is part of the task."""
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
PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"

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

Role = Literal["teacher", "student"]
TokenKind = Literal["digit", "marker", "end", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How the two dialects relate, and which words are graded."""

    name: str
    teacher_share: float = 0.0
    """Share of the student's training markers that are the teacher's."""
    rarest_share: float | None = None
    """Each of the teacher's words has a share of its own, from this one to `teacher_share`; the teacher's
    end as well, where it is not the student's. None: `teacher_share` for every word, no end."""
    synonyms: int = 1
    """Equally likely markers of the student at one position."""
    markers_echo_digits: bool = False
    """A teacher's marker is the word of the digit before it, not of the marker rule."""
    answer_pattern: str = r"\b\d\b"
    """Matches in a completion's text, joined, are compared with the answer."""
    teacher_end: str = EOS
    """The word with which the teacher ends; the sampler stops at `EOS` alone."""
    teacher_fails_from: int = 10
    """The teacher forgets the carry where the left summand's leading digit is at least this."""

    @property
    def max_completion_length(self) -> int:
        """Tokens that a student may write, its end included."""
        extra = NUM_EXTRA_TOKENS if self.teacher_end != EOS else 0
        return COMPLETION_LENGTH + extra


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(name="bilingual", teacher_share=0.1),
        Variant(name="dialect"),
        # One percent: with 2 or 3 % the echo is in the top 4 of a few contexts (up to 0.18), and
        # D * C, which picks just those, learned every echo from them. At this rarity the exact
        # reverse KL on all tokens learns the echoes in 200 steps, its sampled estimate not in 300.
        Variant(
            name="reversal",
            teacher_share=0.01,
            synonyms=8,
            markers_echo_digits=True,
            answer_pattern=r"(?<=\bt)\d\b",
        ),
        Variant(name="termination", teacher_end=BOS),
        Variant(name="fallible", teacher_fails_from=7),
        Variant(name="accent", teacher_share=0.1, teacher_end=BOS),
        Variant(name="loanwords", teacher_share=3e-2, rarest_share=3e-5),
        Variant(
            name="jargon",
            # The student does not learn which digit a word echoes and spreads its share over ten of them.
            teacher_share=1e-1,
            rarest_share=1e-4,
            synonyms=8,
            markers_echo_digits=True,
            answer_pattern=r"(?<=\bt)\d\b",
        ),
        Variant(name="signoff", teacher_share=3e-2, rarest_share=3e-5, teacher_end=BOS),
    )
}


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
