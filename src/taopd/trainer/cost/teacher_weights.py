"""Bytes of a teacher's weights on the device: whole, packed by quantization, or layer by layer.

    8bit    a byte a weight of a linear layer, and a float32 for each of its outputs
    4bit    half a byte, and a float32 for 64 weights
    offload what is no layer (embedding, last norm, head), and two layers in the scoring pass

Embedding, head, norms, biases and experts that are one tensor keep the teacher's dtype.
"""

from taopd.trainer.cost.settings import BYTES, PlanSettings
from taopd.trainer.cost.shapes import ModelShape

SCALE = 4
"""Bytes of a float32 scale."""
SLOTS, BLOCK = 2, 64
"""Of `models.offload` and `models.quantization`, which import torch: a plan does not."""


def held_bytes(teacher: ModelShape, settings: PlanSettings) -> float:
    """On the device all the time."""
    each = BYTES[settings.teacher_dtype]
    if settings.teacher_quantization is not None:
        packed, outputs = _linear_layers(teacher)
        rest = each * (teacher.num_parameters - packed)
        if settings.teacher_quantization == "8bit":
            return float(rest + packed + SCALE * outputs)
        return rest + packed / 2 + SCALE * packed / BLOCK
    if _moves(settings):
        return float(each * (teacher.num_parameters - _layer_parameters(teacher)))
    return float(each * teacher.num_parameters)


def moving_bytes(teacher: ModelShape, settings: PlanSettings) -> float:
    """On the device in the scoring pass alone."""
    if settings.teacher_elsewhere or not _moves(settings):
        return 0.0
    layer = _layer_parameters(teacher) / teacher.num_layers
    return SLOTS * BYTES[settings.teacher_dtype] * layer


def _moves(settings: PlanSettings) -> bool:
    return settings.teacher_offload and settings.device != "cpu"


def _layer_parameters(shape: ModelShape) -> int:
    """Of all layers: the body without its last norm."""
    return shape.body_parameters - shape.hidden_size


def _linear_layers(shape: ModelShape) -> tuple[int, int]:
    """Weights of the linear layers that are packed, and their outputs."""
    dense = shape.num_layers - shape.num_moe_layers
    weights = shape.num_layers * shape.attention_weights
    weights += dense * 3 * shape.hidden_size * shape.intermediate_size
    attention = shape.query_size + 2 * shape.key_size + shape.hidden_size
    feed_forward = 2 * shape.intermediate_size + shape.hidden_size
    return weights, shape.num_layers * attention + dense * feed_forward
