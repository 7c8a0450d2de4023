"""The student's states that a micro-batch's loss reads: of a full forward, or through a gradient window.

`sparse` knows positions and backbones; this module knows settings, padded completions, autocast and
metrics, so that the trainer need not know which of the two forwards it runs.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jaxtyping import Bool, Float
from torch import Tensor

from taopd.config import TeachabilityConfig
from taopd.errors import ConfigError
from taopd.recorder import Recorder
from taopd.scoring import Trimmed, head_dtype
from taopd.sparse import backbone_of, check_backbone, gradient_fidelity, sparse_states

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class StudentStates:
    """Runs the student as `gradient_window` says, and logs what that keeps of the exact gradient.

    Args:
        student: as it is given to the trainer.

    Raises:
        ConfigError: if the student's backbone is not supported, or the check cannot be made here.
    """

    def __init__(
        self, student: Any, accelerator: Accelerator, recorder: Recorder, args: TeachabilityConfig
    ) -> None:
        if args.gradient_window is not None:
            check_backbone(backbone_of(student))
        if args.gradient_check_every and accelerator.distributed_type in SHARDED:
            raise ConfigError(
                "gradient_check_every: gradients of sharded parameters cannot be taken aside (FSDP, "
                "DeepSpeed): set it to 0, or measure on one device"
            )
        self._accelerator, self._recorder, self._args = accelerator, recorder, args

    def __call__(
        self,
        student: Any,
        part: Trimmed,
        active: Bool[Tensor, "B T"],
        exact: Callable[[], Tensor],
        losses: Callable[[Tensor], list[Tensor]],
        when: tuple[int, int],
    ) -> Float[Tensor, "b n D"]:
        """States that predict the part's completion tokens; with a window zero where not active.

        Without gradient (evaluation) there is nothing to save: the full forward.

        Args:
            student: unwrapped; the call is made within its wrapper's forward.
            active: tokens of the micro-batch that enter the loss.
            exact: states [b, n, D] of a full forward.
            losses: the terms of the loss from states [b, n, D]; for the check.
            when: optimizer step, and micro-step. The check looks at the first micro-batch of a step.
        """
        if self._args.gradient_window is None or not torch.is_grad_enabled():
            return exact()
        active = active[part.rows, : part.num_completion]
        (step, micro_step), num_micro_batches = when, self._args.gradient_accumulation_steps
        every = self._args.gradient_check_every
        if every and step % every == 0 and micro_step % num_micro_batches == 0:
            self._check(
                student,
                lambda: torch.stack(losses(exact())).sum(),
                lambda: torch.stack(losses(self._windowed(student, part, active)[0])).sum(),
            )
        hidden, share = self._windowed(student, part, active)
        self._recorder.add("sparse/gradient_share", share / num_micro_batches)
        return hidden

    def _windowed(self, student: Any, part: Trimmed, active: Tensor) -> tuple[Tensor, float]:
        wanted = torch.zeros_like(part.input_ids, dtype=torch.bool)
        wanted[:, -part.num_completion - 1 : -1] = active
        window = self._args.gradient_window
        assert window is not None
        with self._accelerator.autocast():
            found = sparse_states(
                student, part.input_ids, part.attention_mask, wanted, window=window
            )
            hidden = head_dtype(found.hidden)
        padded = hidden.new_zeros(*active.shape, hidden.shape[-1])
        return padded.index_put(active.nonzero(as_tuple=True), hidden), found.share

    def _check(
        self, student: Any, exact: Callable[[], Tensor], windowed: Callable[[], Tensor]
    ) -> None:
        device = self._accelerator.device
        devices = [device] if device.type == "cuda" else []
        with self._recorder.timed("perf/gradient_check_s"), torch.random.fork_rng(devices):
            fidelity = gradient_fidelity(student, exact, windowed)
        if math.isfinite(fidelity.cosine):  # Nothing trains in this micro-batch otherwise.
            self._recorder.add("sparse/gradient_cosine", fidelity.cosine)
            self._recorder.add("sparse/gradient_norm_ratio", fidelity.norm_ratio)
