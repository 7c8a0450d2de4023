"""Where a teacher in this process is held: device, host memory, in parts."""

import logging
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from taopd.distributed.sharding import prepare_frozen, shards_frozen
from taopd.errors import ConfigError
from taopd.models.offload import LayerOffload
from taopd.trainer.config import TeachabilityConfig

logger = logging.getLogger(__name__)

NO_EFFECT = (
    "this run is on the CPU, in whose memory the teacher is anyway: teacher_offload has no effect"
)


def place_teacher(
    accelerator: Accelerator, teacher: PreTrainedModel, args: TeachabilityConfig
) -> tuple[Any, LayerOffload | None]:
    """The frozen teacher, ready to run on this device, and what moves its layers if `teacher_offload` is set.

    Raises:
        ConfigError: ZeRO-3, and a teacher that is packed or in host memory.
    """
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
