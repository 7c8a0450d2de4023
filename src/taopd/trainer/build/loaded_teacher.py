"""The models of a run's teachers that run here: two names of the same weights hold them once.

    the same      model, revision, options of loading, quantization, offload; in Python also the same object
each its own  rows, metrics, factor of the loss, share of the budget
"""

import json
import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taopd.distributed.sharding import is_sharded, prepare_frozen, shards_frozen
from taopd.errors import ConfigError
from taopd.models.load_options import current_names
from taopd.models.offload import LayerOffload
from taopd.models.output_head import require_backbone
from taopd.runs.paths import one_place
from taopd.teachers import load_teacher
from taopd.trainer.checkpoint.same_start import samples_of
from taopd.trainer.config import TeachabilityConfig

logger = logging.getLogger(__name__)

NO_EFFECT = (
    "this run is on the CPU, in whose memory the teacher is anyway: teacher_offload has no effect"
)


def weights_of(args: TeachabilityConfig, shared: Mapping[str, Any] | None = None) -> Hashable:
    """What tells the weights of one teacher from those of another; None: it is elsewhere.

    Args:
        args: of a run with this teacher alone.
        shared: options of loading that its own win over.
    """
    name = args.teacher_model_name_or_path
    if args.teacher_url is not None or name is None:
        return None
    # As `load_teacher` completes them.
    options = {"dtype": "float32", "revision": args.teacher_model_revision or "main"}
    options |= {key: value for key, value in (shared or {}).items() if value is not None}
    options |= current_names(args.teacher_model_init_kwargs)
    options["dtype"] = str(options["dtype"]).removeprefix("torch.")
    text = json.dumps(options, sort_keys=True, default=repr)
    return one_place(name), text, args.teacher_quantization, args.teacher_offload


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTeacher:
    """One teacher's model."""

    plain: PreTrainedModel
    """As it was loaded."""
    vocab_size: int
    """Ids that it shares with the student."""
    model: Any
    """The same, prepared for this device."""
    offload: LayerOffload | None
    """Moves its layers, if they stay in host memory."""
    samples: list[list[float]] | None
    """Of its weights; see `same_start`. None: packed weights depend on the machine that packed them."""
    in_parts: bool
    """ZeRO-3 divides its weights."""


class LoadedTeachers:
    """Loads and places the teachers of one run.

    Args:
        student: its vocabulary is what all must share.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
    ) -> None:
        self._student, self._tokenizer = student, tokenizer
        self._accelerator = accelerator
        self._known: dict[Hashable, tuple[LoadedTeacher, str | None]] = {}

    def of(self, teacher: str | PreTrainedModel, args: TeachabilityConfig) -> LoadedTeacher:
        """The model of one teacher.

        Args:
            teacher: its path, hub id or model; args: of a run with it alone.
        """
        is_path = isinstance(teacher, str)
        key: Hashable = weights_of(args) if is_path else id(teacher)
        if key in self._known:
            found, offload = self._known[key]
            if offload != args.teacher_offload:
                raise ConfigError(
                    "two teachers are one model, and offload is set for one of them only: set it for both, "
                    "or load the model twice"
                )
            return found
        plain, vocab_size = load_teacher(
            teacher,
            self._student,
            self._tokenizer,
            revision=args.teacher_model_revision,
            init_kwargs=args.teacher_model_init_kwargs,
            quantization=args.teacher_quantization,
            cut_renamed_control_tokens=args.cut_renamed_control_tokens,
        )
        require_backbone("teacher", plain)
        samples = None if args.teacher_quantization else samples_of(plain).tolist()
        # Sharded like the student where that is sharded: a whole teacher would undo the saving.
        model, offload_of = place_teacher(self._accelerator, plain, args)
        found = LoadedTeacher(
            plain=plain,
            vocab_size=vocab_size,
            model=model,
            offload=offload_of,
            samples=samples,
            in_parts=any(map(is_sharded, plain.parameters())),
        )
        self._known[key] = found, args.teacher_offload
        return found


def place_teacher(
    accelerator: Accelerator, teacher: PreTrainedModel, args: TeachabilityConfig
) -> tuple[Any, LayerOffload | None]:
    """The frozen teacher, ready to run on this device; what moves its layers if `teacher_offload` is set."""
    if shards_frozen(accelerator):
        for name in ("teacher_quantization", "teacher_offload"):
            if getattr(args, name):
                raise ConfigError(
                    f"{name} does not go with ZeRO-3, which holds the teacher in parts on all devices: leave "
                    "it out, or use ZeRO-2"
                )
    moves = args.teacher_offload is not None and accelerator.device.type != "cpu"
    if args.teacher_offload is not None and not moves:
        logger.info(NO_EFFECT)
    placed = prepare_frozen(accelerator, teacher, move=not moves)
    return placed, LayerOffload(teacher, accelerator.device) if moves else None
