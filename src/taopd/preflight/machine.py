"""Does it fit: context, number formats, memory."""

from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from taopd.errors import ConfigError
from taopd.models.context import context_of
from taopd.models.loading import has_adapter
from taopd.preflight.verdict import Problems, Verdict, judge
from taopd.runs.host_memory import host_bytes
from taopd.trainer.build.from_settings import shared_options
from taopd.trainer.build.loaded_teacher import weights_of
from taopd.trainer.cost import MIB, ModelShape, PlanSettings, check_unpacked, plan
from taopd.trainer.cost.planned_teachers import with_teachers
from taopd.trainer.cost.settings import plan_settings

if TYPE_CHECKING:
    from taopd.preflight.subject import Subject

HALF = ("float16", "bfloat16")
_ROUNDED = {"float16": "0.05 %", "bfloat16": "0.4 %"}
TIGHT = 0.8
"""Share of the memory from which a plan, good to 8 % and without the allocator, is a warning."""
_PHASES = {
    "sample": "while completions are sampled",
    "score": "while both models score",
    "train": "in the backward pass",
    "optimizer_step": "in the optimizer's update",
}
"""Phases of a plan, in words."""


def check_context(subject: "Subject") -> Verdict:
    """Prompt and completion against every model's context, in tokens."""
    args = subject.settings.training
    limits = {owner: context_of(config) for owner, config in subject.known_configs.items()}
    if subject.has_teacher_prompts:  # an item of its own
        limits.pop("teacher", None)
    if args.use_vllm:
        limits["vllm_max_model_length"] = args.vllm_max_model_length
    known = {name: limit for name, limit in limits.items() if limit is not None}
    longest, completion = subject.longest_prompt, args.max_completion_length
    needed = longest + completion
    problems = Problems()
    for name, limit in known.items():
        if needed > limit:
            problems.fail(
                f"Together {needed} tokens; the limit of {name} is {limit} tokens: lower "
                f"max_completion_length to {max(1, limit - longest)}, shorten the prompts, or take "
                "a model with more."
            )
    room = ", ".join(f"{name} {limit} tokens" for name, limit in known.items()) or "no limit known"
    measured = (
        f"longest prompt {longest} tokens, completion up to {completion} tokens; context: {room}"
    )
    figures = {"prompt_tokens": longest, "completion_tokens": completion}
    return judge("context", measured, problems, figures=figures | known)


def check_precision(subject: "Subject") -> Verdict:
    """Number formats and attention of both models; a teacher outside of this process does not say its own."""
    subject.need("inputs")
    args, student = subject.settings.training, subject.inputs.student
    # The student as its own teacher is held once, or as a copy.
    teacher = subject.inputs.teacher or (student if subject.own_teacher else None)
    held = [student] if teacher is None else [student, teacher]
    dtypes = [_dtype(model) for model in held]
    attentions = [
        str(getattr(model.config, "_attn_implementation", None) or "eager") for model in held
    ]
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    computes = [autocast or dtype for dtype in dtypes]
    problems = Problems()
    if computes[0] != computes[-1]:
        problems.warn(
            f"The student computes in {computes[0]}, the teacher in {computes[-1]}: part of what they "
            "disagree about is rounding. Load both with one dtype, or set bf16: true for both."
        )
    trains_weights = not (subject.settings.model.use_peft or has_adapter(student))
    if trains_weights and dtypes[0] in HALF:
        problems.warn(
            f"The student's weights are {dtypes[0]}: updates below {_ROUNDED[dtypes[0]]} of a "
            "weight are rounded away, and learning rates of 1e-6 move little. Set dtype: float32 with "
            "bf16: true."
        )
    if attentions[0] != attentions[-1]:
        problems.warn(
            f"The student attends with {attentions[0]}, the teacher with {attentions[-1]}: name "
            "one attn_implementation for both."
        )
    for owner, attention, compute in zip(
        ("student", "teacher"), attentions, computes, strict=False
    ):
        if attention.startswith("flash") and compute not in HALF:
            problems.fail(f"The {owner}'s {attention} needs bfloat16: set bf16: true, or sdpa.")
    measured = (
        f"of student / teacher: weights {' / '.join(dtypes)}, matmuls {' / '.join(computes)}, attention "
        f"{' / '.join(attentions)}"
    )
    if teacher is None:
        measured += "; the teacher is outside of this process and does not say its own"
    figures = {
        "student": dtypes[0],
        "teacher": None if teacher is None else dtypes[1],
        "matmuls": computes,
    }
    return judge("precision", measured, problems, figures=figures)


def check_memory(subject: "Subject") -> Verdict:
    """The planned peak against what the device has, in MiB."""
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
    peak_mib, machine_mib = memory.peak / MIB, _machine_bytes(on_gpu) / MIB
    share = peak_mib / machine_mib
    advice = (
        "Halve per_device_train_batch_size and double gradient_accumulation_steps, set "
        "gradient_checkpointing or gradient_window, or lower max_completion_length; `taopd plan` shows the "
        "parts."
    )
    problems = Problems()
    if share > 1.0:
        # FSDP and DeepSpeed divide it by something that the plan does not know.
        tell = problems.warn if args.fsdp or args.deepspeed else problems.fail
        tell(f"It will not fit. {advice}")
    elif share > TIGHT:
        problems.warn(f"It may not fit: work space of the libraries is not counted. {advice}")
    phase = _PHASES[max(memory.phases, key=lambda name: memory.phases[name])]
    measured = (
        f"planned peak {peak_mib:,.0f} MiB, {phase}; the machine has {machine_mib:,.0f} MiB "
        f"({'GPU' if on_gpu else 'CPU'})"
    )
    figures = {"peak_mib": round(peak_mib, 1), "machine_mib": round(machine_mib, 1)}
    return judge("memory", measured, problems, figures=figures)


def _weights(subject: "Subject") -> Hashable:
    """What tells the teacher's weights from those of others."""
    if subject.has("inputs") and subject.inputs.teacher is not None:
        return id(subject.inputs.teacher)
    settings = subject.settings
    return weights_of(settings.training, shared_options(settings))


def _plan_settings(subject: "Subject") -> PlanSettings:
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
