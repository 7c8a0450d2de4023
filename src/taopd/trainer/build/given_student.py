"""The student as it is given to the trainer, made ready for TRL: adapters, processors, safe options."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.utils import create_model_from_path

from taopd.errors import ConfigError
from taopd.models.load_options import safe_options
from taopd.models.loading import has_adapter, load_model, load_tokenizer
from taopd.trainer.build.given_arguments import require_generation
from taopd.trainer.checkpoint.same_base import say_other_base
from taopd.trainer.checkpoint.savable import require_loadable, require_savable

# peft is imported where there is an adapter: it loads a network library.
if TYPE_CHECKING:
    from taopd.models.adapters import MergedAdapter
    from taopd.trainer.config import TeachabilityConfig

logger = logging.getLogger(__name__)

_ON_ITS_OWN_DEVICE = (DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)
"""Where TRL leaves out `device_map`: every process has a device of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenStudent:
    """What TRL is given in place of what the caller gave."""

    model: Any
    processing_class: PreTrainedTokenizerBase
    merged: "MergedAdapter | None"
    """The student's own adapter, where a new one is trained on top of it, and what its init took out."""
    options: Any
    """The setting `model_init_kwargs`. TRL is not shown it where the model is loaded already: it would say
    that it is ignored."""

    def finish_saving(self, folder: Path, model: Any, *, checkpoint: bool) -> None:
        """Make a folder into which `model` was saved load as what was trained."""
        if self.merged is not None and (folder / "adapter_model.safetensors").is_file():
            from taopd.models.adapters import scaling_of

            self.merged.save_with(folder, scaling_of(model), keep=checkpoint)

    def made(self, model: Any, peft_config: Any) -> "GivenStudent":
        """With what the init of a new adapter took out of the weights, once there is one.

        Raises:
            ConfigError: what cannot be saved, before any training: a config, a new adapter on top of the old.
        """
        require_savable(model)
        if peft_config is None:
            return self
        from taopd.models.adapters import MergedAdapter, scaling_of

        if self.merged is not None:
            scaling_of(model)
        return replace(self, merged=MergedAdapter.taken_out(model, self.merged))

    def resumed_from(self, checkpoint: str) -> str:
        """The folder of a checkpoint that holds the weights which train."""
        if self.merged is None:
            return checkpoint
        from taopd.models.adapters import NEW

        return os.path.join(checkpoint, NEW)


def given_student(
    model: Any,
    args: "TeachabilityConfig",
    processing_class: Any,
    peft_config: Any,
    quantization_config: Any = None,
) -> GivenStudent:
    """Load what is named, and turn adapters into what trains.

    Args:
        model: path, hub id, model or `PeftModel`. One with an adapter goes on training it, or, with a
            `peft_config`, has it merged first.
        processing_class: a processor stands for its tokenizer.
        quantization_config: of a student that is named.
    """
    options = args.model_init_kwargs
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    if isinstance(model, str):
        model, options = _loaded(model, args, quantization_config)
        args.model_init_kwargs = None
    else:
        require_loadable(model)
        if name and (peft_config is not None or has_adapter(model)):
            say_other_base(model, str(name))
    if isinstance(processing_class, ProcessorMixin):
        logger.warning(
            "only text is distilled: the processor's tokenizer is used, no images are read"
        )
        tokenizer: Any = processing_class.tokenizer
        tokenizer.chat_template = tokenizer.chat_template or processing_class.chat_template
        processing_class = tokenizer
    elif processing_class is None:
        # TRL would take a processor where the folder has one, and run code for it if asked.
        if not name:
            raise ConfigError(
                "the student has no name to find its tokenizer by: pass processing_class"
            )
        revision = (options or {}).get("revision") or "main"
        processing_class = load_tokenizer(str(name), revision=revision)
    # TRL looks for this id in every completion.
    if getattr(processing_class, "eos_token", "") is None:
        raise ConfigError(
            "the student's tokenizer has no end-of-sequence token: set its eos_token, and save it again "
            "where it is read from a folder"
        )
    merged = None
    if has_adapter(model):
        model, merged = _adapter(model, peft_config)
    if peft_config is None and not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "no weight of the student trains: set requires_grad on those that shall, or pass peft_config"
        )
    return GivenStudent(
        model=model, processing_class=processing_class, merged=merged, options=options
    )


def _adapter(model: Any, peft_config: Any) -> tuple[Any, "MergedAdapter | None"]:
    """The student that trains, and the adapter that was merged into it."""
    from taopd.models.adapters import MergedAdapter, as_peft_model, check_plain, check_runs

    model = as_peft_model(model)
    check_runs(model, trains=peft_config is None)
    # A model that was made in Python has none.
    base = model.peft_config[model.active_adapters[0]].base_model_name_or_path or "an unnamed model"
    if peft_config is None:
        logger.warning("the student is an adapter of %s: this adapter goes on training", base)
        return model, None
    check_plain(peft_config)
    plain, merged = MergedAdapter.merge(model)
    logger.warning(
        "the student is an adapter of %s: it is merged, and a new adapter trains on top. What is saved is "
        "one adapter of that model, which holds both",
        base,
    )
    return plain, merged


def _loaded(
    name: str, args: "TeachabilityConfig", quantization_config: Any
) -> tuple[Any, dict[str, Any]]:
    """The student as TRL loads it from its name, but checked as every model is, and `model_init_kwargs`."""
    options = safe_options(args.model_init_kwargs)
    if quantization_config is not None and options.get("quantization_config") is not None:
        raise ConfigError("quantization_config and one in model_init_kwargs: keep one of them")

    def as_trl(name: str, **options: Any) -> Any:
        if args.distributed_state.distributed_type in _ON_ITS_OWN_DEVICE:
            options["device_map"] = None
        return create_model_from_path(name, **options)

    given = {"dtype": "float32"} | options
    if quantization_config is not None:
        given["quantization_config"] = quantization_config
    model = load_model(name, make=as_trl, **given)
    require_generation(model)
    return model, options
