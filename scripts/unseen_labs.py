"""Labs beside the nine of the package, on which the default is tried: `scripts.default_method --only NAME`.

`rarewords`, `unknown` and `common` had a part in finding the form of `method: reach`. The others did not:
those of `UNSEEN` were run after an earlier form was fixed, those of `LATER` once, after the present one was.
"""

from taopd.experiments.lab.task import BOS, VARIANTS, Variant

_ECHO = {"synonyms": 8, "markers_echo_digits": True, "answer_pattern": r"(?<=\bt)\d\b"}
FOUND_WITH: tuple[Variant, ...] = (
    # `loanwords`, all of them common, with the teacher of `fallible`.
    Variant(name="common", teacher_share=0.3, rarest_share=1e-3, teacher_fails_from=7),
    # `reversal`, whose words the student wrote ten times more rarely, and never.
    Variant(name="rarewords", teacher_share=1e-3, **_ECHO),
    Variant(name="unknown", **_ECHO),
)
UNSEEN: tuple[Variant, ...] = (
    # `bilingual` with the teacher of `fallible`.
    Variant(name="blindbilingual", teacher_share=0.1, teacher_fails_from=7),
    # `jargon` with the end of `termination`.
    Variant(name="jargonend", teacher_share=0.1, rarest_share=1e-4, teacher_end=BOS, **_ECHO),
    # `dialect` with a student that is unsure of its own words.
    Variant(name="flatdialect", synonyms=8),
)
LATER: tuple[Variant, ...] = (
    # `fallible` with the end of `termination`.
    Variant(name="lapse", teacher_end=BOS, teacher_fails_from=7),
    # `jargon`, all of it common.
    Variant(name="slang", teacher_share=0.3, rarest_share=1e-3, **_ECHO),
    # `signoff`, thirty times more rarely.
    Variant(name="farewell", teacher_share=1e-3, rarest_share=1e-6, teacher_end=BOS),
)


def register() -> None:
    """Make them known to `build_lab`, for this process."""
    VARIANTS.update({variant.name: variant for variant in (*FOUND_WITH, *UNSEEN, *LATER)})
