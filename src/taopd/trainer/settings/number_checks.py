"""Ranges of the numbers that TRL and transformers declare: one table, looked at where the config is made.

Both refuse such a number only when the models are loaded, in torch's words, or never: transformers does one
step for `max_steps=0`, and saves nothing for `save_steps=0`.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from multiprocessing import get_all_start_methods
from typing import Any

from taopd.errors import ConfigError, require, require_known

logger = logging.getLogger(__name__)

Range = tuple[str, Callable[[float], bool]]
"""In words, and as a test."""


def ranges(words: str, fits: Callable[[float], bool], *names: str) -> dict[str, Range]:
    """The same range of several settings."""
    return dict.fromkeys(names, (words, fits))


RANGES: dict[str, Range] = {
    **ranges(
        "at least 1",
        lambda value: value >= 1,
        *("per_device_train_batch_size", "per_device_eval_batch_size"),
        *("gradient_accumulation_steps", "max_completion_length", "pad_to_multiple_of"),
        *("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor"),
        *("ddp_bucket_cap_mb", "ddp_timeout", "vllm_max_model_length"),
        "vllm_tensor_parallel_size",
    ),
    **ranges(
        "at least 0",
        lambda value: value >= 0,
        *("weight_decay", "adam_epsilon", "warmup_steps", "neftune_noise_alpha", "eval_delay"),
        *("dataloader_num_workers", "max_tool_calling_iterations", "num_completions_to_print"),
    ),
    **ranges("above 0", lambda value: value > 0, "temperature", "vllm_server_timeout"),
    **ranges(
        "from 0 to less than 1",
        lambda value: 0 <= value < 1,
        *("adam_beta1", "adam_beta2", "label_smoothing_factor"),
    ),
    **ranges(
        "above 0, at most 1",
        lambda value: 0 < value <= 1,
        *("top_p", "vllm_gpu_memory_utilization"),
    ),
    # NumPy takes no larger seed.
    **ranges(
        "a whole number from 0 to 2**32 - 1",
        lambda value: 0 <= value < 2**32,
        *("seed", "data_seed"),
    ),
    **ranges(
        "a port from 1 to 65535",
        lambda value: 1 <= value < 2**16,
        *("vllm_server_port", "vllm_group_port"),
    ),
    "learning_rate": ("at least 0", lambda value: value >= 0),
    "max_grad_norm": ("at least 0; 0 clips nothing", lambda value: value >= 0),
    "save_total_limit": ("at least 1; left out, all are kept", lambda value: value >= 1),
    "local_rank": ("at least -1", lambda value: value >= -1),
    "max_steps": (
        "at least 1, or -1: what num_train_epochs give",
        lambda value: value >= 1 or value == -1,
    ),
    "min_p": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "top_k": ("at least 0; 0 keeps every token", lambda value: value >= 0),
    "repetition_penalty": ("above 0; 1 is none", lambda value: value > 0),
}
"""By setting of `DistillationConfig`; None and text such as "auto" are allowed where the type allows them."""
LORA: dict[str, Range] = {
    "lora_r": ("at least 1", lambda value: value >= 1),
    "lora_alpha": ("above 0", lambda value: value > 0),
    "lora_dropout": ("from 0 to less than 1", lambda value: 0 <= value < 1),
}
"""By setting of `ModelConfig`."""
INTERVALS = {"logging": "logs nothing", "save": "saves nothing", "eval": "evaluates nothing"}
"""What happens every so many steps, and what the strategy "no" does instead."""
WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "train_sampling_strategy": (
        "random",
        "TRL's sampler orders the prompts; shuffle_dataset=False keeps the order of the dataset",
    ),
    "label_smoothing_factor": (
        0.0,
        "the loss is a divergence from the teacher and reads no labels",
    ),
    "data_seed": (None, "TRL's sampler takes the order of the prompts from seed"),
}
"""Settings of transformers that TRL's trainer passes over: their default, and why."""
OF_WORKERS = {
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
    "dataloader_multiprocessing_context": None,
}
"""Settings that torch takes beside worker processes alone, and their values without."""
SWITCHES = {
    "use_vllm": ("vllm_",),
    "use_liger_kernel": ("liger_kernel_config",),
    "log_completions": ("num_completions_to_print", "log_unique_prompts"),
    "dataloader_num_workers": tuple(OF_WORKERS),
}
"""By setting that switches something on, how the names of the settings begin that only this reads."""
OTHERS = ("num_train_epochs", "beta", *(f"{what}_steps" for what in INTERVALS))
"""Numbers whose range depends on another setting."""


def check_numbers(config: Any) -> None:
    """Refuse numbers of TRL's and transformers' that are outside their range; their types are known."""
    if config.max_completion_length is None:
        raise ConfigError(
            "max_completion_length=None: without a limit transformers samples 20 tokens: give a number"
        )
    _read_padding(config)
    check_ranges(config, RANGES)
    if config.learning_rate == 0:
        # Of use where only the numbers of a step are looked at.
        logger.warning("learning_rate=0: nothing trains, the student stays as it is")
    for name, (default, why) in WITHOUT_EFFECT.items():
        if (value := getattr(config, name)) != default:
            logger.warning("%s=%s has no effect: %s", name, value, why)
    # Older versions of transformers do not have it.
    context = getattr(config, "dataloader_multiprocessing_context", None)
    if context is not None:
        require_known("dataloader_multiprocessing_context", context, get_all_start_methods())
    _check_switches(config)
    steps, epochs = config.max_steps, config.num_train_epochs
    require(steps > 0 or epochs > 0, "num_train_epochs", epochs, "above 0, or max_steps is set")
    for what, instead in INTERVALS.items():
        name = f"{what}_steps"
        value = getattr(config, name)
        if value is None:
            continue
        if getattr(config, f"{what}_strategy") != "steps":
            require(value >= 0, name, value, "at least 0")
            continue
        words = "a whole number from 1 on, or a share of the run below 1"
        fits = value > 0 and (value < 1 or value == int(value))
        require(fits, name, value, f"{words}; {what}_strategy='no' {instead}")


def _check_switches(config: Any) -> None:
    """Say which settings have no effect, because nothing that reads them is switched on."""
    for entry in fields(config):
        name, value = entry.name, getattr(config, entry.name)
        for switch, of_it in SWITCHES.items():
            if name.startswith(of_it) and not getattr(config, switch) and value != entry.default:
                logger.warning("%s=%s has no effect without %s", name, value, switch)


def _read_padding(config: Any) -> None:
    """A number that is given as text, which TRL takes here alone."""
    value = config.pad_to_multiple_of
    if isinstance(value, str) and value.lower() not in ("auto", "none", "null"):
        require(value.isdecimal(), "pad_to_multiple_of", value, "a whole number, 'auto' or 'none'")
        config.pad_to_multiple_of = int(value)


def check_ranges(settings: Any, known: Mapping[str, Range]) -> None:
    """Refuse a setting outside its range."""
    for name, (words, fits) in known.items():
        value = getattr(settings, name, None)
        require(value is None or isinstance(value, str) or fits(value), name, value, words)


def check_adapter_is_asked_for(given: Collection[str]) -> None:
    """Refuse settings of an adapter where nobody says whether one trains: all weights would."""
    of_adapter = ("lora_", "use_rslora", "use_dora")
    names = sorted(name for name in given if name.startswith(of_adapter))
    if names and "use_peft" not in given:
        raise ConfigError(
            f"{', '.join(names)}: without use_peft: true no adapter trains, but all weights; set it, or "
            "leave these out"
        )


_WORDED = {
    "bf16/gpu": "there is no GPU here that computes in bfloat16: for a run on the CPU set use_cpu=True, "
    "bf16=False and gradient_checkpointing=False",
    "process group has not been initialized": "ddp_backend is of several processes, as torchrun and "
    "`accelerate launch` start them: leave it out for a single one",
}
"""By a part of transformers' message, what it leaves unsaid."""


@contextmanager
def about(config: Any, *names: str) -> Iterator[None]:
    """What transformers refuses inside is about these settings.

    Raises:
        ConfigError: those of them that are set, and transformers' words. What a package lacks stays an
            ImportError.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        # An enum's text is that of its name.
        values = {name: getattr(config, name) for name in names}
        values = {name: getattr(value, "value", value) for name, value in values.items()}
        given = ", ".join(f"{name}={value!r}" for name, value in values.items() if value)
        raise ConfigError(f"{given}: {worded(error)}") from error


def worded(error: Exception) -> ConfigError:
    """A refusal of transformers' or TRL's as ours."""
    text = " ".join(str(error).split())
    return ConfigError(next((ours for part, ours in _WORDED.items() if part in text), text))
