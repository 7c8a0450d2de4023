"""Labs beside the nine of the package, on which the default is tried: `scripts.default_method --only NAME`.

`rarewords`, `unknown`, `common`, `farewell` and `sayings` had a part in finding the form of `method: reach`.
The others did not: those of `UNSEEN` had been run with an earlier form, those of `LATER` were made before a
form with the forward KL was run anywhere, those of `BEFORE_SLIPS` before the rule told slips apart, and those
of `LAST` after its last change, and run once.
"""

from taopd.experiments.lab.variants import BOS, VARIANTS, Variant

_ECHO = {"synonyms": 8, "markers_echo_digits": True, "answer_pattern": r"(?<=\bt)\d\b"}
FOUND_WITH: tuple[Variant, ...] = (
    # `loanwords`, all of them common, with the teacher of `fallible`.
    Variant(name="common", teacher_share=0.3, rarest_share=1e-3, teacher_fails_from=7),
    # `reversal`, whose words the student wrote ten times more rarely, and never.
    Variant(name="rarewords", teacher_share=1e-3, **_ECHO),
    Variant(name="unknown", **_ECHO),
    # `signoff`, thirty times more rarely.
    Variant(name="farewell", teacher_share=1e-3, rarest_share=1e-6, teacher_end=BOS),
    # `loanwords` with the echo and an end of its own: until the last change it had no part.
    Variant(name="sayings", teacher_share=3e-2, rarest_share=3e-5, teacher_end=BOS, **_ECHO),
)
UNSEEN: tuple[Variant, ...] = (
    # `bilingual` with the teacher of `fallible`.
    Variant(name="blindbilingual", teacher_share=0.1, teacher_fails_from=7),
    # `jargon` with the end of `termination`.
    Variant(name="jargonend", teacher_share=0.1, rarest_share=1e-4, teacher_end=BOS, **_ECHO),
    # `dialect` with a student that is unsure of its own words.
    Variant(name="flatdialect", synonyms=8),
    # `fallible` with the end of `termination`.
    Variant(name="lapse", teacher_end=BOS, teacher_fails_from=7),
    # `jargon`, all of it common.
    Variant(name="slang", teacher_share=0.3, rarest_share=1e-3, **_ECHO),
)
LATER: tuple[Variant, ...] = (
    # `flatdialect` with the end of `termination`.
    Variant(name="drawl", synonyms=8, teacher_end=BOS),
    # Words that the student hardly said, from the teacher of `fallible`.
    Variant(name="rarefallible", teacher_share=1e-3, teacher_fails_from=7),
)
BEFORE_SLIPS: tuple[Variant, ...] = (
    # `jargon`, a hundred times more rarely.
    Variant(name="argot", teacher_share=1e-3, rarest_share=1e-6, **_ECHO),
    # `farewell` with a student that is unsure of its own words.
    Variant(name="mumble", teacher_share=1e-3, rarest_share=1e-6, synonyms=8, teacher_end=BOS),
    # `farewell` with the teacher of `fallible`.
    Variant(
        name="slip", teacher_share=1e-3, rarest_share=1e-6, teacher_end=BOS, teacher_fails_from=7
    ),
    # `unknown` with the teacher of `fallible`.
    Variant(name="strangers", teacher_fails_from=7, **_ECHO),
)
LAST: tuple[Variant, ...] = (
    # `loanwords` three times more rarely, with a student that is less sure of its own words, and an end.
    Variant(name="patois", teacher_share=1e-2, rarest_share=1e-5, synonyms=4, teacher_end=BOS),
    # `unknown` with an end of its own.
    Variant(name="envoi", teacher_end=BOS, **_ECHO),
    # `reversal` with an end of its own.
    Variant(name="postscript", teacher_share=0.01, teacher_end=BOS, **_ECHO),
    # `common` with an end of its own.
    Variant(
        name="mishap", teacher_share=0.3, rarest_share=1e-3, teacher_fails_from=7, teacher_end=BOS
    ),
)
NO_PART = (*UNSEEN, *LATER, *BEFORE_SLIPS, *LAST)
"""Those that had no part in finding the form."""


def register() -> None:
    """Make them known to `build_lab`, for this process."""
    VARIANTS.update({variant.name: variant for variant in (*FOUND_WITH, *NO_PART)})
