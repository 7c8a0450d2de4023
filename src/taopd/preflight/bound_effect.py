"""The item of `taopd check` about a lower bound of C: how many kept positions it changes.

Measured where a copy of the served teacher's weights is on this disk and small enough to be loaded: the same
micro-batch is scored exactly with the copy, and both are selected from by the settings.
"""

from pathlib import Path
from typing import Any

import torch

from taopd.models.loading import load_model
from taopd.models.scoring import score_positions
from taopd.preflight.measure import Measured
from taopd.preflight.teacher_error import kept_tokens
from taopd.preflight.verdict import Verdict, judge
from taopd.runs.host_memory import host_bytes
from taopd.trainer.cost import ModelShape

ITEM = "bounded C"
MOST_OF_MEMORY = 0.25
"""Share of the machine's memory that the copy may take in float32: student and sampler are there too."""


@torch.no_grad()
def check_bound(subject: Any, measured: Measured) -> Verdict:
    """Share of the kept positions that exact signals would not have kept."""
    if measured.signals.compatibility_is_exact:
        return judge(ITEM, "C is exact", [])
    name = subject.settings.training.teacher_model_name_or_path
    if name is None or not any(Path(str(name)).glob("*.safetensors")):
        text = "not measured: no copy of the teacher's weights is at teacher_model_name_or_path"
        return judge(ITEM, text, [])
    size = 4 * ModelShape.from_config(subject.configs[1]).num_parameters
    if size > MOST_OF_MEMORY * host_bytes():
        return judge(
            ITEM, f"not measured: the copy of the teacher takes {size / 2**30:.0f} GiB", []
        )
    trainer, args = subject.trainer, subject.settings.training
    copy = load_model(str(name), dtype="float32").eval().to(trainer.accelerator.device)
    exact = score_positions(
        trainer.forward_states,
        trainer.model_wrapped,
        copy,
        measured.batch,
        measured.positions,
        micro_batch_size=args.per_device_train_batch_size,
        k=args.score_top_k,
        temperature=1.0,
        keep_teacher_hidden=False,
        when="taopd check",
    ).signals

    bounded, truth = (
        kept_tokens(trainer, measured.positions, signals).cpu()
        for signals in (measured.signals, exact)
    )
    num_kept, num_other = int(truth.sum()), int((truth & ~bounded).sum())
    low = (exact.compatibility - measured.signals.compatibility).double().mean()
    figures = {"changed": num_other / max(1, num_kept), "kept": num_kept, "mean_gap": float(low)}
    text = (
        f"{num_other} of {num_kept} kept positions are others than exact signals would keep; C is too low by "
        f"{float(low):.3f} on average (with the copy at {name})"
    )
    return judge(ITEM, text, [], figures=figures)
