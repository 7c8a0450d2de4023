"""The items of `taopd check` about a teacher that reads a prompt of its own.

teacher prompt     both prompts of the first row, their lengths, and whether the teacher's fits
teacher context    what its prompt changes: the teacher with it against the teacher with the student's prompt
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from taopd.models.batch import TEACHER_PROMPT, Forward, Positions, teacher_side
from taopd.models.context import context_of
from taopd.models.prompt_faults import LOOKED_AT, faults_of_ends, faults_of_kinds
from taopd.models.prompt_rows import Prompt, read_prompt, render
from taopd.models.prompts import encode_prompts
from taopd.models.scoring import Given, score_positions
from taopd.models.stop_tokens import declared_ids
from taopd.preflight.tokenizer_checks import difference
from taopd.preflight.verdict import Problems, Verdict, judge
from taopd.teachers import score_remote
from taopd.teachers.protocol import room
from taopd.trainer.build.training_set import TEACHER_BEGUN

if TYPE_CHECKING:
    from taopd.preflight.measure import Measured
    from taopd.preflight.subject import Subject

SAME_CONTEXT = 1e-4
"""Nats per token below which a teacher does not read its prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextEffect:
    """What the teacher's own prompt changes at N completion tokens, nats per token."""

    forward: float | None
    """KL(teacher with its prompt || teacher with the student's); None: a server sends no distribution."""
    reverse: float | None
    gap: float
    """Mean size of the change of the sampled token's log-prob."""
    shift: float
    """Mean of that change: above 0 the teacher likes the student's tokens better with its own prompt."""


def measure_context(
    forward: Forward,
    student: Any,
    teacher: Any,
    batch: Mapping[str, Tensor],
    positions: Positions,
    *,
    remote: bool,
    vocab_size: int,
    k: int,
    reuse: Given | None = None,
    **common: Any,
) -> ContextEffect | None:
    """Score completions with the teacher after both prompts; None where it reads the student's.

    Args:
        reuse: the pass of the teacher with its own prompts; of the student, if the teacher is elsewhere.
            None: it is run.
        common: see `score_positions`.
    """
    if TEACHER_PROMPT[0] not in batch:
        return None
    if not remote:
        # In the student's place: the teacher after its own prompt. In the teacher's: after the student's.
        with_it = teacher_side(batch)
        swapped = {**with_it} | dict(
            zip(TEACHER_PROMPT, (batch["prompt_ids"], batch["prompt_mask"]), strict=True)
        )
        found = score_positions(
            *(forward, teacher, teacher, swapped, positions),
            k=k,
            keep_teacher_hidden=False,
            full_kl=True,
            reuse=reuse,
            **common,
        ).signals
        assert found.student_logprobs is not None and found.teacher_logprobs is not None
        assert found.forward_kl is not None and found.reverse_kl is not None
        change = found.student_logprobs - found.teacher_logprobs
        # `forward_kl` is KL(teacher || student) of the two places: the names turn round.
        both = float(found.reverse_kl.double().mean()), float(found.forward_kl.double().mean())
        return _effect(change, *both)
    plain = {name: value for name, value in batch.items() if name not in TEACHER_PROMPT}
    size, when = common["micro_batch_size"], common["when"]
    after = [
        score_remote(
            *(forward, student, teacher, each, positions),
            micro_batch_size=size,
            vocab_size=vocab_size,
            k=k,
            when=when,
            reuse=reuse,
        ).signals.teacher_logprobs
        for each in (batch, plain)
    ]
    assert after[0] is not None and after[1] is not None
    return _effect(after[0] - after[1], None, None)


def _effect(change: Tensor, forward: float | None, reverse: float | None) -> ContextEffect:
    change = change.double()
    return ContextEffect(
        forward=forward,
        reverse=reverse,
        gap=float(change.abs().mean()),
        shift=float(change.mean()),
    )


def check_effect(_subject: "Subject", measured: "Measured") -> Verdict:
    """Whether the teacher's own prompt changes what it says."""
    problems, found = Problems(), measured.context
    assert found is not None
    size = found.gap if found.forward is None else found.forward
    if size < SAME_CONTEXT:
        problems.warn(
            "The teacher says the same with and without its own prompt: it is the student's prompt, or the "
            "teacher does not read what was added. Look at the item teacher prompt."
        )
    text = (
        f"log-probs of the sampled tokens change by {found.gap:.2f} nats (mean {found.shift:+.2f})"
    )
    if found.forward is not None:
        text = (
            f"KL(with || without) {found.forward:.2f}, KL(without || with) {found.reverse:.2f} nats per "
            f"token; {text}"
        )
    figures = {
        "with_without_nats": found.forward,
        "without_with_nats": found.reverse,
        "change_nats": found.gap,
        "mean_change_nats": found.shift,
        "tokens": len(measured.signals),
    }
    known = {name: value for name, value in figures.items() if value is not None}
    return judge("teacher context", text, problems, figures=known)


def check_prompt(subject: "Subject") -> Verdict:
    """Both prompts of the first row, and whether teacher prompt and completion fit.

    Raises:
        DataError: a row without what the teacher's prompt is made of.
    """
    if subject.remote:
        limit = room(subject.server)
    else:
        # A student that teaches itself has no config beside its own.
        limit = context_of(subject.known_configs.get("teacher", subject.student_config))
    tokenizer, rows = subject.tokenizer, subject.some_rows(LOOKED_AT)
    stop_ids = declared_ids(subject.student_generation_config.eos_token_id)
    shown = subject.shown
    longest = subject.longest_teacher_prompt
    found = subject.teacher_prompts.of_rows(rows) or []
    problems = Problems()
    students = [read_prompt(row, f"row {number}") for number, row in enumerate(rows)]
    faults = faults_of_ends(tokenizer, found, stop_ids=stop_ids, begun=TEACHER_BEGUN, **shown)
    faults += faults_of_kinds(tokenizer, students, found, stop_ids=stop_ids)
    for fault in faults:
        problems.append(("fail" if fault.certain else "warn", fault.text))
    completion = subject.settings.training.max_completion_length
    needed = longest + completion
    if limit is not None and needed > limit:
        problems.fail(
            f"{longest} tokens of a teacher's prompt and {completion} of a completion do not fit the "
            f"teacher's context of {limit}: shorten the prompts, or lower max_completion_length."
        )
    first: list[Prompt] = [students[0], found[0]]
    texts = [render(tokenizer, prompt, **shown) for prompt in first]
    lengths = [len(ids) for ids in encode_prompts(tokenizer, first, **shown)]
    if texts[0] == texts[1]:
        problems.warn(
            "The first row's teacher prompt is the student's prompt: the teacher sees no more."
        )
    most = "no limit known" if limit is None else f"of the {limit} that it takes"
    text = (
        f"row 0: the teacher reads {lengths[1]} tokens, the student {lengths[0]} tokens; with a completion "
        f"the longest has {needed} tokens, {most}"
    )
    figures = {"student": texts[0], "teacher": texts[1], "longest_tokens": longest}
    return judge("teacher prompt", text, problems, figures=figures, difference=difference(*texts))
