"""Labs beside the nine of the package, on which the default is tried: `scripts.default_method --only NAME`.

`rarewords`, `unknown`, `common` and `farewell` had a part in finding the form of `method: reach`. The others
did not: those of `UNSEEN` had been run with an earlier form, those of `LATER` were made before a form with
the forward KL was run anywhere, those of `LAST` after the last change but one, and run once before the last.
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
    # `loanwords` with the echo and an end of its own.
    Variant(name="sayings", teacher_share=3e-2, rarest_share=3e-5, teacher_end=BOS, **_ECHO),
)
LAST: tuple[Variant, ...] = (
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
NO_PART = (*UNSEEN, *LATER, *LAST)
"""Those that had no part in finding the form."""


def register() -> None:
    """Make them known to `build_lab`, for this process."""
    VARIANTS.update({variant.name: variant for variant in (*FOUND_WITH, *NO_PART)})
