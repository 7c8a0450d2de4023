"""LoRA adapters of a model that is trained further: taken over, merged, and saved with a new one.

transformers loads a folder with `adapter_config.json` as its base model with the adapter put into it and
frozen; peft has a class around such a model, `PeftModel`, whose adapter trains and is saved.
"""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from taopd.errors import ConfigError, DataError
from taopd.models.adapter_folder import CONFIG, WEIGHTS

logger = logging.getLogger(__name__)

NEW = "new_adapter"
"""Subfolder of a checkpoint: the adapter that trains, without the one that was merged before."""
_PREFIX = "base_model.model."
_TAKES_OUT = ("pissa", "olora", "corda", "lora_ga")
"""Values of `init_lora_weights`, or how they begin, with which peft changes the weights below."""
Refusal = Callable[[str], ConfigError]
"""An error for what an adapter has."""


def read_adapter_again(model: Any, folder: Path) -> None:
    """Set a freshly loaded model's adapter from its file by peft: transformers leaves out DoRA's magnitudes.

    Raises:
        DataError: the file has weights that the model has no place for, or none for one of its places.
    """
    weights = {
        name.removeprefix(_PREFIX): weight for name, weight in load_file(folder / WEIGHTS).items()
    }
    (name,) = model.active_adapters()
    found = set_peft_model_state_dict(model, weights, adapter_name=name)
    if found.unexpected_keys:
        raise DataError(
            f"the adapter {folder} does not fit its base: no place for {found.unexpected_keys[0]}"
        )
    # A base with more layers than the one that it was trained on.
    factors = [key for key in found.missing_keys if f"_A.{name}" in key or f"_B.{name}" in key]
    if factors:
        raise DataError(f"the adapter {folder} does not fit its base: it has no {factors[0]}")


def check_runs(model: Any, *, trains: bool) -> None:
    """Refuse a student's adapter that its forward leaves out, or that cannot train as it is.

    Args:
        trains: the adapter goes on training; else it is merged, and may be so already.

    Raises:
        ConfigError: says what to call first.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    # Without this some of it could train still, modules_to_save for one.
    if any(layer.disable_adapters for layer in layers):
        raise ConfigError(
            "the student's adapter is disabled, it would not train: call enable_adapter_layers() first "
            "(enable_adapters() of a transformers model), or pass the model without the adapter: unload()"
        )
    if trains and any(layer.merged for layer in layers):
        raise ConfigError(
            "the student's adapter is merged into its base, where it does not train: call "
            "unmerge_adapter() first, or pass the whole model: merge_and_unload()"
        )


def check_layers(model: Any) -> None:
    """Refuse an adapter that doubles layers: without it the model is not the one that it was put on.

    Raises:
        ConfigError: says what to leave out.
    """
    if any(getattr(each, "layer_replication", None) for each in model.peft_config.values()):
        raise ConfigError(
            "layer_replication: with layers doubled the student without its adapter is not the student "
            "before training, to which the run compares: leave it out of the adapter's config, or save a "
            "model that has these layers and pass that"
        )


def as_peft_model(model: Any) -> PeftModel:
    """The model with its active adapter in peft's own class, ready to train that adapter.

    Raises:
        ConfigError: several are active.
    """
    active = model.active_adapters
    active = list(active() if callable(active) else active)
    if len(active) > 1:
        # A folder is loaded with one adapter: neither checkpoint nor result would be what was trained.
        raise ConfigError(
            f"the student has several active adapters ({', '.join(active)}), and what is saved is loaded "
            "with one of them: activate the one that shall train, or merge_and_unload() them first"
        )
    if not isinstance(model, PeftModel):
        name = model.active_adapters()[0]
        config, weights = model.peft_config[name], model.get_adapter_state_dict(name)
        base, config.inference_mode = config.base_model_name_or_path, False
        _take_off_parameters(model)
        with warnings.catch_warnings():
            # peft warns that the model holds an adapter already: it is the one whose weights are set below.
            warnings.simplefilter("ignore")
            model = get_peft_model(model, config, adapter_name=name)
        weights = {_PREFIX + key.removeprefix(_PREFIX): weight for key, weight in weights.items()}
        set_peft_model_state_dict(model, weights, adapter_name=name)
        config.base_model_name_or_path = base
    if not any(weight.requires_grad for weight in model.parameters()):
        # Loaded for inference, as PeftModel.from_pretrained does unless it is asked otherwise.
        model.base_model.set_adapter(list(model.active_adapters))
        for name in model.active_adapters:
            model.peft_config[name].inference_mode = False
    return model


def _take_off_parameters(model: Any) -> None:
    """Take the LoRA off parameters that no module of their own has, such as experts in one tensor.

    peft puts another weight of an adapter into a layer that has one, but not into such a parameter.
    """
    for name, module in list(model.named_modules()):
        # One around the other, if the module has several such parameters: the outermost comes first.
        if isinstance(module, ParamWrapper) and not name.endswith("base_layer"):
            model.set_submodule(name, module.get_base_layer())


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedAdapter:
    """What an adapter trains on top of: an older one that was merged, or a part that its init took out.

    PiSSA, OLoRA and their like begin with a part of the weights as the adapter, and the base without it. That
    base is nowhere on disk: what is saved must be an adapter of the one that is.
    """

    base: str
    """Name or path of the model below."""
    factors: dict[str, tuple[Tensor, Tensor]]
    """(A, scaled B) by module."""

    @staticmethod
    def merge(model: PeftModel) -> tuple[PreTrainedModel, "MergedAdapter"]:
        """The plain model with its adapter merged, and what was merged.

        Raises:
            ConfigError: an adapter that cannot be saved as one with another LoRA, or a quantized base.
        """
        name = model.active_adapters[0]
        config: Any = model.peft_config[name]
        check_plain(config)
        if getattr(model, "is_quantized", False):
            raise ConfigError(
                "an adapter cannot be merged into a quantized base without loss: leave out use_peft to go on "
                "training it, or merge it into the unquantized model first"
            )
        factors = _factors(model, scaling_of(model))
        plain: Any = model.merge_and_unload()
        if getattr(plain, "peft_config", None):  # left by transformers; no new adapter
            del plain.peft_config
            plain._hf_peft_config_loaded = False
        return plain, MergedAdapter(base=config.base_model_name_or_path, factors=factors)

    @staticmethod
    def taken_out(model: PeftModel, below: "MergedAdapter | None") -> "MergedAdapter | None":
        """What the init of a new adapter took out of the weights, with what was merged into them before.

        Raises:
            ConfigError: such an adapter that cannot be saved as one of the base.
        """
        config: Any = model.peft_config[model.active_adapters[0]]
        init = getattr(config, "init_lora_weights", True)
        if not (isinstance(init, str) and init.lower().startswith(_TAKES_OUT)):
            return below

        def refusal(what: str) -> ConfigError:
            return ConfigError(
                f"init_lora_weights={init!r} takes a part out of the weights below the adapter; with {what} "
                "what was trained cannot be saved as an adapter of the student: leave one of the two out"
            )

        check_plain(config, refusal)
        base = below.base if below else config.base_model_name_or_path
        factors = dict(below.factors) if below else {}
        for name, (a, b) in _factors(model, scaling_of(model, refusal)).items():
            old = [factors[name]] if name in factors else []
            factors[name] = _together([*old, (a, -b)])
        return MergedAdapter(base=base, factors=factors)

    def save_with(self, folder: Path, scaling: Mapping[str, float], *, keep: bool) -> None:
        """Turn the new adapter that was saved in a folder into one adapter of the base: both together.

        Args:
            scaling: of the new adapter, by module.
            keep: leave the new adapter alone in the subfolder `NEW`, from which training can go on.
        """
        new = load_file(folder / WEIGHTS)
        parts = {name: [pair] for name, pair in self.factors.items()}
        for name, scale in scaling.items():
            a, b = (new[f"{_PREFIX}{name}.lora_{side}.weight"].float() for side in "AB")
            parts.setdefault(name, []).append((a, b * scale))
        together, ranks = {}, {}
        for name, pairs in parts.items():
            a, b = _together(pairs)
            together[f"{_PREFIX}{name}.lora_A.weight"] = a.contiguous()
            together[f"{_PREFIX}{name}.lora_B.weight"] = b.contiguous()
            ranks[name] = a.shape[0]
        if keep:
            (folder / NEW).mkdir()
            for file in (WEIGHTS, CONFIG):
                (folder / file).rename(folder / NEW / file)
        save_file(together, folder / WEIGHTS, metadata={"format": "pt"})
        largest = max(ranks.values())
        config = LoraConfig(
            r=largest,
            lora_alpha=largest,
            # The scales are in the matrices: alpha is the rank everywhere.
            rank_pattern=ranks,
            alpha_pattern=dict(ranks),
            target_modules=sorted(ranks),
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.base,
            inference_mode=True,
        )
        config.save_pretrained(str(folder))


def _together(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """LoRAs on one matrix as one of their ranks' sum: B A + B' A' = [B B'] [A; A']."""
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)


def say_unmatched(model: Any) -> None:
    """Warn of names in an adapter's config that no module of the model has: peft passes over them."""
    config = model.peft_config[model.active_adapters[0]]
    modules = [name for name, _ in model.get_base_model().named_modules()]
    for setting in ("target_modules", "modules_to_save"):
        named = getattr(config, setting, None) or ()
        # A pattern, or all-linear, is refused by peft where it matches nothing.
        for name in [] if isinstance(named, str) else sorted(named):
            if not any(f".{each}".endswith(f".{name}") for each in modules):
                logger.warning(
                    "the adapter's %s: no module of the model is called %r", setting, name
                )


def _factors(model: Any, scaling: Mapping[str, float]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, scaled B) of the active LoRA by module, as they are now."""
    name, found = model.active_adapters[0], {}
    for module_name, scale in scaling.items():
        module = model.get_base_model().get_submodule(module_name)
        weights = module.lora_A[name].weight, module.lora_B[name].weight
        a, b = (weight.detach().float().cpu().clone() for weight in weights)
        found[module_name] = a, b * scale
    return found


def _cannot_save(what: str) -> ConfigError:
    return ConfigError(
        f"the student is an adapter and a new one is asked for; with {what} the two cannot be saved as one. "
        "Merge the student (merge_and_unload), save it, and name that folder; or leave out use_peft to go on "
        "training its adapter"
    )


def check_plain(config: Any, refusal: Refusal = _cannot_save) -> None:
    """Refuse an adapter that is more than one LoRA on linear layers.

    Raises:
        ConfigError: names what it has besides.
    """
    extras = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters")
    found = [name for name in extras if getattr(config, name, None)]
    if getattr(config, "bias", "none") != "none":
        found.append("bias")
    if not isinstance(config, LoraConfig):
        found = [str(config.peft_type)]
    if found:
        raise refusal(found[0])


def scaling_of(model: Any, refusal: Refusal = _cannot_save) -> dict[str, float]:
    """Scale of the active LoRA by module.

    Raises:
        ConfigError: it is also on a module that is not linear.
    """
    name, found = model.active_adapters[0], {}
    for module_name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        linear = name in module.lora_A and module.lora_A[name].weight.ndim == 2
        # Experts in one tensor have matrices of another shape, which are applied in another way.
        linear = linear and not isinstance(module, ParamWrapper)
        if not linear and name in {*module.lora_A, *module.lora_embedding_A}:
            raise refusal(f"LoRA on {module_name}")
        if linear:
            found[module_name] = module.scaling[name]
    return found
