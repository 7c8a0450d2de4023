"""The checks of `generation_kwargs`: known names, and ways of decoding that can sample a batch.

Both at the start: `generate` itself complains after the models are loaded, in words about its own arguments.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from taopd.errors import ConfigError, require_known
from taopd.trainer.settings.number_checks import about

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

ONE_AT_A_TIME = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Settings that ask for assisted decoding, which transformers does for one completion only."""
ON_A_HUB = {
    "dola_generation": ("dola_layers",),
    "contrastive_search": ("penalty_alpha",),
    "group_beam_search": ("num_beam_groups",),
    "constrained_beam_search": ("constraints", "force_words_ids"),
}
"""Ways of decoding that are code in repositories now, and the settings that ask for them."""
DECODING = (*ONE_AT_A_TIME, *(name for names in ON_A_HUB.values() for name in names), "do_sample")
"""What decides on the way of decoding."""


def check_generation_kwargs(config: "TeachabilityConfig") -> None:
    """Refuse settings of sampling that transformers ignores, refuses, or answers otherwise than TRL reads."""
    given = config.generation_kwargs or {}
    # vLLM has names of its own, which it checks.
    if config.use_vllm or not isinstance(given, dict):
        return
    for name in given:
        require_known("generation_kwargs", name, vars(GenerationConfig()))
    if "disable_compile" in given:
        raise ConfigError("generation_kwargs: disable_compile is always true here: take it out")
    check_returned(given, "generation_kwargs")
    # The completion mask would not know them, and what pads a completion that ended there would train.
    if given.get("eos_token_id") is not None:
        raise ConfigError(
            "generation_kwargs: eos_token_id is read by the sampler alone: name the ids that end a "
            "completion in the student's generation config (generation_config.json)"
        )
    check_decoding(given, at_once(config), "generation_kwargs")
    # As TRL makes it.
    asked = {"do_sample": True, "cache_implementation": config.cache_implementation} | given
    with about(config, "cache_implementation", "generation_kwargs"):
        GenerationConfig(**asked)
    cache = str(asked["cache_implementation"])
    if cache.startswith("offloaded") and config.device.type == "cpu":
        raise ConfigError(
            f"cache_implementation={cache!r} moves keys and values from a GPU to host memory, and the run is "
            "on the CPU: leave it out"
        )


def check_returned(settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings that change what sampling returns, or end a completion where no stop id is."""
    for name, usual in (("return_dict_in_generate", False), ("num_return_sequences", 1)):
        if settings.get(name) not in (None, usual):
            raise ConfigError(
                f"{where}: {name} changes what sampling returns; take it out (num_generations samples "
                "several completions of a prompt)"
            )
    if settings.get("stop_strings") is not None:
        raise ConfigError(
            f"{where}: stop_strings ends a completion at a token that is no end to the model, which would "
            "learn to go on there: take it out"
        )


def at_once(config: "TeachabilityConfig") -> int:
    """Completions of one process that are sampled together: of a generation batch, or of an evaluation."""
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    evaluates = config.eval_strategy != "no" or config.eval_on_start
    return max(size, config.per_device_eval_batch_size) if evaluates else size


def check_decoding(settings: Mapping[str, Any], num_completions: int, where: str) -> None:
    """Refuse a way of decoding that cannot sample so many completions together.

    Args:
        settings: of a `GenerationConfig`; those that are left out have their defaults.
        where: what holds them, in words.
    """
    # TRL samples unless it is told otherwise.
    mode = str(GenerationConfig(**{"do_sample": True, **settings}).get_generation_mode().value)
    asked = ONE_AT_A_TIME if mode == "assisted_generation" else ON_A_HUB.get(mode, ())
    names = ", ".join(name for name in asked if settings.get(name) is not None)
    if not names:
        return
    if mode in ON_A_HUB:
        raise ConfigError(
            f"{where}: {names} asks for {mode.replace('_', ' ')}, which transformers takes from a "
            "repository with code, and such code is never run: take it out"
        )
    if num_completions > 1:
        raise ConfigError(
            f"{where}: {names} asks for assisted decoding, which samples one completion at a time, and "
            f"this run samples {num_completions} completions together: take it out, or set "
            "per_device_train_batch_size and gradient_accumulation_steps to 1"
        )
