"""The items of `taopd check` about a teacher behind a server: who answers, its tokenizer, its divergence.

A server sends no divergence over the full vocabulary: KL(student || teacher) is estimated from the sampled
tokens.
"""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from taopd.models.prompt_rows import read_prompt, render
from taopd.preflight.measure import Measured
from taopd.preflight.verdict import Problems, Verdict, judge
from taopd.teachers.honesty import agreement

if TYPE_CHECKING:
    from taopd.preflight.subject import Subject

TEXTS = 8
"""Prompts whose tokens are compared."""
ONE_MODEL = 1e-4
"""Nats between the log-probs of one model here and on a server."""


def check_answers(subject: "Subject", measured: Measured) -> Verdict:
    """Whether the teacher's lists are of the token they are said to be of, at temperature 1."""
    found = agreement(measured.signals, measured.positions)
    problems, k = Problems(), subject.settings.training.score_top_k
    if (fault := found.fault(subject.trainer.vocab_size, k)) is not None:
        tell = problems.warn if fault.kind == "model" else problems.fail
        tell(f"{fault.text[0].upper()}{fault.text[1:]}.")
    shares = " / ".join(f"{found.overlap[offset]:.2f}" for offset in (-1, 0, 1))
    text = f"common ids {shares} one token before, here, one after; spread ratio {found.spread_ratio:.2f}"
    return judge("server answers", text, problems, figures=asdict(found))


def check_sampled_divergence(subject: "Subject", measured: Measured) -> Verdict:
    """KL(student || teacher) in nats per token, an estimate from the sampled tokens and its error."""
    signals = measured.signals
    assert signals.student_logprobs is not None and signals.teacher_logprobs is not None
    ratio = (signals.student_logprobs - signals.teacher_logprobs).double()
    mean, surprise = float(ratio.mean()), -float(signals.teacher_logprobs.double().mean())
    error = float(ratio.std() / math.sqrt(len(ratio))) if len(ratio) > 1 else math.inf
    problems = Problems()
    if float(ratio.abs().max()) < ONE_MODEL:
        problems.fail(
            "Teacher and student give the same probabilities, so they are one model: check what the "
            "server serves."
        )
    elif surprise > math.log(subject.trainer.vocab_size):
        problems.warn(
            "The teacher does worse on the rollouts than guessing would: another tokenizer or chat "
            "template, another model on the server, or two models with little in common."
        )
    elif mean + 3 * error < 0:
        problems.warn(
            "The estimate is negative, which a KL cannot be: the rollouts are not drawn from the "
            "student at temperature 1 (top_p, top_k, a stale sampler), so the loss is biased."
        )
    figures = {"reverse_nats": mean, "standard_error_nats": error, "tokens": len(ratio)}
    figures["teacher_nll_nats"] = surprise
    text = (
        f"KL(student || teacher) {mean:.2f} +- {error:.2f} nats per token from {len(ratio)} sampled tokens; "
        "KL(teacher || student) is not sent"
    )
    return judge("teacher KL", text, problems, figures=figures)


def check_server(subject: "Subject") -> Verdict:
    """Who answers at `teacher_url`, and whether C is exact or a lower bound."""
    longest = subject.longest_teacher_prompt + subject.settings.training.max_completion_length
    about, context = subject.server.describe(), subject.server.context_length
    problems = Problems()
    if not about["exact"]:
        problems.warn(
            f"C is a lower bound from the teacher's own list, for the whole run ({about['why']}). Raise "
            "score_top_k, or see docs/teachers.md for servers that score the student's ids."
        )
    if context is not None and longest + 1 > context:
        problems.fail(
            f"Sequences of {longest} tokens and the one that it adds do not fit the server's {context}: "
            "start it with a longer --max-model-len, or lower max_completion_length."
        )
    name = " ".join(str(about[key]) for key in ("kind", "version") if key in about)
    kind = "exact" if about["exact"] else "a lower bound"
    measured = f"{name} at {about.get('url', 'no url')}, model {about['model']}; C is {kind}"
    return judge("teacher server", measured, problems, figures=dict(about))


def check_tokens(subject: "Subject") -> Verdict:
    """The server's own tokenizer and the student's on the first prompts."""
    item, student = "server tokens", subject.tokenizer
    rows = list(subject.prompts.select(range(min(TEXTS, len(subject.prompts)))))
    prompts = subject.teacher_prompts.of_rows(rows) or [
        read_prompt(row, f"row {number}") for number, row in enumerate(rows)
    ]
    texts = [render(student, prompt, **subject.shown) for prompt in prompts]
    for text in texts:
        theirs = subject.server.tokenize(text)
        if theirs is None:
            problem = (
                "Compare them by hand: a teacher with other ids gives numbers without meaning."
            )
            return judge(item, "not compared: the server does not tokenize", [("warn", problem)])
        ours = student(text, add_special_tokens=False)["input_ids"]
        if list(ours) != theirs:
            place = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            advice = (
                f"The server makes other ids of a prompt, from token {place} on: {theirs[place : place + 3]} "
                f"where the student has {list(ours[place : place + 3])}. It is another tokenizer: serve a "
                "teacher of the student's family."
            )
            return judge(item, "they differ", [("fail", advice)])
    return judge(item, f"the same ids for {len(texts)} prompts", [])
