"""NaN and infinity in a run: found before the update, saved for inspection, and a stop or a skipped step.

    logits of student or teacher   the scoring pass; the whole generation batch is left out
    loss                           every micro-batch
    gradient                       after the last backward of a step, before clipping

All processes decide together: one that stopped alone would leave the others waiting. A step is skipped by
taking the gradients away, which every torch optimizer reads as "leave this parameter as it is": no momentum,
no weight decay. Schedule, data and step count go on. The same happens to a batch in which no token trains:
it is data, not an error. Not here: fp16 overflow, which the gradient scaler treats by itself; a gradient that
is still bad at a scale below 1 is no overflow.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import TrainerCallback

from taopd.distributed.sharding import full_tensor
from taopd.errors import ConfigError, DataError, NumericsError
from taopd.kernels import Head
from taopd.models.batch import SEQUENCE, TEACHER_PROMPT, unpadded
from taopd.runs.jsonl import write_json
from taopd.trainer.checkpoint.fsdp import within_backward
from taopd.trainer.checkpoint.state_file import save_tree
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.step_metrics import Recorder

logger = logging.getLogger(__name__)

FOLDER = "bad_numbers"
_NAMED = 10
"""Parameters that a report names."""


class NonFiniteGuard(TrainerCallback):
    """The check of one trainer for NaN and infinity.

    Args:
        tokenizer: writes the rollouts out.

    Raises:
        ConfigError: steps cannot be skipped by what updates within the backward, as DeepSpeed.
    """

    def __init__(
        self, args: TeachabilityConfig, accelerator: Accelerator, tokenizer: Any, recorder: Recorder
    ) -> None:
        self._args, self._accelerator = args, accelerator
        self._tokenizer, self._recorder = tokenizer, recorder
        self._within_backward = within_backward(args, accelerator)
        if self._within_backward and args.on_bad_numbers == "skip":
            raise ConfigError(
                f"on_bad_numbers='skip' does not work with {self._within_backward}, which updates within the "
                "backward"
            )
        # TRL puts an end token into an empty completion, so that the mask does not tell.
        self._empty: list[bool] | None = None
        self._batch: Mapping[str, Any] = {}
        self.void = False
        """Nothing of the generation batch trains."""
        self._why = ""
        self._problem: NumericsError | None = None
        """Of this process, in the step that runs."""
        self._skips = False
        self._in_a_row = self._skipped = 0

    # -- what the trainer tells -------------------------------------------------------------------

    def sampled(self, completions: list[list[int]]) -> None:
        """Take note of what was sampled; of several turns the first counts."""
        # A tool loop samples several times for one batch.
        if self._empty is None:
            self._empty = [not ids for ids in completions]

    def forget(self) -> None:
        """Drop the note of `sampled`, where no batch comes of it."""
        self._empty = None

    def with_tokens(self, mask: Bool[Tensor, "B T"], training: bool) -> Bool[Tensor, "B 1"]:
        """False in the rows in which nothing was sampled: TRL was given an end token there to look at."""
        empty, self._empty = self._empty or [False] * len(mask), None
        # An evaluation between two steps on one generation batch changes nothing of what is known of it.
        if training:
            self._why = ""
        self._recorder.add("rollout/empty_completions", sum(empty) / len(empty))
        return ~torch.tensor(empty, device=mask.device).unsqueeze(1)

    def scored(
        self, problem: NumericsError | None, batch: Mapping[str, Any], step: int, training: bool
    ) -> bool:
        """Whether the generation batch must be left out, on any process.

        Raises:
            NumericsError: it must, and on_bad_numbers is "stop" or this is an evaluation.
        """
        both = (*SEQUENCE, *TEACHER_PROMPT)
        if training or problem is not None:
            self._batch = {name: batch[name] for name in both if name in batch}
        # A collective: all processes come here, whatever they found.
        if not self._anywhere(problem is not None):
            return False
        self._tell(problem, step, stop=not training)
        self._why = "bad numbers"
        return True

    def chosen(self, trains: bool) -> None:
        """Take note of whether any token of a batch in training trains, on any process: with none there is no
        update."""
        self.void = not trains
        if self.void and not self._why:
            self._why = "no token to train on"

    def zero_loss(self, problem: NumericsError, hidden: Tensor, head: Head) -> Float[Tensor, ""]:
        """A loss of 0 in place of a bad one; the step goes on to its end, where all processes decide.

        Args:
            hidden: the student's states, and its head: what the bad loss was computed from. No forward is run
                again: under FSDP2 it would wait for processes whose loss is good.

        Returns:
            0, with a graph through the whole student, so that the backward meets the other processes'.

        Raises:
            NumericsError: the problem itself, in an evaluation and where weights move within the backward.
        """
        if self._within_backward or not torch.is_grad_enabled():
            raise problem
        self._problem = self._problem or problem
        parts = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
        # 0 whatever the parts hold: NaN times 0 would be NaN.
        return torch.stack([p.float().nan_to_num(0.0).clamp(0.0, 0.0).sum() for p in parts]).sum()

    def end_of_backward(self, model: torch.nn.Module, step: int) -> None:
        """Look at the gradients of a step, before they are clipped.

        Raises:
            NumericsError: loss or gradient is bad and on_bad_numbers is "stop".
        """
        self._skips = self.void
        problem, self._problem = self._problem, None
        if not self._within_backward and not self.void:
            scaler = self._accelerator.scaler
            # Overflow is the scaler's to mend, as long as it multiplies.
            if scaler is None or scaler.get_scale() < 1.0:
                # On every process, whatever its loss: norms of sharded gradients need all of them.
                found = _gradient_problem(model, step)
                problem = problem or found
            if self._anywhere(problem is not None):
                self._tell(problem, step)
                self._why, self._skips = "bad numbers", True
        self._recorder.add("numerics/skipped", float(self._skips))

    def _anywhere(self, found: bool) -> bool:
        flag = torch.tensor([float(found)], device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag, reduction="sum").item())

    def _tell(self, problem: NumericsError | None, step: int, *, stop: bool = False) -> None:
        """Save and warn; or save and raise, the same on every process."""
        where = "the process that found it has saved its batch"
        if problem is not None:
            where = f"the batch is in {self._save(problem, step)}"
        text = str(problem or "NaN or infinity on another process; its message says where")
        if stop or self._args.on_bad_numbers == "stop":
            error = NumericsError(f"{text}; no update was made; {where}")
            error.together = True
            raise error
        logger.warning("step %d makes no update: %s; %s", step, text, where)

    def _save(self, problem: NumericsError, step: int) -> Path:
        """Write the generation batch and what is known about the place."""
        folder = Path(self._args.output_dir) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        process = self._accelerator.process_index
        name = f"step-{step:06d}" + (f"-rank-{process}" if process else "")
        every = range(len(self._batch["completion_ids"]))
        # A bad gradient has no place: the whole batch is what is known.
        rows = every if problem.completion is None else [problem.completion]
        about = {
            "step": step,
            "process": process,
            "problem": str(problem),
            "completion": problem.completion,
            "position": problem.position,
            "rollouts": [self._rollout(row) for row in rows],
            "tensors": f"{name}.safetensors",
        }
        save_tree(folder / f"{name}.safetensors", dict(self._batch))
        write_json(folder / f"{name}.json", about)
        return folder / f"{name}.json"

    def _rollout(self, row: int) -> dict[str, Any]:
        prompt, completion = (unpadded(self._batch, name, row) for name in ("prompt", "completion"))
        return {
            "completion_index": row,
            "prompt": self._tokenizer.decode(prompt),
            "prompt_ids": prompt,
            "completion": self._tokenizer.decode(completion),
            "completion_ids": completion,
        }

    # -- callback ---------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # An earlier call of `train` may have ended in the middle of a step.
        self._empty, self._problem, self.void = None, None, False
        self._in_a_row = self._skipped = 0

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self._skips:
            optimizer.zero_grad(set_to_none=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._skips:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self._skipped += 1
        if state.is_world_process_zero:
            logger.warning(
                "step %d made no update (%s); %d so far",
                state.global_step,
                self._why,
                self._skipped,
            )
        if self._in_a_row >= self._args.max_skipped_steps:
            count, self._in_a_row = self._in_a_row, 0
            raise self._too_many(count, state.global_step)

    def _too_many(self, count: int, step: int) -> DataError | NumericsError:
        text = (
            f"step {step}: {count} steps in a row made no update (max_skipped_steps), the last for "
        )
        error: DataError | NumericsError
        if self._why == "bad numbers":
            error = NumericsError(f"{text}NaN or infinity; see {self._args.output_dir}/{FOLDER}")
        else:
            error = DataError(
                f"{text}want of a token to train on: the completions are empty, or masked throughout; "
                "check the student's end-of-sequence ids, max_completion_length and the tool mask"
            )
        error.together = True
        return error

    def checkpoint_state(self) -> dict[str, Any]:
        """Counts, and what the generation batch was found to be."""
        counts = {"in_a_row": self._in_a_row, "skipped": self._skipped}
        return counts | {"void": self.void, "why": self._why}

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        self._in_a_row, self._skipped = state["in_a_row"], state["skipped"]
        self.void, self._why = state["void"], state["why"]


def _gradient_problem(model: torch.nn.Module, step: int) -> NumericsError | None:
    """None if the norm of all gradients is finite; else an error that names the parameters."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients or bool(full_tensor(torch.nn.utils.get_total_norm(gradients)).isfinite()):
        return None
    # Only now name by name: the norm above is one reduction, and almost always finite.
    bad = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not bool(full_tensor(p.grad.isfinite().all()))
    ]
    what = f"{len(bad)} parameters, first {', '.join(bad[:_NAMED])}" if bad else "their norm alone"
    return NumericsError(f"step {step}: the gradient is NaN or infinite ({what})")
