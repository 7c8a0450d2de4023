"""Drift, stops, divergence, truncation, and how much would train: verdicts on a measured micro-batch.

Each function is one item of `taopd check`. Thresholds are judgement, not measurement: they are set for what
breaks runs, not for what is good. On the tiny lab in float32 a right sampler drifts by 1e-6 nats.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from taopd.preflight.measure import Measured
from taopd.preflight.verdict import Problems, Verdict, judge
from taopd.runs.limits import (
    DRIFT_FAIL,
    DRIFT_WARN,
    SPREAD_OF_C,
    TRUNCATED,
    drift_cause,
    situation_words,
    spread_cause,
    truncation_cause,
)
from taopd.signals import situation

SAME_MODEL = 1e-6
"""Nats of KL below which teacher and student are one model."""
OFF_SUPPORT = 0.8
"""Teacher mass outside the student's top-K."""
FEW_KEPT = 0.5
"""Kept tokens per completion."""
FEW_ENDS = 4
"""Ended completions below which a stop audit is a guess."""
FEW_CUT = 2
"""Completions without an end: a single one of a few says nothing about their share."""
STOPS_ELSEWHERE = 0.5
"""Of the teacher's mass on stop ids at an end, the share on ids where the sampler does not stop."""
GOES_ON = 0.1
"""Teacher mass on all stop ids below which it would write on."""


def check_drift(
    measured: Measured, *, sampler: str, suspects: Sequence[str] = (), bias: str | None = None
) -> Verdict:
    """Sampling log-probs against recomputed ones.

    Args:
        sampler: "transformers" or "vLLM", for the advice.
        suspects: settings that change what is sampled, likewise.
        bias: what is wrong with a loss on sampled tokens, a problem of its own.
    """
    item, found = "drift", measured.drift
    problems = Problems()
    if bias:
        problems.warn(f"The {bias}")
    if found is None:
        problems.warn(
            "The sampler gave no log-prob for each token: it cannot be followed (num_beams, "
            "prompt_lookup_num_tokens), or does not say. Sampling and scoring are not compared."
        )
        return judge(item, "not measured", problems)
    if found.mean > DRIFT_WARN:
        tell = problems.fail if found.mean > DRIFT_FAIL else problems.warn
        tell(f"They should differ by less than {DRIFT_WARN} nats: {drift_cause(sampler, suspects)}")
    figures = {"mean_nats": found.mean, "max_nats": found.largest, "tokens": found.num_tokens}
    text = (
        f"log-probs of sampler and scoring pass differ by {found.mean:.2g} nats a token in the mean, "
        f"{found.largest:.2g} nats at most, over {found.num_tokens} tokens"
    )
    return judge(item, text, problems, figures=figures)


def check_scoring_path(measured: Measured) -> Verdict:
    """Each model's scoring path against its own forward."""
    problems, found = Problems(), measured.agreement
    for name, agreement in found.items():
        if agreement.problem:
            problems.fail(f"The {name} {agreement.problem}")
    text = "log-probs as they are scored here differ from the model's own by at most " + ", ".join(
        f"{a.error:.2g} nats in the {name} (limit {a.bound:g} nats, over {a.tokens} tokens)"
        for name, a in found.items()
    )
    figures = {f"{name}_nats": agreement.error for name, agreement in found.items()}
    return judge("scoring path", text, problems, figures=figures)


def check_stops(
    measured: Measured, *, handled: Sequence[int] = (), untaught: Sequence[int] = ()
) -> Verdict:
    """Both models' mass on every stop id where real rollouts ended.

    Args:
        handled: ids that `stop_tokens` merges into one or excludes.
        untaught: ends of the teacher's that the method never teaches.
    """
    item, num_ends = "stop audit", len(measured.teacher_stops)
    if num_ends == 0:
        problem = (
            f"No completion ended within {measured.max_tokens} tokens, so nothing is known about the "
            "end tokens: see the item truncation."
        )
        return judge(item, "no completion ended", [("warn", problem)])
    student, teacher = measured.student_stops.mean(0), measured.teacher_stops.mean(0)
    ids = list(measured.candidates)
    own = torch.tensor([index in measured.stops for index in ids])
    on_own, on_all = float(teacher[own].sum()), float(teacher.sum())
    problems = Problems()
    best = ids[int(teacher.masked_fill(own, -1.0).argmax())]
    elsewhere = on_all >= GOES_ON and 1.0 - on_own / on_all > STOPS_ELSEWHERE
    note = ""
    if elsewhere and best in untaught:
        note = (
            f"; the teacher ends with {measured.candidates[best]} ({best}), where the sampler does not "
            "stop: method reach never teaches that token, the student ends in its own way"
        )
    elif elsewhere and best not in handled:
        both = sorted({*measured.stops, best})
        cure = f"merge and stop_token_ids: {both} (all of them then count as one end token; not for tool use)"
        if measured.signals.reverse_kl is None:  # a server, which cannot merge
            cure = f"exclude and stop_token_ids: {both} (end tokens then do not train)"
        advice = (
            f"The teacher ends with {measured.candidates[best]} ({best}), where the sampler does not stop: "
            f"the student would unlearn its own end. Set stop_tokens: {cure}."
        )
        tell = problems.fail if num_ends >= FEW_ENDS else problems.warn
        tell(advice)
    elif on_all + measured.teacher_stops_unknown < GOES_ON:
        problems.warn(
            "The teacher would go on where the student ends: read a completion (chat template, length), "
            "or leave the ends out with stop_tokens: exclude."
        )
    shown = [
        (index, measured.candidates[index], float(p), float(q))
        for index, p, q in zip(ids, student, teacher, strict=True)
        if index in measured.stops or max(p, q) >= 0.01
    ]
    parts = ", ".join(f"{name} ({index}) {p:.0%} / {q:.0%}" for index, name, p, q in shown)
    figures: dict[str, Any] = {
        "ends": num_ends,
        "mass": {
            name: {"id": index, "student": p, "teacher": q, "stops": index in measured.stops}
            for index, name, p, q in shown
        },
    }
    text = f"probability of the stop tokens, student / teacher, where {num_ends} completions ended: {parts}"
    if measured.teacher_stops_unknown > 0:
        figures["unknown_mass"] = measured.teacher_stops_unknown
        text += f"; the teacher's as far as its list says, at most {measured.teacher_stops_unknown:.0%} more"
    return judge(item, text + note, problems, figures=figures)


def check_truncation(measured: Measured, *, max_completion_length: int) -> Verdict:
    """Share of completions that reached the length limit without an end."""
    item, num_rows = "truncation", len(measured.ended)
    share = 1.0 - float(measured.ended.float().mean())
    cut = round(share * num_rows)
    text = f"{cut} of {num_rows} completions have no end after {measured.max_tokens} tokens"
    figures = {"truncated_share": share, "completions": num_rows, "tokens": measured.max_tokens}
    problems = Problems()
    if measured.max_tokens < max_completion_length:
        text += f"; not judged, a run allows {max_completion_length}"
    elif share > TRUNCATED and cut >= min(FEW_CUT, num_rows):
        problems.warn(truncation_cause(rising=False))
    return judge(item, text, problems, figures=figures)


def check_divergence(measured: Measured) -> Verdict:
    """KL to the teacher in nats per token, both ways."""
    signals = measured.signals
    assert signals.forward_kl is not None and signals.reverse_kl is not None
    forward, reverse = (
        float(kl.double().mean()) for kl in (signals.forward_kl, signals.reverse_kl)
    )
    problems = Problems()
    if max(forward, reverse) < SAME_MODEL:
        problems.fail(
            "Teacher and student give the same probabilities, so they are one model: check "
            "model_name_or_path and teacher_model_name_or_path."
        )
    if not math.isfinite(reverse):
        problems.fail(
            "The teacher gives probability 0 to tokens that the student writes: check its vocabulary and "
            "dtype."
        )
    figures = {"forward_nats": forward, "reverse_nats": reverse, "tokens": len(signals)}
    text = (
        f"KL(student || teacher) {reverse:.2f} nats per token, KL(teacher || student) {forward:.2f} nats per "
        "token"
    )
    return judge("teacher KL", text, problems, figures=figures)


def check_support(measured: Measured, *, k: int, scaled: bool = False) -> Verdict:
    """Teacher mass off the student's top-K: what this student cannot take from this teacher yet.

    Args:
        scaled: the selection reads C, scaled to the batch: it must vary.
    """
    share = 1.0 - float(measured.signals.compatibility.double().mean())
    at_most = "" if measured.signals.compatibility_is_exact else "at most "
    problems = Problems()
    if share > OFF_SUPPORT:
        problems.warn(
            "Hardly any of the teacher's probability is on tokens that the student considers. Check "
            "tokenizer and template, raise score_top_k, or warm the student up on the teacher's texts."
        )
    ends = measured.signals.compatibility.double().quantile(torch.tensor([0.1, 0.9]).double())
    low, high = ends.tolist()
    if scaled and high - low < SPREAD_OF_C:
        problems.warn(spread_cause(low, high))
    figures = {"off_support_mass": share, "k": k, "c_p10": low, "c_p90": high}
    percent = f"{at_most}{100 * share:.1f} %"
    text = f"{percent} of the teacher's probability is outside the student's top {k} tokens"
    return judge("off support", text, problems, figures=figures)


def check_situation(
    measured: Measured, *, threshold: float, foreign_ends: Sequence[int], method: str
) -> Verdict:
    """On what kind of tokens the disagreement lies; before the first step the student is the initial one."""
    found = situation(measured.signals, threshold=threshold, foreign_ends=foreign_ends).shares
    figures = {f"{name}_share": value for name, value in found._asdict().items()}
    words = situation_words(*found, method=method, at_most=measured.signals.reach is None)
    return judge("situation", words, [], figures=figures)


def check_kept(
    measured: Measured,
    *,
    budget: float,
    min_keep: int,
    max_completion_length: int,
    worth: int | None = None,
) -> Verdict:
    """Tokens that would train, per completion.

    Args:
        worth: under `method: reach`, tokens of all completions that it would select, which may be fewer than
            the budget.
    """
    mean = float(measured.lengths.double().mean())
    kept = max(budget * mean, min(min_keep, mean))
    problems = Problems()
    cut = measured.max_tokens < max_completion_length and not bool(measured.ended.all())
    if kept < FEW_KEPT and not cut:
        problems.warn("Most completions would train nothing: raise budget, or set min_keep: 1.")
    figures = {"kept_tokens": kept, "mean_length_tokens": mean}
    text = f"{kept:.1f} of {mean:.1f} tokens of a completion would train, at a budget of {100 * budget:g} %"
    if worth is not None:
        figures["selected_tokens"] = worth / len(measured.lengths)
        text += f"; reach finds {figures['selected_tokens']:.1f} tokens worth teaching"
        if worth == 0:
            problems.warn(
                "Nothing that the student could say is worth teaching (D below 0.05 nats there): the "
                "run would only hold it where it is. Compare with full distillation (selector: full)."
            )
    if cut:
        text += "; more in a run, as these completions were cut short"
    return judge("kept tokens", text, problems, figures=figures)
