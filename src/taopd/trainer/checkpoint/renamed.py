"""Weights of a checkpoint whose names are not those of the model in memory, put into the student.

A checkpoint is a folder that any tool can load, with the names of the hub: of a mixture of experts one matrix
for each expert, where the model has one tensor for all. transformers' trainer looks for the file's names in
the model when a run is resumed, and leaves all others as they are: the experts would be those from before
training.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from taopd.models.loading import load_model


def load_renamed(folder: Path, model: Any) -> bool:
    """Load the weights of a folder through transformers' conversion; False: it needs none."""
    names = {name for file in folder.glob("model*.safetensors") for name in _names(file)}
    # With an adapter the folder holds no whole model, and so none of these files.
    if names <= model.state_dict().keys():
        return False
    dtypes = {weight.dtype for weight in model.parameters()}
    # What is read in float32 is exact in any smaller dtype that it is copied to.
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    saved = load_model(folder, make=type(model).from_pretrained, dtype=dtype)
    model.load_state_dict(saved.state_dict())
    return True


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as content:
        return list(content.keys())
