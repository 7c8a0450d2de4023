"""The student's forward for the loss of a micro-batch, and what the scoring pass can spare it.

    one micro-batch a step     the scoring pass is recorded: its states are the training forward's
    gradient_window            the scoring pass leaves its keys and values: the prefix of the sparse forward
    otherwise                  a forward of its own, over what the loss depends on

`models.gradient_window` knows positions and backbones. This module knows settings, padded completions,
autocast and metrics, so that the trainer need not know which forward it runs.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor, nn

from taopd.errors import ConfigError
from taopd.models.batch import Forward, Positions, Trimmed, first_used
from taopd.models.gradient_window import (
    KeyValuePrefix,
    backbone_of,
    capture_prefix,
    check_backbone,
    compare_gradients,
    gather_prefix,
    sparse_states,
)
from taopd.models.output_head import head_dtype
from taopd.models.scoring import Reuse
from taopd.trainer.checkpoint.fsdp import layout_of, within_backward
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.loss import LossInputs
from taopd.trainer.step_metrics import Recorder

logger = logging.getLogger(__name__)

Backbone = Callable[..., Tensor]
"""(model, input ids [b, L], attention mask [b, L], completion columns n) -> states [b, n, D]."""


class StudentForward:
    """Runs the student as `gradient_window` says, and logs what that keeps of the exact gradient.

    Args:
        student: as it is given to the trainer.

    Raises:
        ConfigError: if the student's backbone is not supported, or the check cannot be made here.
    """

    def __init__(
        self, student: Any, accelerator: Accelerator, recorder: Recorder, args: TeachabilityConfig
    ) -> None:
        layout = layout_of(accelerator)
        updater = within_backward(args, accelerator)
        if updater and (args.match_update_norm or args.max_update_norm):
            raise ConfigError(
                f"match_update_norm and max_update_norm: {updater} updates within the backward, where no "
                "update can be scaled"
            )
        if args.gradient_window is not None:
            check_backbone(backbone_of(student))
        if args.gradient_check_every and layout != "replicated":
            raise ConfigError(
                "gradient_check_every: gradients of sharded parameters cannot be taken aside (FSDP, "
                "DeepSpeed): set it to 0, or measure on one device"
            )
        self._accelerator, self._recorder, self._args = accelerator, recorder, args
        self._kept: list[KeyValuePrefix | None] = []
        """Of the micro-batches of the scoring pass, in its order."""
        self._place: list[tuple[int, int]] = []
        """Which of them holds a row of the generation batch, and where."""
        self._first_column = 0
        self._told = False
        # A second optimizer step has other weights, and so other states, keys and values.
        one_use = args.num_iterations == 1
        self._keeps_prefix = (
            args.gradient_window is not None and one_use and args.prefix_memory_mib > 0
        )
        """The scoring pass leaves its keys and values."""
        self._keeps_graph = (
            args.gradient_window is None and one_use and args.gradient_accumulation_steps == 1
        )
        """The scoring pass is the training forward."""
        reason = _why_two_forwards(student, accelerator.num_processes, args)
        if self._keeps_graph and reason:
            logger.info("the student is scored and trained in two forwards, since %s", reason)
            self._keeps_graph = False

    # -- scoring ----------------------------------------------------------------------------------

    def start_scoring(
        self, training: bool, prompt_mask: Tensor, forward_keeping_prefix: Forward
    ) -> Reuse:
        """Forget what the last generation batch left, and say what to keep of this one.

        Args:
            prompt_mask: [B, P], of the whole generation batch.
            forward_keeping_prefix: of the trainer; runs `scoring_states` in place of the plain backbone.
        """
        self.forget()
        if training and self._keeps_prefix:
            # All micro-batches begin at one column, so that positions agree between them.
            self._first_column = first_used(prompt_mask)
            return Reuse(student_forward=forward_keeping_prefix, first_column=self._first_column)
        return Reuse(keep_student_graph=training and self._keeps_graph)

    def forget(self) -> None:
        """Drop the keys and values of the scoring pass; what trains next computes its own."""
        self._kept.clear()
        self._place.clear()

    def scoring_states(self, student: Any, *sequences: Any) -> Float[Tensor, "b n D"]:
        """States that predict the completion tokens; keeps the pass as a prefix where memory allows.

        Args:
            student: unwrapped; the call is made within its wrapper's forward.
            sequences: input ids [b, L], attention mask [b, L], number of completion columns.
        """
        input_ids, attention_mask, num_completion = sequences
        with self._accelerator.autocast():
            prefix = capture_prefix(student, input_ids, attention_mask)
            hidden = head_dtype(prefix.hidden[:, -num_completion - 1 : -1])
        # Counted as it is kept: lengths differ from batch to batch.
        held = sum(kept.num_bytes for kept in self._kept if kept is not None) + prefix.num_bytes
        fits = held <= self._args.prefix_memory_mib * 2**20
        if not fits and not self._told:
            self._told = True
            logger.warning(
                "keys and values of the scoring pass do not fit into the %d MiB of prefix_memory_mib: "
                "rows beyond compute theirs again in training",
                self._args.prefix_memory_mib,
            )
        self._kept.append(prefix if fits else None)
        return hidden

    def finish_scoring(self, positions: Positions) -> None:
        """Remember where every row of the generation batch went; the pass took those with a position."""
        if not self._kept:
            return
        size, num_rows = self._args.per_device_train_batch_size, positions.shape[0]
        # Rows without a position were dropped from the pass, and so have no place in its prefix: -1.
        present = torch.zeros(num_rows, dtype=torch.bool)
        present[positions.row.cpu()] = True
        for start in range(0, num_rows, size):
            own = present[start : start + size]
            place = torch.where(own, own.long().cumsum(0) - 1, -1)
            self._place += [(start // size, int(index)) for index in place]

    def _prefix_of(self, part: Trimmed, inputs: LossInputs) -> KeyValuePrefix | None:
        """The prefix of a training micro-batch's part, if the scoring pass left all of it."""
        if not self._place:
            return None
        places = [self._place[row] for row in inputs.batch_row[part.rows].tolist()]
        # Partly kept is not kept: one forward computes all rows of the micro-batch. One in which nothing
        # trains has a row all the same, and this may be one that the scoring pass has dropped.
        if any(self._kept[source] is None or index < 0 for source, index in places):
            return None
        num_prompt = part.input_ids.shape[1] - part.num_completion
        start = inputs.prompt_mask.shape[1] - num_prompt - self._first_column
        device = part.input_ids.device
        source, rows = (torch.tensor(column, device=device) for column in zip(*places, strict=True))
        kept = {index: prefix for index, prefix in enumerate(self._kept) if prefix is not None}
        return gather_prefix(kept, source, rows, slice(start, start + part.input_ids.shape[1]))

    # -- training ---------------------------------------------------------------------------------

    def hidden_states(
        self, backbone: Backbone, student: Any, part: Trimmed, inputs: LossInputs
    ) -> Float[Tensor, "b n D"]:
        """States that predict the part's completion tokens; zero where not active, but in a full forward.

        Args:
            backbone: the full forward: (student, input ids, attention mask, completion columns) -> states.
            student: unwrapped; the call is made within its wrapper's forward.
        """
        # Without gradient (evaluation) there is nothing to save.
        if not torch.is_grad_enabled():
            return backbone(student, *part.sequences)
        if inputs.student_hidden is not None:
            return self._of_scoring(part, inputs)
        self._recorder.add("perf/train_tokens", part.input_ids.numel())
        if self._args.gradient_window is None:
            return backbone(student, *part.sequences)
        prefix = self._prefix_of(part, inputs)
        self._recorder.add("perf/reused_tokens", 0 if prefix is None else part.input_ids.numel())
        hidden, share = self.windowed_states(student, part, inputs, prefix)
        num_micro_batches = self._args.gradient_accumulation_steps
        self._recorder.add("sparse/gradient_share", share / num_micro_batches)
        return hidden

    def is_check_due(self, step: int, micro_step: int) -> bool:
        """Whether `gradient_check_every` asks for a check of the gradient: in a step's first micro-batch."""
        every = self._args.gradient_check_every
        first = micro_step % self._args.gradient_accumulation_steps == 0
        return torch.is_grad_enabled() and every > 0 and step % every == 0 and first

    @contextmanager
    def gradient_check(self) -> Iterator[list[list[Tensor | None]]]:
        """A block that fills the list with the exact and the windowed gradient, which are then compared.

        The random stream is as before afterwards, so that a check changes no run.
        """
        device = self._accelerator.device
        devices = [device] if device.type == "cuda" else []
        gradients: list[list[Tensor | None]] = []
        with self._recorder.timed("perf/gradient_check_s"), torch.random.fork_rng(devices):
            yield gradients
            fidelity = compare_gradients(*gradients)
        if math.isfinite(fidelity.cosine):  # Nothing trains in this micro-batch otherwise.
            self._recorder.add("sparse/gradient_cosine", fidelity.cosine)
            self._recorder.add("sparse/gradient_norm_ratio", fidelity.norm_ratio)

    def _of_scoring(self, part: Trimmed, inputs: LossInputs) -> Float[Tensor, "b n D"]:
        """The states of the scoring pass, which was recorded: it is the training forward."""
        assert inputs.student_hidden is not None
        active = inputs.active
        hidden = torch.cat(inputs.student_hidden)[active[inputs.scored]]
        tokens = int(inputs.prompt_mask.sum() + inputs.completion_mask.sum())
        self._recorder.add("perf/train_tokens", tokens)
        self._recorder.add("perf/reused_tokens", tokens)
        return _padded(hidden, active[part.rows, : part.num_completion])

    def windowed_states(
        self, student: Any, part: Trimmed, inputs: LossInputs, prefix: KeyValuePrefix | None
    ) -> tuple[Float[Tensor, "b n D"], float]:
        """Those of the sparse forward, and the share of all positions that carry gradient.

        Args:
            prefix: what the scoring pass has left; None: computed here.
        """
        active = inputs.active[part.rows, : part.num_completion]
        wanted = torch.zeros_like(part.input_ids, dtype=torch.bool)
        # The state at a position predicts the token after it.
        wanted[:, -part.num_completion - 1 : -1] = active
        window = self._args.gradient_window
        assert window is not None
        with self._accelerator.autocast():
            # A NaN here is the loss's to find: an error would leave the trainer without states to go on with.
            sparse = sparse_states(
                student,
                part.input_ids,
                part.attention_mask,
                wanted,
                window=window,
                prefix=prefix,
                check_finite=False,
            )
            hidden = head_dtype(sparse.hidden)
        return _padded(hidden, active), sparse.share


def _padded(hidden: Float[Tensor, "m D"], active: Bool[Tensor, "b n"]) -> Float[Tensor, "b n D"]:
    # Zeros elsewhere: the loss reads active positions only, and needs the shape.
    padded = hidden.new_zeros(*active.shape, hidden.shape[-1])
    return padded.index_put(active.nonzero(as_tuple=True), hidden)


def _why_two_forwards(student: Any, num_processes: int, args: TeachabilityConfig) -> str:
    """Why the scoring pass cannot be the training forward, in words; empty: it can."""
    # A DDP or FSDP wrapper expects the backward of the forward that it ran last.
    if num_processes > 1:
        return "several processes train it"
    # What is drawn anew in each forward belongs to the training forward alone: selection reads the student
    # as it is.
    if args.neftune_noise_alpha:
        return "neftune_noise_alpha adds noise"
    return "it has dropout" if _drops_units(student) else ""


def _drops_units(student: Any) -> bool:
    """Whether two passes in training mode differ."""
    rates = [module.p for module in student.modules() if isinstance(module, nn.Dropout)]
    # Some families (OPT) have no dropout module: a function is called with a rate of the config. Rates of
    # heads that a language model lacks (summary, classifier) cost a forward and no more.
    config = student.config.get_text_config().to_dict()
    rates += [rate for name, rate in config.items() if "drop" in name or "jitter" in name]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)
