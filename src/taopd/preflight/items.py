"""The items of `taopd check`, in order: from settings, models and one micro-batch to verdicts.

Everything is loaded when the first item asks for it. What cannot be loaded is a fail of that item; the items
after it that need the same say so in a few words.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from taopd.errors import TaopdError
from taopd.preflight import (
    bound_effect,
    machine,
    prompt_checks,
    remote_teacher,
    rollout_checks,
    teacher_context,
    teacher_error,
    tokenizer_checks,
)
from taopd.preflight.measure import Measured
from taopd.preflight.probe import SHARDED
from taopd.preflight.subject import Missing, Subject, Unnamed
from taopd.preflight.verdict import BROKEN, Verdict, judge
from taopd.trainer.checkpoint.failure import nan_in_sampling

REFUSED = "not measured: these files or settings cannot be used"

Check = Callable[[Subject], Verdict]


def verdicts(subject: Subject) -> Iterator[Verdict]:
    """Judge item by item, cheapest first; of several teachers each on its own prompts, memory for all."""
    refusals: set[str] = set()
    for teacher, part in subject.parts.items():
        checks = _checks(part)
        if teacher:
            del checks["memory"]
        for verdict in _judged(part, checks, refusals):
            yield replace(verdict, item=f"{verdict.item} ({teacher})") if teacher else verdict
    if "" not in subject.parts:
        yield from _judged(subject, {"memory": machine.check_memory}, refusals)


def _checks(subject: Subject) -> dict[str, Check]:
    sampled: dict[str, Check] = {name: partial(_on_rollouts, name) for name in _ON_ROLLOUTS}
    before: dict[str, Check] = {}
    own: dict[str, Check] = {}
    if subject.served:
        before["teacher server"] = remote_teacher.check_server
        before["server tokens"] = remote_teacher.check_tokens
    if subject.has("prompts") and subject.has_teacher_prompts:
        own["teacher prompt"] = teacher_context.check_prompt
    if not subject.remote:
        del sampled["server answers"]
    if not subject.remote or not subject.thorough:
        del sampled[bound_effect.ITEM]
    if subject.packing is None:
        del sampled[teacher_error.ITEM]
    if not own:
        del sampled["teacher context"]
    return before | _ITEMS | own | sampled


def _judged(subject: Subject, checks: Mapping[str, Check], refusals: set[str]) -> Iterator[Verdict]:
    for name, check in checks.items():
        verdict = _guarded(name, check, subject)
        # One bad row stops several items: the reason is said once.
        if verdict.measured == REFUSED and verdict.advice in refusals:
            verdict = judge(name, "not run", [("fail", "For the same reason as above.")])
        refusals.add(verdict.advice)
        yield verdict


def _guarded(name: str, check: Check, subject: Subject) -> Verdict:
    """Run one check; what it refuses is a fail of this check and of no other.

    An item that breaks by a fault of its own says nothing about the pair: a warning, which stops no run.
    """
    try:
        return check(subject)
    except Missing as missing:
        # What a broken item should have made is missing for the same reason: no fault of the user's either.
        cause = missing.__cause__
        refused = isinstance(cause, TaopdError | Missing | Unnamed) or nan_in_sampling(
            cause or missing
        )
        if refused:
            return judge(name, "not run", [("fail", str(missing))])
        return judge(name, BROKEN, [("warn", str(missing))])
    except Unnamed as unnamed:
        return judge(name, "not compared", [("warn", str(unnamed))])
    except TaopdError as error:  # says itself what to do
        return judge(name, REFUSED, [("fail", _line(error))])
    except Exception as error:
        if (what := nan_in_sampling(error)) is not None:
            return judge(name, "not measured", [("fail", f"{what[0].upper()}{what[1:]}.")])
        problem = f"{type(error).__name__}: {_line(error)}"
        return judge(name, BROKEN, [("warn", problem)])


def _line(error: BaseException) -> str:
    """Its words as a sentence: others follow it."""
    words = " ".join(str(error).split())
    return words if words.endswith((".", "?", "!")) else f"{words}."


_ITEMS: dict[str, Check] = {
    "tokenizers": tokenizer_checks.check_tokenizers,
    "special tokens": tokenizer_checks.check_special_tokens,
    "generation config": tokenizer_checks.check_generation_config,
    "prompts": prompt_checks.check_prompts,
    "chat template": tokenizer_checks.check_chat_template,
    "thinking mode": tokenizer_checks.check_thinking,
    "context": machine.check_context,
    "memory": machine.check_memory,
    "precision": machine.check_precision,
}
_ON_ROLLOUTS: dict[str, Callable[[Subject, Measured], Verdict]] = {
    "scoring path": rollout_checks.check_scoring_path,
    "drift": rollout_checks.check_drift,
    "stop audit": rollout_checks.check_stops,
    "truncation": rollout_checks.check_truncation,
    "server answers": remote_teacher.check_answers,
    bound_effect.ITEM: bound_effect.check_bound,
    "teacher KL": rollout_checks.check_divergence,
    teacher_error.ITEM: teacher_error.check_teacher_error,
    "teacher context": teacher_context.check_effect,
    "off support": rollout_checks.check_support,
    "situation": rollout_checks.check_situation,
    "kept tokens": rollout_checks.check_kept,
}


def _on_rollouts(name: str, subject: Subject) -> Verdict:
    subject.need("trainer")
    if subject.trainer.layout != "replicated":
        return judge(name, "not measured", [("warn", SHARDED)])
    subject.need("measured")
    return _ON_ROLLOUTS[name](subject, subject.measured)
