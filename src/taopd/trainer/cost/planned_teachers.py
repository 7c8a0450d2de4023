"""Several teachers in a plan: the weights of all of them, the compute of the largest for every row.

How many rows each will score is known to the dataset alone; the largest for all of them is the most that a
step can take.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace

from taopd.errors import ConfigError
from taopd.trainer.cost.settings import PlanSettings
from taopd.trainer.cost.shapes import ModelShape
from taopd.trainer.cost.teacher_weights import held_bytes


def with_teachers(
    teachers: Sequence[tuple[ModelShape | None, PlanSettings, Hashable]],
) -> tuple[ModelShape, PlanSettings]:
    """The teacher and the settings of a plan for a run with all of these.

    Args:
        teachers: each with the settings of a run with it alone, and with what tells its weights from those
            of the others (`weights_of`). No shape: its config is not known, which only a teacher elsewhere
            may do without.
    """
    known = [one for one in teachers if one[0] is not None]
    if not known:
        raise ConfigError(
            "the plan compares with full distillation, for which the teacher runs here: set "
            "teacher_model_name_or_path too (its config is read, no weights)"
        )
    # One that is here before one that is not: its states and its compute are here too.
    known = sorted(known, key=_here_and_large, reverse=True)
    shape, settings, first = known[0]
    assert shape is not None
    held, others_bytes = {first}, 0.0
    for other, each, weights in known[1:]:
        # Of two names of the same weights one is counted.
        if not each.teacher_elsewhere and weights not in held:
            assert other is not None
            held.add(weights)
            others_bytes += held_bytes(other, each)
    several = len(teachers) > 1
    return shape, replace(
        settings, several_teachers=several, other_teacher_bytes=float(others_bytes)
    )


def _here_and_large(
    teacher: tuple[ModelShape | None, PlanSettings, Hashable],
) -> tuple[bool, int]:
    shape, settings, _ = teacher
    return not settings.teacher_elsewhere, shape.num_parameters if shape else 0
