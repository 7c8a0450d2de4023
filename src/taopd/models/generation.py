"""Completions of a model, the same for everyone who needs them: evaluation and the fixed-context bank.

Why the model's own generation config is set aside: transformers fills what is None from there, and a top-k
or tokens that it suppresses would change what is measured. Why a random stream of its own:
sampling inside a training run must not change what training samples next.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from taopd.models.batch import left_padded
from taopd.models.output_head import inside_peft

_RESHAPES: dict[str, tuple[Any, ...]] = {
    "bad_words": ([],),
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "frequency_penalty": (0,),
    "guidance_scale": (1,),
    "logit_bias": ({},),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "sequence_bias": ({},),
    "structured_outputs": (),
    "suppress_tokens": ([],),
    "watermarking_config": (),
}
"""Generation settings of transformers and vLLM that change logits, with values that do not."""
_CUTS: dict[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "dola_layers": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_p": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "top_h": (),
    "top_k": (0, -1),
    "top_p": (1,),
    "typical_p": (1,),
}
"""Likewise those that choose among the tokens of unchanged logits."""


def effective(name: str, sources: Sequence[Mapping[str, Any]]) -> Any:
    """A generation setting: transformers takes what is None in one config from the next."""
    return next((source[name] for source in sources if source.get(name) is not None), None)


def sampling_changes(
    sources: Sequence[Mapping[str, Any]], temperature: float, *, cuts: bool
) -> list[str]:
    """Settings by which a sampler departs from the student at a temperature, as "name=value".

    Args:
        sources: generation settings, the first one wins.
        cuts: also those that leave logits as they are, such as top_k.
    """
    known = _RESHAPES | {"temperature": (temperature,)} | (_CUTS if cuts else {})
    found = {name: effective(name, sources) for name in sorted(known)}
    return [
        f"{name}={value!r}"
        for name, value in found.items()
        if value is not None and value not in known[name]
    ]


@contextmanager
def undisturbed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[None]:
    """Evaluation mode, left padding and a random stream of our own; all as before on leaving."""
    training, side = model.training, tokenizer.padding_side
    devices = [model.device] if model.device.type == "cuda" else []
    # A look inside a training run must not change what it samples next.
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model.eval()
        tokenizer.padding_side = "left"
        try:
            yield
        finally:
            model.train(training)
            tokenizer.padding_side = side


@contextmanager
def without_router_logits(model: PreTrainedModel) -> Iterator[None]:
    """No auxiliary loss of a mixture of experts while it samples.

    Nobody reads it here, and transformers fails to make it of padded prompts.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        yield
        return
    config.output_router_logits = False
    try:
        yield
    finally:
        config.output_router_logits = True


def generation_settings(
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: list[int],
    greedy: bool,
    temperature: float,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Keyword arguments of the `GenerationConfig` that `generate_ids` takes."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos_ids or [0])[0]
    sampling = (
        {}
        if greedy
        else {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    )
    return {
        "do_sample": not greedy,
        **sampling,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": eos_ids or None,
        "pad_token_id": pad,
        "use_cache": True,
        # Compiling takes longer than the few batches of a measurement.
        "disable_compile": True,
    }


@contextmanager
def _only(config: GenerationConfig, model: PreTrainedModel) -> Iterator[None]:
    """Take nothing from the model's own generation config; peft's wrapper may hold another one."""
    held = [each for each in {model, inside_peft(model)} if "generation_config" in vars(each)]
    own = [each.generation_config for each in held]
    for each in held:
        each.generation_config = config
    try:
        yield
    finally:
        for each, before in zip(held, own, strict=True):
            each.generation_config = before


def generate_ids(
    model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig
) -> Tensor:
    """Completion ids [batch, new tokens], padded on the right after the end of sequence."""
    ids, mask = left_padded(prompts, config.pad_token_id, model.device)
    with without_router_logits(model), _only(config, model):
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    # `generate` returns the prompt too.
    return output[:, ids.shape[1] :]
