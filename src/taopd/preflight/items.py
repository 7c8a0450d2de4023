"""The items of `taopd check`, in order: from settings, models and one micro-batch to verdicts.

Everything is loaded when the first item asks for it. What cannot be loaded is a fail of that item; the items
after it that need the same say so in a few words.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from taopd.errors import ConfigError
from taopd.models.context import context_of
from taopd.models.loading import has_adapter
from taopd.models.prompt_faults import LOOKED_AT
from taopd.models.prompt_rows import read_prompt
from taopd.models.stop_tokens import declared_ids
from taopd.preflight import (
    bound_effect,
    machine,
    prompt_checks,
    remote_teacher,
    rollout_checks,
    teacher_context,
    tokenizer_checks,
)
from taopd.preflight.guarded import REFUSED, guarded
from taopd.preflight.measure import Measured
from taopd.preflight.probe import SHARDED
from taopd.preflight.subject import Subject
from taopd.preflight.teacher_error import ITEM as TEACHER_ERROR
from taopd.preflight.teacher_error import check_teacher_error, kept_tokens
from taopd.preflight.verdict import Verdict, judge
from taopd.runs.host_memory import host_bytes
from taopd.trainer.build.from_settings import shared_options
from taopd.trainer.build.loaded_teacher import weights_of
from taopd.trainer.cost import MIB, ModelShape, PlanSettings, check_unpacked, plan
from taopd.trainer.cost.planned_teachers import with_teachers
from taopd.trainer.cost.settings import plan_settings
from taopd.trainer.selection import scales_compatibility
from taopd.trainer.settings.methods import judges, running

_PHASES = {
    "sample": "while completions are sampled",
    "score": "while both models score",
    "train": "in the backward pass",
    "optimizer_step": "in the optimizer's update",
}
"""Phases of a plan, in words."""


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
        yield from _judged(subject, {"memory": _memory}, refusals)


def _checks(subject: Subject) -> dict[str, Callable[[Subject], Verdict]]:
    before = remote_teacher.ITEMS if subject.served else {}
    sampled = {name: partial(_on_rollouts, name) for name in _ON_ROLLOUTS}
    own = teacher_context.ITEMS if subject.has("prompts") and subject.has_teacher_prompts else {}
    if not subject.remote:
        del sampled["server answers"]
    if not subject.remote or not subject.thorough:
        del sampled[bound_effect.ITEM]
    if subject.packing is None:
        del sampled[TEACHER_ERROR]
    if not own:
        del sampled["teacher context"]
    return before | _ITEMS | own | sampled


def _judged(
    subject: Subject, checks: Mapping[str, Callable[[Subject], Verdict]], refusals: set[str]
) -> Iterator[Verdict]:
    for name, check in checks.items():
        verdict = guarded(name, check, subject)
        # One bad row stops several items: the reason is said once.
        if verdict.measured == REFUSED and verdict.advice in refusals:
            verdict = judge(name, "not run", [("fail", "For the same reason as above.")])
        refusals.add(verdict.advice)
        yield verdict


def _tokenizers(subject: Subject) -> Verdict:
    student, teacher = subject.configs
    return tokenizer_checks.check_tokenizers(
        *subject.tokenizers,
        student_rows=student.get_text_config().vocab_size,
        teacher_rows=teacher.get_text_config().vocab_size,
        cut_renamed_control_tokens=subject.settings.training.cut_renamed_control_tokens,
    )


def _special_tokens(subject: Subject) -> Verdict:
    remote, excluded = subject.remote, subject.settings.training.stop_tokens == "exclude"
    cured = subject.merged or (remote and excluded)
    return tokenizer_checks.check_special_tokens(*subject.tokenizers, merged=cured, remote=remote)


def _generation_config(subject: Subject) -> Verdict:
    (student, teacher), configs = subject.tokenizers, subject.generation_configs
    stops = [declared_ids(config.eos_token_id) for config in configs]
    return tokenizer_checks.check_generation_config(
        student, stops[0], teacher, stops[1], merged=subject.merged, remote=subject.remote
    )


def _rendered(check: Callable[..., Verdict], subject: Subject) -> Verdict:
    """A check of the first prompt as both templates render it."""
    prompt = read_prompt(subject.prompts[0], "row 0")
    return check(*subject.tokenizers, prompt, options=subject.template_options)


def _prompts(subject: Subject) -> Verdict:
    """A few rows as their tokens, with the template of the teacher where its files are named."""
    return prompt_checks.check_prompts(
        subject.tokenizer,
        subject.tokenizers[1] if subject.names_teacher else None,
        subject.some_rows(LOOKED_AT),
        options=subject.template_options,
        stop_ids=declared_ids(subject.student_generation_config.eos_token_id),
        tools=subject.tools,
    )


def _context(subject: Subject) -> Verdict:
    args = subject.settings.training
    limits = {owner: context_of(config) for owner, config in subject.known_configs.items()}
    if subject.has_teacher_prompts:  # an item of its own
        limits.pop("teacher", None)
    if args.use_vllm:
        limits["vllm_max_model_length"] = args.vllm_max_model_length
    return machine.check_context(subject.longest_prompt, args.max_completion_length, limits)


def _memory(subject: Subject) -> Verdict:
    args = subject.settings.training
    on_gpu = torch.cuda.is_available() and not args.use_cpu
    try:
        check_unpacked(subject.student_config, "the student")
        student = ModelShape.from_config(subject.student_config)
        teachers = []
        for part in subject.parts.values():
            # One that is elsewhere takes no memory here, whatever its shape.
            config = part.known_configs.get("teacher", part.student_config)
            known = replace(_plan_settings(part), device="gpu" if on_gpu else "cpu")
            if not (known.teacher_elsewhere or known.teacher_quantization):
                check_unpacked(config, "the teacher")
            teachers.append((ModelShape.from_config(config), known, _weights(part)))
        teacher, settings = with_teachers(teachers)
        settings = replace(
            settings,
            prompt_length=subject.longest_prompt,
            teacher_prompt_length=subject.longest_teacher_prompt,
        )
        memory = plan(student, teacher, settings).memory
    except ConfigError as error:  # an architecture or optimizer that the plan does not know
        return judge("memory", "not planned", [("warn", f"{error}.")])
    return machine.check_memory(
        memory.peak / MIB,
        _machine_bytes(on_gpu) / MIB,
        device="GPU" if on_gpu else "CPU",
        phase=_PHASES[max(memory.phases, key=lambda name: memory.phases[name])],
        sharded=bool(args.fsdp or args.deepspeed),
    )


def _weights(subject: Subject) -> Hashable:
    """What tells the teacher's weights from those of others."""
    if subject.has("inputs") and subject.inputs.teacher is not None:
        return id(subject.inputs.teacher)
    settings = subject.settings
    return weights_of(settings.training, shared_options(settings))


def _plan_settings(subject: Subject) -> PlanSettings:
    """With the dtypes of the loaded weights: once they are loaded the settings no longer say."""
    if not subject.has("inputs"):
        return plan_settings(subject.settings)
    student, teacher = subject.inputs.student, subject.inputs.teacher or subject.inputs.student
    settings = plan_settings(
        subject.settings, student_dtype=_dtype(student), teacher_dtype=_dtype(teacher)
    )
    settings = replace(settings, teacher_elsewhere=subject.remote)
    if settings.lora_rank is None and has_adapter(student):  # which goes on training
        adapter = max(student.peft_config.values(), key=lambda config: getattr(config, "r", 0))
        return replace(
            settings,
            lora_rank=getattr(adapter, "r", 0) or None,
            lora_targets=getattr(adapter, "target_modules", None),
        )
    return settings


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _machine_bytes(on_gpu: bool) -> int:
    """What the device has for this process, whoever uses it now."""
    if on_gpu:
        return int(torch.cuda.mem_get_info()[1])
    return host_bytes()


def _precision(subject: Subject) -> Verdict:
    subject.need("inputs")
    args = subject.settings.training
    student = subject.inputs.student
    # The student as its own teacher is held once, or as a copy.
    teacher = subject.inputs.teacher or (student if subject.own_teacher else None)
    held = [
        machine.Precision(
            dtype=_dtype(model),
            attention=str(getattr(model.config, "_attn_implementation", None) or "eager"),
        )
        for model in (student, teacher)
        if model is not None
    ]
    return machine.check_precision(
        held[0],
        held[1] if len(held) == 2 else None,
        autocast="bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        trains_weights=not (subject.settings.model.use_peft or has_adapter(student)),
    )


def _kept(subject: Subject, measured: Measured) -> Verdict:
    args, limit = subject.settings.training, subject.trainer.max_completion_length
    budget, worth = 1.0 if args.selector == "full" else args.budget, None
    if judges(args):
        worth = int(kept_tokens(subject.trainer, measured.positions, measured.signals).sum())
    return rollout_checks.check_kept(
        measured, budget=budget, min_keep=args.min_keep, max_completion_length=limit, worth=worth
    )


def _drift(subject: Subject, measured: Measured) -> Verdict:
    monitor = subject.trainer.sampler_monitor
    return rollout_checks.check_drift(
        measured, sampler=monitor.sampler, suspects=monitor.suspects, bias=monitor.bias
    )


def _context_effect(_subject: Subject, measured: Measured) -> Verdict:
    assert measured.context is not None
    return teacher_context.check_effect(measured.context, len(measured.signals))


_ITEMS: dict[str, Callable[[Subject], Verdict]] = {
    "tokenizers": _tokenizers,
    "special tokens": _special_tokens,
    "generation config": _generation_config,
    "prompts": _prompts,
    "chat template": partial(_rendered, tokenizer_checks.check_chat_template),
    "thinking mode": partial(_rendered, tokenizer_checks.check_thinking),
    "context": _context,
    "memory": _memory,
    "precision": _precision,
}
_ON_ROLLOUTS: dict[str, Callable[[Subject, Measured], Verdict]] = {
    "scoring path": lambda _subject, found: rollout_checks.check_scoring_path(found),
    "drift": _drift,
    "stop audit": lambda subject, found: rollout_checks.check_stops(
        found,
        handled=subject.trainer.stop_ids,
        untaught=subject.trainer.foreign_ends if judges(subject.settings.training) else (),
    ),
    "truncation": lambda subject, found: rollout_checks.check_truncation(
        found, max_completion_length=subject.trainer.max_completion_length
    ),
    "server answers": lambda subject, found: remote_teacher.check_answers(
        found, vocab_size=subject.trainer.vocab_size, k=subject.settings.training.score_top_k
    ),
    bound_effect.ITEM: bound_effect.check_bound,
    "teacher KL": remote_teacher.divergence,
    TEACHER_ERROR: lambda _subject, found: check_teacher_error(found.teacher_error),
    "teacher context": _context_effect,
    "off support": lambda subject, found: rollout_checks.check_support(
        found,
        k=subject.settings.training.score_top_k,
        scaled=scales_compatibility(subject.settings.training),
    ),
    "situation": lambda subject, found: rollout_checks.check_situation(
        found,
        threshold=subject.settings.training.reach_threshold,
        foreign_ends=subject.trainer.foreign_ends,
        method=running(subject.settings.training),
    ),
    "kept tokens": _kept,
}


def _on_rollouts(name: str, subject: Subject) -> Verdict:
    subject.need("trainer")
    if subject.trainer.layout != "replicated":
        return judge(name, "not measured", [("warn", SHARDED)])
    subject.need("measured")
    return _ON_ROLLOUTS[name](subject, subject.measured)
