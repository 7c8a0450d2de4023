"""What transformers refuses to save, found before a run has anything to lose.

It checks a model's configs when they are saved, after hundreds of steps. The generation config that came with
the student is saved as it came; transformers refuses it once the trainer has set the tokenizer's ids in it.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from taopd.errors import ConfigError
from taopd.models.loading import has_adapter, root_cause


def require_savable(model: Any) -> None:
    """Refuse a student whose configs cannot be saved.

    Raises:
        ConfigError: says what is wrong with them, as a number of layers that one setting alone gives.
    """
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
