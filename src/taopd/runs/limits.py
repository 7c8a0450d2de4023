"""Limits of drift, truncation and logged lists, and likely causes in words, for check, trainer and page."""

from collections.abc import Sequence

from taopd.runs.shares import per_cent

DRIFT_WARN, DRIFT_FAIL = 0.05, 0.2
"""Mean |log p_sampler - log p_recomputed|, nats per token."""
TRUNCATED = 0.1
"""Share of completions that did not end."""
SPREAD_OF_C = 1e-3
"""Between the 10 and the 90 % quantile of C, below which it tells no tokens apart."""
LIST_FLOOR = 5e-4
"""Probability below which an id is left out of a logged list, unless the other model gives it more."""
MOST_PROMPTS = 2000
"""Prompts whose length is looked at before a run, evenly over the dataset; `train` looks at all."""
LARGE_SHARE = 0.2
"""Share of a pair's disagreement from which on it makes a situation of its own."""


_TAUGHT_LAST = "method: reach teaches last, after half of the run and not before step 100"
_OUT_OF_REACH = {
    "reach": _TAUGHT_LAST,
    "anchored": "method: anchored, which holds the student near its start, may keep it from learning",
    "published": f"the default, {_TAUGHT_LAST}",
}
"""What a method does with it."""


def situation_words(
    teachable: float,
    within_reach: float,
    out_of_reach: float,
    foreign_ends: float = 0.0,
    *,
    method: str,
    at_most: bool = False,
) -> str:
    """On what kind of tokens the disagreement lies, and which arm to compare with, in words.

    Args:
        teachable: shares of D, see `taopd.signals.situation`.
        method: of the run; "full": it trains on every token.
        at_most: reach is a lower bound, and the share out of reach an upper one.
    """
    beyond = f"{'at most ' if at_most else ''}{per_cent(out_of_reach, 0)}%"
    own, within = per_cent(teachable, 0), per_cent(within_reach, 0)
    text = (
        f"of the disagreement with the teacher, {own}% is teachable (on tokens where most of the "
        f"teacher's probability is on the student's own top tokens), {within}% is within reach "
        f"(on words that the student may say, but not among its top tokens), {beyond} is out of "
        "reach (it hardly ever says them)"
    )
    if foreign_ends > 0.0:
        ends = per_cent(foreign_ends, 0)
        text += f", {ends}% is on the teacher's own end token (see the stop audit of taopd check)"
    if out_of_reach >= LARGE_SHARE and method != "full":
        text += (
            f". The {beyond} out of reach is what {_OUT_OF_REACH[method]}: full distillation with "
            "a forward KL, which raises such words (selector: full, loss: forward_kl), is the arm to compare "
            "with"
        )
    if within_reach >= LARGE_SHARE and method != "reach":
        text += f". For the {within}% within reach method: reach is the arm to compare with"
    return text


def drift_cause(sampler: str, suspects: Sequence[str] = ()) -> str:
    """The likely cause of a large drift and what to do, in words.

    Args:
        suspects: what is known to change what is sampled, such as "repetition_penalty=1.2".
    """
    if suspects:
        return (
            f"sampling is changed by {', '.join(suspects)}, which scoring does not follow. Take it out of "
            "the settings, generation_kwargs and the student's generation_config.json."
        )
    if sampler == "vLLM":
        return (
            "the sampler holds other weights (a stale adapter, a weight sync that failed) or another dtype. "
            "Restart the server from this student, and compare its dtype and chat template."
        )
    return (
        "sampling and scoring do not compute with the same model: dropout, a stale adapter, or another "
        "dtype in one of them. "
        "Merge or drop the adapter, and set one dtype."
    )


def truncation_cause(*, rising: bool) -> str:
    """The likely cause of many completions without an end and what to do, in words."""
    if rising:
        return (
            "the student is unlearning its end of sequence. See the stop audit of `taopd check`: "
            "stop_tokens: merge where the teacher ends with another id, else an anchor (anchor_coef: 1)."
        )
    return (
        "Many completions are cut before they end. Raise max_completion_length, unless training on openings "
        "is meant; if they repeat themselves, the student's stop ids are wrong."
    )


COMPATIBILITY = {
    "mass": "share of the teacher's probability on the student's top tokens",
    "reach": "share of the teacher's probability on what the initial student could have said",
}


def compatibility_words(name: str) -> str:
    """What C is, by the setting `compatibility`."""
    return COMPATIBILITY.get(name, f"compatibility by {name}")


def entropy_unit(signals: str) -> str:
    """The unit of H, by the setting `signals`: of two top-K lists it is a share of its largest value."""
    return "0 to 1" if signals == "topk_lists" else "nats"


def spread_cause(low: float, high: float, compatibility: str = "mass") -> str:
    """What a C that hardly varies does to the selection and what to do, in words."""
    return (
        f"the compatibility C ({compatibility_words(compatibility)}) is nearly the same everywhere (80 % of "
        f"the tokens have {low:.6g} to {high:.6g}). It is stretched to "
        "[0, 1] all the same, so that tokens with a large disagreement are dropped for a C that is lower "
        "in the fifth digit. Set normalization: none, which takes C as it is, or selector: divergence."
    )
