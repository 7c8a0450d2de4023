"""The student as its own teacher: as it was before training (`self`), or a moving average (`self_ema`).

Only with a prompt of the teacher's own (`models.teacher_prompts`): without one teacher and student are one
model, every loss is 0, and an optimizer would scale up the rounding errors of its gradient.

    student            `self`                                  `self_ema`
    whole model        a frozen copy, the anchor's too         a copy that follows the student
    LoRA adapter       the student, adapter as before          the student, adapter as averaged
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, TrainerCallback

from taopd.distributed.sharding import full_tensor
from taopd.errors import ConfigError, DataError
from taopd.kernels import Head
from taopd.trainer.checkpoint.fsdp import layout_of
from taopd.trainer.checkpoint.state_file import load_tree, save_tree
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.reference_student import ReferenceStudent
from taopd.trainer.settings.teacher_names import OWN_TEACHERS

FILE = "teacher_ema.safetensors"
"""In a checkpoint: the averaged weights, float32."""


class AdapterTeacher:
    """The teacher of a student with an adapter: the student itself, other weights in its adapter.

    Stands where a model stands; `BaseTrainer.forward_states` knows how to run it.

    Args:
        student: gives the student as it runs now, in its wrapper.
    """

    def __init__(
        self, reference: ReferenceStudent, student: Callable[[], Any], model: PreTrainedModel
    ) -> None:
        self._reference, self._student = reference, student
        self.config, self.generation_config = model.config, model.generation_config

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Of the student as it runs: a pass of this teacher computes with as many."""
        return iter(self._student().parameters())

    def weights(self) -> AbstractContextManager[Any]:
        """Context of the model to run, in its wrapper."""
        return self._reference.weights(self._student())

    def head(self, head_of: Callable[[Any], Head]) -> Head:
        """The teacher's head; see `ReferenceStudent.head`."""
        return self._reference.head(head_of, self._student())


class MovingAverage(TrainerCallback):
    """Exponential moving average of the weights that train, in float32.

        average <- decay * average + (1 - decay) * weight        after every optimizer step

    Args:
        averages: the reference whose weights become the average.
        model: the student, before training.
    """

    def __init__(
        self,
        averages: ReferenceStudent,
        model: PreTrainedModel,
        accelerator: Accelerator,
        decay: float,
    ) -> None:
        self._reference, self._accelerator, self._decay = averages, accelerator, decay
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        if averages.copy is not None:
            inner = accelerator.unwrap_model(averages.copy)
            self._held = {name: w.data for name, w in inner.named_parameters() if name in trained}
        else:
            self._held = averages.start
        # In 16 bits a small step would be rounded away.
        self._average = {name: held.float() for name, held in self._held.items()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        student = self._accelerator.unwrap_model(kwargs["model"])
        for name, weight in student.named_parameters():
            if name in self._average:
                average = self._average[name]
                now = full_tensor(weight.detach()).to(average.device, torch.float32)
                average.lerp_(now, 1.0 - self._decay)
        self._hold()

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        save_tree(folder / FILE, dict(self._average))

    def load(self, folder: Path) -> None:
        """Go on with the average of a checkpoint."""
        stored = load_tree(folder / FILE)
        shapes = {name: value.shape for name, value in self._average.items()}
        if {name: value.shape for name, value in stored.items()} != shapes:
            raise DataError(f"{folder / FILE} is the average of another model")
        for name, value in stored.items():
            self._average[name].copy_(value)
        self._hold()

    def _hold(self) -> None:
        for name, average in self._average.items():
            if average is not self._held[name]:
                self._held[name].copy_(average)
        self._reference.forget_head()


class OwnTeacher:
    """What a trainer holds of a student that is its own teacher.

    Args:
        args: name one of `OWN_TEACHERS`.
        student: before training; `wrapped` gives it as it runs.

    Raises:
        ConfigError: `self_ema` under DeepSpeed.
    """

    def __init__(
        self,
        args: TeachabilityConfig,
        student: PreTrainedModel,
        accelerator: Accelerator,
        wrapped: Callable[[], Any],
    ) -> None:
        kind, reference = args.teacher_model_name_or_path, ReferenceStudent(student, accelerator)
        self.start: ReferenceStudent | None = reference if kind == "self" else None
        """The student before training, if this teacher is that."""
        self.plain: PreTrainedModel | None = None
        """A copy, outside any wrapper."""
        self.model: Any = reference.copy
        """What scoring runs."""
        if reference.copy is None:
            self.model = AdapterTeacher(reference, wrapped, student)
        else:
            self.plain = accelerator.unwrap_model(reference.copy)
        self.average: MovingAverage | None = None
        if kind == "self_ema":
            if layout_of(accelerator) == "deepspeed":
                raise ConfigError(
                    "teacher self_ema: DeepSpeed keeps the weights to itself, so that no average can follow "
                    "them; take teacher self, or DDP or FSDP2"
                )
            self.average = MovingAverage(reference, student, accelerator, args.teacher_ema_decay)

    @classmethod
    def of(cls, args: TeachabilityConfig, *parts: Any) -> "OwnTeacher | None":
        """The student as its own teacher, None where the settings name another one."""
        return cls(args, *parts) if args.teacher_model_name_or_path in OWN_TEACHERS else None
