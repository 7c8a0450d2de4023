"""The lab's variants: how the dialects of teacher and student relate, and which words are graded.

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

No torch here: a lab that is built is found by its name alone.
"""

from dataclasses import dataclass
from typing import Literal

NUM_DIGITS = 3
"""Digits of a summand."""
NUM_ANSWER_DIGITS = NUM_DIGITS + 1
NUM_NUMBERS = 10**NUM_DIGITS
COMPLETION_LENGTH = 2 * NUM_ANSWER_DIGITS + 1
NUM_EXTRA_TOKENS = 4
"""Tokens that a completion may go on for where ending it is part of the task."""
BOS, EOS = "<bos>", "<eos>"

Role = Literal["teacher", "student"]


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
