"""What transformers refuses to save, or could not load again, found before a run has anything to lose.

It checks a model's configs when they are saved, after hundreds of steps. The generation config that came with
the student is saved as it came; transformers refuses it once the trainer has set the tokenizer's ids in it.

A folder is loaded by its config. Of a model that was changed in memory alone, as by cutting off layers or
tying its head, it would give another one, or none.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from taopd.distributed.sharding import is_sharded
from taopd.errors import ConfigError
from taopd.models.damage import root_cause
from taopd.models.loaded_weights import as_loaded, left_out
from taopd.models.loading import has_adapter

logger = logging.getLogger(__name__)


def require_savable(model: Any) -> None:
    """Refuse a student whose configs cannot be saved."""
    if has_adapter(model):  # of which the adapter alone is saved
        return
    with tempfile.TemporaryDirectory() as folder, saves_what_came():
        try:
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
        except Exception as error:  # a config's own checks raise nothing narrower
            raise ConfigError(
                f"the student's config could not be saved after training: {root_cause(error)}; set it right "
                "in the model, or in model_init_kwargs"
            ) from error


def require_loadable(model: Any) -> None:
    """Refuse a student that was changed in memory, so that its folder would be loaded as another model."""
    # Of an adapter its base is not saved; ZeRO-3's weights have no shape of their own.
    if has_adapter(model) or any(map(is_sharded, model.parameters())):
        return
    state, kind = model.state_dict(), type(model).__name__
    instead = f"change its config in the same way, or train a {kind} of its config as it is"
    try:
        remove_tied_weights_from_state_dict(state, model)
    except RuntimeError as error:
        raise ConfigError(
            "the student could not be saved after training: weights are shared in memory that its config "
            f"does not tie, of {_shared(model)}; {instead}"
        ) from error
    try:
        plain, report = as_loaded(model, state, model.dtype)
    except (
        Exception
    ):  # a class of one's own may take more than a config, and nobody loads it by name
        return
    unknown = left_out(plain, sorted(report["unexpected_keys"]))
    shapes = sorted(name for name, *_ in report["mismatched_keys"])
    for names, fault in (
        (
            sorted(report["missing_keys"]),
            "is asked for by its config and would not be in the folder",
        ),
        (unknown, "is unknown to its config and would be left out"),
        (shapes, "has another shape than its config gives"),
    ):
        if names:
            more = f", as {len(names) - 1} others" if names[1:] else ""
            raise ConfigError(
                f"the student could not be loaded after training: {names[0]} {fault}{more}; {instead}"
            )
    # A further head, as of values, is no fault.
    if others := sorted(report["unexpected_keys"]):
        logger.warning(
            "the student's %s is unknown to its config: whoever loads the saved student has it without",
            others[0],
        )
    # A cast of the whole model rounds the frequencies of rotary positions.
    for name, now in model.named_buffers():
        if name not in state and now.dtype != (dtype := plain.get_buffer(name).dtype):
            logger.warning(
                "the student's %s is %s in memory and %s once it is loaded: the saved student gives other "
                "numbers than the trained one; load it with this dtype in place of casting it",
                *(name, str(now.dtype).removeprefix("torch."), str(dtype).removeprefix("torch.")),
            )
            break


def _shared(model: Any) -> str:
    """Two names of one weight which no tie explains."""
    tied, first = set(model.all_tied_weights_keys), dict[int, str]()
    for name, weight in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(weight), name) != name and name not in tied:
            return f"{first[id(weight)]} and {name}"
    return "parts of one tensor"


@contextmanager
def saves_what_came() -> Iterator[None]:
    """A generation config with flags that have no effect, as a temperature without do_sample, is saved."""
    check = GenerationConfig.validate

    def validate(self: Any, strict: bool = False, **others: Any) -> None:
        check(self, **others)

    GenerationConfig.validate = validate
    try:
        yield
    finally:
        GenerationConfig.validate = check
