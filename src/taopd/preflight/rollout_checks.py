"""Drift, stops, divergence, truncation, and how much would train: verdicts on a measured micro-batch.

Each function is one item of `taopd check`. Thresholds are judgement, not measurement: they are set for what
breaks runs, not for what is good. On the tiny lab in float32 a right sampler drifts by 1e-6 nats.
"""

import math
from typing import TYPE_CHECKING, Any

import torch

from taopd.preflight.measure import Measured
from taopd.preflight.remote_teacher import check_sampled_divergence
from taopd.preflight.teacher_error import kept_tokens
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
from taopd.runs.shares import per_cent
from taopd.signals import situation
from taopd.trainer.selection import scales_compatibility
from taopd.trainer.settings.methods import judges, running

if TYPE_CHECKING:
    from taopd.preflight.subject import Subject

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


def check_drift(subject: "Subject", measured: Measured) -> Verdict:
    """Sampling log-probs against recomputed ones."""
    item, found, monitor = "drift", measured.drift, subject.trainer.sampler_monitor
    problems = Problems()
    if monitor.bias:
        problems.warn(f"The {monitor.bias}")
    if found is None:
        problems.warn(
            "The sampler gave no log-prob for each token: it cannot be followed (num_beams, "
            "prompt_lookup_num_tokens), or does not say. Sampling and scoring are not compared."
        )
        return judge(item, "not measured", problems)
    if found.mean > DRIFT_WARN:
        tell = problems.fail if found.mean > DRIFT_FAIL else problems.warn
        cause = drift_cause(monitor.sampler, monitor.suspects)
        tell(f"They should differ by less than {DRIFT_WARN} nats: {cause}")
    figures = {"mean_nats": found.mean, "max_nats": found.largest, "tokens": found.num_tokens}
    text = (
        f"log-probs of sampler and scoring pass differ by {found.mean:.2g} nats a token in the mean, "
        f"{found.largest:.2g} nats at most, over {found.num_tokens} tokens"
    )
    return judge(item, text, problems, figures=figures)


def check_scoring_path(_subject: "Subject", measured: Measured) -> Verdict:
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


def check_stops(subject: "Subject", measured: Measured) -> Verdict:
    """Both models' mass on every stop id where real rollouts ended."""
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
    untaught = judges(subject.settings.training) and best in subject.trainer.foreign_ends
    if elsewhere and untaught:
        note = (
            f"; the teacher ends with {measured.candidates[best]} ({best}), where the sampler does not "
            "stop: method reach never teaches that token, the student ends in its own way"
        )
    elif elsewhere and best not in subject.trainer.stop_ids:  # which are merged or excluded
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
    parts = ", ".join(
        f"{name} ({index}) {per_cent(p, 0)}% / {per_cent(q, 0)}%" for index, name, p, q in shown
    )
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
        unknown = per_cent(measured.teacher_stops_unknown, 0)
        text += f"; the teacher's as far as its list says, at most {unknown}% more"
    return judge(item, text + note, problems, figures=figures)


def check_truncation(subject: "Subject", measured: Measured) -> Verdict:
    """Share of completions that reached the length limit without an end."""
    item, num_rows = "truncation", len(measured.ended)
    share = 1.0 - float(measured.ended.float().mean())
    cut = round(share * num_rows)
    text = f"{cut} of {num_rows} completions have no end after {measured.max_tokens} tokens"
    figures = {"truncated_share": share, "completions": num_rows, "tokens": measured.max_tokens}
    problems, allowed = Problems(), subject.trainer.max_completion_length
    if measured.max_tokens < allowed:
        text += f"; not judged, a run allows {allowed}"
    elif share > TRUNCATED and cut >= min(FEW_CUT, num_rows):
        problems.warn(truncation_cause(rising=False))
    return judge(item, text, problems, figures=figures)


def check_divergence(subject: "Subject", measured: Measured) -> Verdict:
    """KL to the teacher in nats per token, both ways; an estimate where it sends no distribution."""
    signals = measured.signals
    if signals.reverse_kl is None:
        return check_sampled_divergence(subject, measured)
    assert signals.forward_kl is not None
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


def check_support(subject: "Subject", measured: Measured) -> Verdict:
    """Teacher mass off the student's top-K: what this student cannot take from this teacher yet."""
    args = subject.settings.training
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
    # Where the selection reads C, scaled to the batch, it must vary.
    if scales_compatibility(args) and high - low < SPREAD_OF_C:
        problems.warn(spread_cause(low, high))
    figures = {"off_support_mass": share, "k": args.score_top_k, "c_p10": low, "c_p90": high}
    text = (
        f"{at_most}{per_cent(share)} % of the teacher's probability is outside the student's top "
        f"{args.score_top_k} tokens"
    )
    return judge("off support", text, problems, figures=figures)


def check_situation(subject: "Subject", measured: Measured) -> Verdict:
    """On what kind of tokens the disagreement lies; before the first step the student is the initial one."""
    args, ends = subject.settings.training, subject.trainer.foreign_ends
    found = situation(measured.signals, threshold=args.reach_threshold, foreign_ends=ends).shares
    figures = {f"{name}_share": value for name, value in found._asdict().items()}
    at_most = measured.signals.reach is None
    words = situation_words(*found, method=running(args), at_most=at_most)
    return judge("situation", words, [], figures=figures)


def _few(tokens: float) -> str:
    """A mean number of tokens; one digit of what would read 0.0 and is not."""
    return f"{tokens:.1g}" if 0.0 < tokens < 0.05 else f"{tokens:.1f}"


def check_kept(subject: "Subject", measured: Measured) -> Verdict:
    """Tokens that would train, per completion."""
    args, allowed = subject.settings.training, subject.trainer.max_completion_length
    budget = 1.0 if args.selector == "full" else args.budget
    mean = float(measured.lengths.double().mean())
    kept = max(budget * mean, min(args.min_keep, mean))
    problems = Problems()
    cut = measured.max_tokens < allowed and not bool(measured.ended.all())
    if kept < FEW_KEPT and not cut:
        problems.warn("Most completions would train nothing: raise budget, or set min_keep: 1.")
    figures = {"kept_tokens": kept, "mean_length_tokens": mean}
    text = f"{_few(kept)} of {mean:.1f} tokens of a completion would train, at a budget of {100 * budget:g} %"
    if judges(args):
        # Tokens of all completions that reach would select, which may be fewer than the budget.
        worth = int(kept_tokens(subject.trainer, measured.positions, measured.signals).sum())
        figures["selected_tokens"] = worth / len(measured.lengths)
        text += f"; reach finds {_few(figures['selected_tokens'])} tokens worth teaching"
        if worth == 0:
            problems.warn(
                "Nothing that the student could say is worth teaching (D below 0.05 nats there): the "
                "run would only hold it where it is. Compare with full distillation (selector: full)."
            )
    if cut:
        text += "; more in a run, as these completions were cut short"
    return judge("kept tokens", text, problems, figures=figures)
