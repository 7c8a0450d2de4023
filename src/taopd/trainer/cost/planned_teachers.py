"""Several teachers in a plan: the weights of all of them, the compute of the largest for every row.

How many rows each will score is known to the dataset alone; the largest for all of them is the most that a
step can take.
"""

from collections.abc import Sequence
from dataclasses import replace

from taopd.errors import ConfigError
from taopd.trainer.cost.settings import PlanSettings
from taopd.trainer.cost.shapes import ModelShape
from taopd.trainer.cost.teacher_weights import held_bytes


def with_teachers(
    teachers: Sequence[tuple[ModelShape | None, PlanSettings]],
) -> tuple[ModelShape, PlanSettings]:
    """The teacher and the settings of a plan for a run with all of these.

    Args:
        teachers: each with the settings of a run with it alone; no shape: its config is not known, which only
            a teacher elsewhere may do without.

    Raises:
        ConfigError: no teacher has a known config.
    """
    known = [(shape, settings) for shape, settings in teachers if shape is not None]
    if not known:
        raise ConfigError(
            "the plan compares with full distillation, for which the teacher runs here: set "
            "teacher_model_name_or_path too (its config is read, no weights)"
        )
    # One that is here before one that is not: its states and its compute are here too.
    order = [(not settings.teacher_elsewhere, shape.num_parameters) for shape, settings in known]
    largest = order.index(max(order))
    others = [pair for place, pair in enumerate(known) if place != largest]
    shape, settings = known[largest]
    others_bytes = sum(
        held_bytes(other, each) for other, each in others if not each.teacher_elsewhere
    )
    several = len(teachers) > 1
    return shape, replace(
        settings, several_teachers=several, other_teacher_bytes=float(others_bytes)
    )
