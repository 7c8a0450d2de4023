"""The trainer's arguments as they are given: each of a kind that it can take, or refused by name."""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, optim
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback
from transformers.utils.quantization_config import QuantizationConfigMixin

from taopd.errors import ConfigError, require
from taopd.models.loading import has_adapter
from taopd.models.output_head import inside_peft
from taopd.trainer.build.named_optimizer import check_optim, check_schedule
from taopd.trainer.settings.config_checks import check_config
from taopd.trainer.settings.filled import FilledText
from taopd.trainer.settings.number_checks import about
from taopd.trainer.settings.teacher_names import OWN_TEACHERS
from taopd.trainer.settings.unread import say_unread

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

logger = logging.getLogger(__name__)


def given_models(model: Any, teacher: Any) -> tuple[Any, Any]:
    """Student and teacher as they were given, each as `_plain` has it."""
    model, teacher = _plain(model), _plain(teacher)
    if isinstance(teacher, Mapping):
        teacher = {name: _plain(each) for name, each in teacher.items()}
    for name, value in (("model", model), ("teacher_model", teacher)):
        if isinstance(value, str) and not value.strip():
            raise ConfigError(f"{name}={value!r}: must be text that is not empty")
    if not isinstance(model, str):
        require_generation(model)
    return model, teacher


def _plain(given: Any) -> Any:
    """A `Path` as text, and of a compiled model the one inside."""
    # A folder saved from torch.compile's wrapper has other names, and is not loaded again. The step calls
    # backbone and head by themselves, past the compiled forward.
    if (inner := getattr(given, "_orig_mod", None)) is not None:
        logger.warning("torch.compile has no effect: the model inside is taken")
        return inner
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def require_generation(model: Any) -> None:
    """Refuse a student that generates no text."""
    if not hasattr(model, "generation_config"):
        raise ConfigError(
            f"model is a {type(model).__name__}: pass a folder, a hub id or a causal language model"
        )


def name_teacher(args: "TeachabilityConfig", teacher: Any) -> None:
    """Write a teacher that is given by its name into the settings, where server, check and folder read it."""
    named = args.teacher_model_name_or_path
    if named in OWN_TEACHERS and not isinstance(teacher, str | None):
        raise ConfigError(
            f"teacher_model_name_or_path={named!r} and a teacher_model: one of them is the teacher"
        )
    if not isinstance(teacher, str) or teacher == named:
        return
    if named is not None:
        logger.warning(
            "teacher_model=%r is the teacher; teacher_model_name_or_path=%r of the settings is not read",
            teacher,
            named,
        )
    # Filled in: the next trainer with these settings may be given another one.
    args.teacher_model_name_or_path = FilledText(teacher)
    check_config(args)


def check_given(args: "TeachabilityConfig", model: Any, *given: Any) -> None:
    """Refuse a run folder that is a file, and arguments of another kind.

    Args:
        model: the student as it was given.
        given: arguments of the trainer, in the order of `_KINDS`; None: left out.
    """
    if os.path.isfile(args.output_dir):
        raise ConfigError(f"output_dir={args.output_dir!r} is a file; the output must be a folder")
    for (name, (words, fits)), value in zip(_KINDS.items(), given, strict=True):
        # What is left out of the optimizers is a pair too.
        if not fits(value) and (value is not None or name == "optimizers"):
            found = f"not a {type(value).__name__}"
            if isinstance(value, list | tuple):
                kinds = (repr(each) if each is None else type(each).__name__ for each in value)
                found = f"not a {type(value).__name__} of {', '.join(kinds) or 'nothing'}"
            raise ConfigError(f"{name}: must be {words}, {found}")
        # The parameters of a model that is loaded later are nobody's yet.
        if name == "optimizers":
            check_optimizer(value[0], [] if isinstance(model, str) else model.parameters())


def check_optimizer(optimizer: Optimizer | None, parameters: Iterable[Tensor]) -> None:
    """Refuse an optimizer that holds none of the parameters."""
    own = {id(each) for each in parameters}
    held = (
        [] if optimizer is None else [each for g in optimizer.param_groups for each in g["params"]]
    )
    if optimizer is not None and own.isdisjoint(map(id, held)):
        raise ConfigError(
            "optimizers: the optimizer holds no parameter of the student that trains: make it of the "
            "parameters of the model that is passed as `model`, with an adapter after "
            "`peft.get_peft_model(model, config)` and without `peft_config`"
        )


def check_made(
    args: "TeachabilityConfig", model: Any, optimizer: Optimizer | None, accelerator: Accelerator
) -> None:
    """Refuse what does not fit the student as TRL made it."""
    if args.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
        kind = type(inside_peft(model)).__name__
        raise ConfigError(
            f"gradient_checkpointing=True (the default): {kind} does not support it; set it to False"
        )
    _check_checkpointing(args)
    say_unread(args)
    # Of the model as it is now: an adapter that TRL made has parameters of its own.
    check_optimizer(optimizer, (each for each in model.parameters() if each.requires_grad))
    if optimizer is None and accelerator.distributed_type != DistributedType.DEEPSPEED:
        check_schedule(args)
        check_optim(args, model)
    if has_adapter(model):
        # peft loads a network library.
        from taopd.models.adapters import check_layers, say_unmatched

        check_layers(model)
        say_unmatched(model)
    # DeepSpeed updates float32 copies, FSDP2 makes them under mixed precision.
    kind, mixed = accelerator.distributed_type, accelerator.mixed_precision != "no"
    if kind != DistributedType.DEEPSPEED and not (kind == DistributedType.FSDP and mixed):
        _check_float16(args, model, optimizer)


def _check_checkpointing(args: "TeachabilityConfig") -> None:
    """Refuse keywords that torch refuses in the first backward."""
    name, keywords = "gradient_checkpointing_kwargs", dict(args.gradient_checkpointing_kwargs or {})
    if not args.gradient_checkpointing:
        if keywords:
            logger.warning("%s=%s has no effect without gradient_checkpointing", name, keywords)
        return
    # transformers' own; what is left goes to torch.
    every = keywords.pop("every_n_layers", 1)
    require(type(every) is int and every >= 1, f"{name}: every_n_layers", every, "at least 1")
    offload = keywords.pop("offload", False)
    there = isinstance(offload, bool) and not (offload and args.device.type == "cpu")
    require(there, f"{name}: offload", offload, "false, or true where the run is on a GPU")
    with about(args, name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint(torch.neg, torch.zeros(1, requires_grad=True), **keywords).backward()


def _check_float16(args: "TeachabilityConfig", model: Any, optimizer: Optimizer | None) -> None:
    """Refuse float16 weights that torch's Adam and its like shall train.

    These optimizers keep squared gradients in the dtype of the weights. Below 6e-8 they are 0 in float16, and
    `adam_epsilon` is too: an update is thousands of times too large, or infinite.
    """
    if not any(p.requires_grad and p.dtype == torch.float16 for p in model.parameters()):
        return
    name = str(getattr(args.optim, "value", args.optim))
    keeps_squares = name in _SQUARES_BY_NAME
    if optimizer is not None:
        name = type(optimizer).__name__
        keeps_squares = isinstance(optimizer, _SQUARES_IN_DTYPE_OF_WEIGHTS)
    if keeps_squares:
        raise ConfigError(
            f"the student's weights are float16, where the squared gradients that {name} keeps are 0: its "
            f"updates would be thousands of times too large; {_FLOAT32}"
        )
    if args.fp16:
        raise ConfigError(
            "the student's weights are float16, and the gradient scaler of fp16=True takes no gradient of "
            f"such weights; {_FLOAT32}"
        )


_FLOAT32 = "load it in float32 (dtype: float32), with bf16: true for 16-bit arithmetic"
_SQUARES_BY_NAME = ("adamw_torch", "adamw_torch_fused", "adagrad", "rmsprop")
_SQUARES_IN_DTYPE_OF_WEIGHTS = (
    *(optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax),
    *(optim.Adagrad, optim.Adadelta, optim.RMSprop),
)


def _is_callback(value: Any) -> bool:
    return issubclass(value if isinstance(value, type) else type(value), TrainerCallback)


def _is_pair(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    optimizer, schedule = value
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        return False
    # Also accelerate's wrapper, which is none of torch's schedulers and names no optimizer.
    reads = hasattr(schedule, "get_last_lr") and not isinstance(schedule, type)
    own = optimizer is not None and getattr(schedule, "optimizer", optimizer) is optimizer
    return schedule is None or (reads and own)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "callbacks": (
        "a list, each of it a transformers.TrainerCallback",
        lambda value: isinstance(value, list) and all(map(_is_callback, value)),
    ),
    "optimizers": ("an optimizer of torch or None, and a scheduler of it or None", _is_pair),
    "quantization_config": (
        "a transformers.BitsAndBytesConfig or a mapping",
        lambda value: isinstance(value, QuantizationConfigMixin | dict),
    ),
    "tools": (
        "a list of functions",
        lambda value: isinstance(value, list | tuple) and all(map(callable, value)),
    ),
}
"""By argument: what it must be in words, and the test. Tokenizer and adapter are refused by TRL, by name."""
