"""What a plan is made for; mirrors the training settings that decide memory and compute."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taopd.errors import ConfigError, check_budget, require
from taopd.models.load_options import current_names
from taopd.trainer.settings.teacher_names import OWN_TEACHERS

if TYPE_CHECKING:
    from taopd.trainer.settings_file import TrainSettings

SHARDINGS = ("ddp", "fsdp2", "zero3")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOST = 10**8
"""Of a count or a length: a plan beyond it is a slip, and its loops would not end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """One device, one optimizer step.

    Raises:
        ConfigError: at construction, for a value outside its range.

    Example:
        >>> settings = PlanSettings(batch=2, prompt_length=128, completion_length=896)
        >>> settings.num_completion_tokens
        1792
    """

    batch: int
    """Completions of a micro-batch, `per_device_train_batch_size`."""
    prompt_length: int
    completion_length: int
    """Tokens; every row is taken to be as long as this."""
    teacher_prompt_length: int | None = None
    """Tokens, where the teacher reads a prompt of its own; None: the student's."""
    own_teacher: str = ""
    """"self" or "self_ema": the student is its own teacher."""
    micro_batches: int = 1
    """`gradient_accumulation_steps`; the generation batch has batch x micro_batches completions."""
    num_iterations: int = 1
    """Optimizer steps per generation batch."""
    budget: float = 0.1
    window: int | None = None
    """`gradient_window`; None: the exact gradient."""
    top_k: int = 16
    dtype: str = "bfloat16"
    """Of the matmuls."""
    student_dtype: str = "float32"
    """Of the stored weights; another one than `dtype` means autocast."""
    teacher_dtype: str = "bfloat16"
    teacher_elsewhere: bool = False
    """It is behind a server: neither its weights nor its compute are here."""
    teacher_quantization: str | None = None
    """"8bit" or "4bit": of its linear layers."""
    teacher_offload: bool = False
    """Its layers are in host memory, and two of them on the device while it scores; not on a CPU."""
    several_teachers: bool = False
    """The student's states of the whole generation batch wait until each of them has scored its own rows."""
    other_teacher_bytes: float = 0.0
    """Weights of the teachers here beside the largest one, which the plan takes to score every row."""
    device: str = "gpu"
    """"cpu" or "gpu": decides the size of the scoring tiles."""
    gradient_checkpointing: bool = False
    padded: bool = True
    """Sequences differ in length, so that attention needs a mask and repeats grouped keys and values."""
    keep_prefix: bool = True
    """With several micro-batches and a window: hold the scoring pass's keys and values of all of them."""
    prefix_memory_mib: int = 8192
    """Up to which they are held; those beyond are computed again."""
    needs_teacher_distribution: bool = True
    anchor_fraction: float = 0.0
    """Share of the unselected tokens that carries the anchor; 0: no anchor."""
    anchor_responses: float = 1.0
    """Share of the completions that the anchored tokens lie in: only these need the reference's forward."""
    reach: bool = False
    """Both heads run once more (`signals.reach`), and what is held is held to the teacher too."""
    guard: bool = False
    """`collapse_guard` holds the frozen copy of the student that the anchor would hold."""
    lora_rank: int | None = None
    lora_targets: str | Collection[str] | None = None
    """As PEFT's `target_modules`; None: its own choice."""
    optimizer_states: int = 2
    """Numbers per trained parameter, in the dtype of the weights: 2 for Adam, 0 for plain SGD."""
    update_norm: bool = True
    """`log_update_norm` holds a copy of the trained weights in the optimizer step."""

    num_ranks: int = 1
    """Processes; batch and micro_batches are those of one of them."""
    sharding: str = "ddp"
    """"ddp": everything on every rank. "fsdp2", "zero3": weights, gradients and optimizer states of the
    student in parts."""
    gather_limit: int = 10_000_000
    """Tokens of all ranks up to which the selection table travels."""

    def __post_init__(self) -> None:
        counts = ("batch", "completion_length", "micro_batches", "num_iterations", "top_k")
        for name in (*counts, "num_ranks", "prompt_length", "teacher_prompt_length"):
            value, least = getattr(self, name), 0 if "prompt" in name else 1
            if value is not None:
                require(least <= value <= MOST, name, value, f"from {least} to {MOST:,}")
        check_budget(self.budget)
        anchored, drawn = self.anchor_fraction, self.anchor_responses
        require(0.0 <= anchored <= 1.0, "anchor_fraction", anchored, "in [0, 1]")
        require(0.0 < drawn <= 1.0, "anchor_responses", drawn, "in (0, 1]")
        require(self.window is None or self.window >= 0, "window", self.window, "0 or more")
        require(self.lora_rank is None or self.lora_rank >= 1, "lora_rank", self.lora_rank, ">= 1")
        choices: dict[str, Collection[str]] = {"sharding": SHARDINGS, "device": ("cpu", "gpu")}
        choices["own_teacher"] = ("", *OWN_TEACHERS)
        choices |= dict.fromkeys(("dtype", "student_dtype", "teacher_dtype"), BYTES)
        for name, known in choices.items():
            value = getattr(self, name)
            require(value in known, name, value, " or ".join(known))

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt_length + self.completion_length

    @property
    def teacher_length(self) -> int:
        """Tokens of a row as the teacher reads it."""
        own = self.teacher_prompt_length
        return self.completion_length + (self.prompt_length if own is None else own)

    @property
    def num_teacher_tokens(self) -> int:
        """Prompt and completion tokens of the generation batch as the teacher reads it."""
        return self.num_rows * self.teacher_length

    @property
    def num_rows(self) -> int:
        """Completions of the generation batch."""
        return self.batch * self.micro_batches

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens of the generation batch."""
        return self.num_rows * self.length

    @property
    def num_completion_tokens(self) -> int:
        return self.num_rows * self.completion_length

    @property
    def anchored_share(self) -> float:
        """Share of the completion tokens that carries the anchor."""
        return self.anchor_fraction * (1.0 - self.budget)

    @property
    def taught_share(self) -> float:
        """Share of the completion tokens that are compared with the teacher."""
        return self.budget + self.anchored_share * self.reach

    @property
    def wanted_share(self) -> float:
        """Share of the completion tokens whose hidden state the loss reads."""
        return self.budget + self.anchored_share

    @property
    def shared_forward(self) -> bool:
        """Without a window the scoring pass is the training forward; see `taopd.trainer.student`."""
        return self.micro_batches == self.num_ranks == self.num_iterations == 1

    @property
    def shards(self) -> int:
        """Parts that the student's weights, gradients and optimizer states are in."""
        return 1 if self.sharding == "ddp" else self.num_ranks

    @property
    def holds_reference(self) -> bool:
        """A frozen copy of the student, for anchor, guard or reach; with an adapter the base model is one."""
        # A teacher `self` is that copy, and counted as the teacher.
        needed = self.anchor_fraction > 0 or self.guard or self.reach
        return needed and self.own_teacher != "self" and self.lora_rank is None

    @property
    def trained_dtype(self) -> str:
        """Of the weights that train, their gradients and the optimizer's states."""
        # PEFT keeps adapters in float32, whatever the model below them is in.
        return self.student_dtype if self.lora_rank is None else "float32"

    @property
    def autocast(self) -> bool:
        return self.dtype != self.student_dtype


def gradient_share(settings: PlanSettings, window: int | None) -> float:
    """Expected share of all positions (prompt included) that carry gradient; uniform random selection.

    A position carries gradient if it or one of the `window` positions after it predicts a wanted token, so
    away from the borders the share is 1 - (1 - wanted)^(window + 1). Clustered selections share their
    windows and cost less.
    """
    if window is None:
        return 1.0
    # The first and the last column that predict a completion token; so many of them, and what keeps none.
    first, last = max(0, settings.prompt_length - 1), settings.length - 2
    num, kept_out = last - first + 1, 1.0 - settings.wanted_share

    def of_up_to(low: int, high: int) -> float:
        """Columns that reach `low`, `low` + 1, ..., `high` of those: a sum of powers, at any length."""
        count = max(0, high - low + 1)
        if kept_out in (0.0, 1.0) or not count:
            return 0.0 if kept_out else float(count)
        return count - (kept_out**low - kept_out ** (high + 1)) / (1.0 - kept_out)

    # Before the first such column a window reaches one more at every column, until it reaches all of them.
    least = max(1, window - first + 1)
    total = of_up_to(least, min(window, num))
    total += max(0, window - max(num, least - 1)) * of_up_to(num, num)
    # From there on it reaches `window` further ones, and fewer where the row ends.
    total += max(0, num - window) * of_up_to(window + 1, window + 1)
    total += of_up_to(1, min(window, num))
    return total / settings.length


DEFAULT_LENGTHS = {"prompt_length": 256, "completion_length": 512}
_OPTIMIZER_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}


def plan_settings(
    parsed: "TrainSettings", *, student_dtype: str | None = None, teacher_dtype: str | None = None
) -> PlanSettings:
    """What a plan reads of the settings of a run.

    Args:
        student_dtype: of the weights, where they are loaded already; likewise the teacher's.
    """
    from taopd.losses import needs_teacher_distribution
    from taopd.trainer.selection import reads_initial

    return settings_of(
        parsed.training,
        parsed.model,
        needs_teacher_distribution=needs_teacher_distribution(parsed.training.loss),
        reads_initial=reads_initial(parsed.training),
        student_dtype=student_dtype,
        teacher_dtype=teacher_dtype,
    )


def settings_of(
    args: Any,
    model: Any,
    *,
    needs_teacher_distribution: bool,
    reads_initial: bool,
    student_dtype: str | None = None,
    teacher_dtype: str | None = None,
) -> PlanSettings:
    """As `plan_settings`, of anything with the fields of a `TeachabilityConfig` and a `ModelConfig`.

    Args:
        needs_teacher_distribution: the loss reads the teacher's full distribution.
        reads_initial: the initial student is run on every completion.
    """
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer not in _OPTIMIZER_STATES:
        raise ConfigError(
            f"optim={optimizer!r}: the plan knows the memory of {', '.join(_OPTIMIZER_STATES)} only; plan "
            "with --optim adamw_torch and correct for the difference"
        )
    for name in ("load_in_4bit", "load_in_8bit", "lora_modules_to_save", "lora_target_parameters"):
        if getattr(model, name, None):
            raise ConfigError(f"the plan does not know the memory of {name}: leave it out here")
    named = args.teacher_model_name_or_path
    own = named if named in OWN_TEACHERS else ""
    names = model.model_name_or_path, named
    student_dtype = student_dtype or _dtype(args.model_init_kwargs, model.dtype, names[0])
    return PlanSettings(
        batch=args.per_device_train_batch_size,
        micro_batches=args.gradient_accumulation_steps,
        num_iterations=args.num_iterations,
        prompt_length=DEFAULT_LENGTHS["prompt_length"],
        completion_length=args.max_completion_length,
        # Of a schedule the dearest step.
        budget=1.0 if args.selector == "full" else max(args.budget, args.budget_end or 0.0),
        window=args.gradient_window,
        keep_prefix=args.prefix_memory_mib > 0 and args.num_iterations == 1,
        prefix_memory_mib=args.prefix_memory_mib,
        top_k=args.score_top_k,
        gather_limit=args.gather_limit,
        dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else student_dtype,
        student_dtype=student_dtype,
        teacher_dtype=student_dtype
        if own
        else teacher_dtype or _dtype(args.teacher_model_init_kwargs, model.dtype, names[1]),
        own_teacher=own,
        teacher_elsewhere=args.teacher_url is not None,
        teacher_quantization=args.teacher_quantization,
        teacher_offload=args.teacher_offload is not None,
        gradient_checkpointing=args.gradient_checkpointing,
        needs_teacher_distribution=needs_teacher_distribution,
        anchor_fraction=args.anchor_fraction
        if args.anchor_coef > 0 or args.method == "reach"
        else 0.0,
        anchor_responses=1.0 if reads_initial and args.method != "reach" else args.anchor_responses,
        reach=reads_initial,
        guard=args.collapse_guard != "off",
        lora_rank=model.lora_r if model.use_peft else None,
        lora_targets=getattr(model, "lora_target_modules", None),
        optimizer_states=_OPTIMIZER_STATES[optimizer],
        update_norm=args.log_update_norm
        or (args.match_update_norm, args.max_update_norm) != (None, None),
    )


def _dtype(init_kwargs: Any, default: str | None, name: str | None) -> str:
    chosen = current_names(init_kwargs).get("dtype", default)
    if chosen == "auto" and os.path.isdir(str(name)):
        from transformers import AutoConfig

        chosen = AutoConfig.from_pretrained(name, trust_remote_code=False).dtype
    return "float32" if chosen in (None, "auto") else str(chosen).removeprefix("torch.")
