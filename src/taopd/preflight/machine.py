"""Does it fit: context, number formats, memory. Plain values in, verdicts out."""

from dataclasses import dataclass

from taopd.preflight.verdict import Problems, Verdict, judge

HALF = ("float16", "bfloat16")
_ROUNDED = {"float16": "0.05 %", "bfloat16": "0.4 %"}
TIGHT = 0.8
"""Share of the memory from which a plan, good to 8 % and without the allocator, is a warning."""


def check_context(
    longest_prompt: int, max_completion_length: int, limits: dict[str, int | None]
) -> Verdict:
    """Prompt and completion against every model's context, in tokens.

    Args:
        longest_prompt: tokens of the longest prompt that was looked at.
        limits: context by whose it is ("student", "teacher", "vllm_max_model_length"); None: no limit.
    """
    needed = longest_prompt + max_completion_length
    known = {name: limit for name, limit in limits.items() if limit is not None}
    problems = Problems()
    for name, limit in known.items():
        if needed > limit:
            problems.fail(
                f"Together {needed} tokens; the limit of {name} is {limit} tokens: lower "
                f"max_completion_length to {max(1, limit - longest_prompt)}, shorten the prompts, or take "
                "a model with more."
            )
    room = ", ".join(f"{name} {limit} tokens" for name, limit in known.items()) or "no limit known"
    measured = (
        f"longest prompt {longest_prompt} tokens, completion up to {max_completion_length} tokens; context: "
        f"{room}"
    )
    figures = {"prompt_tokens": longest_prompt, "completion_tokens": max_completion_length}
    return judge("context", measured, problems, figures=figures | known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How a model is held and how it attends."""

    dtype: str
    """Of the weights: "float32", "bfloat16", "float16"."""
    attention: str
    """As transformers names it: sdpa, eager, flash_attention_2, ..."""


def check_precision(
    student: Precision, teacher: Precision | None, *, autocast: str | None, trains_weights: bool
) -> Verdict:
    """Number formats and attention of both models.

    Args:
        teacher: None if it is outside of this process, which does not say.
        autocast: dtype of the matmuls where `bf16` or `fp16` is set.
        trains_weights: the student's own weights move (no adapters).
    """
    problems = Problems()
    held = [student] if teacher is None else [student, teacher]
    computes = [autocast or model.dtype for model in held]
    if computes[0] != computes[-1]:
        problems.warn(
            f"The student computes in {computes[0]}, the teacher in {computes[-1]}: part of what they "
            "disagree about is rounding. Load both with one dtype, or set bf16: true for both."
        )
    if trains_weights and student.dtype in HALF:
        problems.warn(
            f"The student's weights are {student.dtype}: updates below {_ROUNDED[student.dtype]} of a "
            "weight are rounded away, and learning rates of 1e-6 move little. Set dtype: float32 with "
            "bf16: true."
        )
    if student.attention != held[-1].attention:
        problems.warn(
            f"The student attends with {student.attention}, the teacher with {held[-1].attention}: name "
            "one attn_implementation for both."
        )
    for owner, model, compute in zip(("student", "teacher"), held, computes, strict=False):
        if model.attention.startswith("flash") and compute not in HALF:
            problems.fail(
                f"The {owner}'s {model.attention} needs bfloat16: set bf16: true, or sdpa."
            )
    measured = (
        f"of student / teacher: weights {' / '.join(model.dtype for model in held)}, matmuls "
        f"{' / '.join(computes)}, attention {' / '.join(model.attention for model in held)}"
    )
    if teacher is None:
        measured += "; the teacher is outside of this process and does not say its own"
    figures = {"student": student.dtype, "teacher": teacher and teacher.dtype, "matmuls": computes}
    return judge("precision", measured, problems, figures=figures)


def check_memory(
    peak_mib: float, machine_mib: float, *, device: str, phase: str, sharded: bool
) -> Verdict:
    """The planned peak against what the device has, in MiB.

    Args:
        phase: in which the peak falls, as "while both models score".
        sharded: FSDP or DeepSpeed divide it by something that the plan does not know.
    """
    share = peak_mib / machine_mib
    advice = (
        "Halve per_device_train_batch_size and double gradient_accumulation_steps, set "
        "gradient_checkpointing or gradient_window, or lower max_completion_length; `taopd plan` shows the "
        "parts."
    )
    problems = Problems()
    if share > 1.0:
        tell = problems.warn if sharded else problems.fail
        tell(f"It will not fit. {advice}")
    elif share > TIGHT:
        problems.warn(f"It may not fit: work space of the libraries is not counted. {advice}")
    measured = f"planned peak {peak_mib:,.0f} MiB, {phase}; the machine has {machine_mib:,.0f} MiB ({device})"
    figures = {"peak_mib": round(peak_mib, 1), "machine_mib": round(machine_mib, 1)}
    return judge("memory", measured, problems, figures=figures)
