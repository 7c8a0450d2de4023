"""What a step will cost, before it runs: memory by part, FLOPs by stage, and the ratio to full distillation.

From configs alone; no weights, no device. The ratio compares FLOP of matmuls, with the passes over logits as
the matmuls that take as long (`flops.py`): it is what time tends to when the hardware is busy, and not a
promise for small models, where norms and the launch of kernels count. Measured on one CPU thread against TRL
(`python -m benchmarks plan`, benchmarks/RESULTS.md): the ratio is planned 19 % low to 31 % high, memory 11 %
low to 8 % high, with a wide vocabulary over a narrow model (width 256, 32,000 ids) and where head and
backbone are balanced (width 768, 8,000 ids).
Peak of whole runs on a CPU, libraries included, on 135 M parameters with 49,152 ids: planned 3 to 13 % low
(`--whole`: one and four micro-batches, a window, checkpointing, no anchor), which the allocator makes up.
`flops.py` and `memory.py` say what each number leaves out.

    one micro-batch      the student's scoring pass is its training forward (no window) or the key/value
                         prefix (window)
    several              without a window each micro-batch runs forward once more; with one the prefix of
                         the scoring pass is held for all of them, or computed again (`keep_prefix`)

Every sequence is taken to be as long as allowed, the selection to be random and uniform. Real selections
cluster, share their windows and cost less.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from taopd.trainer.cost.communication import Communication, step_communication
from taopd.trainer.cost.flops import StepCost, step_cost, trl_cost
from taopd.trainer.cost.known_shapes import SHAPES, check_unpacked, load_shape
from taopd.trainer.cost.memory import Memory, step_memory
from taopd.trainer.cost.settings import PlanSettings, gradient_share
from taopd.trainer.cost.shapes import ModelShape

__all__ = [
    "SHAPES",
    "ModelShape",
    "Plan",
    "PlanSettings",
    "check_unpacked",
    "gradient_share",
    "load_shape",
    "plan",
]

WINDOWS = (None, 0, 4, 8, 32)
"""Always compared; the configured one is added."""
MIB = 2.0**20


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRatio:
    """One value of `gradient_window` against TRL's full distillation; below 1 is cheaper."""

    window: int | None
    gradient_share: float
    """Of all positions of the batch, prompts included."""
    activations_mib: float
    update_ratio_one: float
    """Student update (all but sampling and the teacher's backbone), generation batch = one micro-batch."""
    update_ratio_several: float
    step_ratio_one: float
    """Whole step, sampling included."""
    step_ratio_several: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer; `as_dict` is what `taopd plan --json` prints."""

    student: ModelShape
    teacher: ModelShape
    settings: PlanSettings
    memory: Memory
    cost: StepCost
    """Of the configured window and number of micro-batches, TFLOP."""
    full_cost: StepCost
    """Of TRL's full distillation, TFLOP."""
    windows: tuple[WindowRatio, ...]
    communication: Communication

    def as_dict(self) -> dict[str, Any]:
        """Plain values, units in the names."""
        return {
            "student": asdict(self.student) | {"num_parameters": self.student.num_parameters},
            "teacher": asdict(self.teacher) | {"num_parameters": self.teacher.num_parameters},
            "settings": asdict(self.settings),
            "memory_mib": {name: size / MIB for name, size in self.memory.parts.items()},
            "phase_mib": {name: size / MIB for name, size in self.memory.phases.items()},
            "peak_mib": self.memory.peak / MIB,
            "tflop": asdict(self.cost) | {"update": self.cost.update, "total": self.cost.total},
            "full_tflop": asdict(self.full_cost)
            | {"update": self.full_cost.update, "total": self.full_cost.total},
            "moved_mib": {name: size / MIB for name, size in self.communication.moved.items()},
            "sent_mib": {name: size / MIB for name, size in self.communication.sent.items()},
            "windows": [asdict(row) for row in self.windows],
        }


def plan(student: ModelShape, teacher: ModelShape, settings: PlanSettings) -> Plan:
    """Memory, compute and ratios of one optimizer step of `TeachabilityTrainer`.

    Example:
        >>> settings = PlanSettings(batch=1, prompt_length=128, completion_length=1920, window=4)
        >>> result = plan(SHAPES["Qwen3-1.7B"], SHAPES["Qwen3-4B"], settings)
        >>> [row.window for row in result.windows]
        [None, 0, 4, 8, 32]
    """
    full = trl_cost(student, teacher, settings)
    numbers = sorted(value for value in {*WINDOWS, settings.window} if value is not None)
    rows = []
    for window in (None, *numbers):
        of_window = student, teacher, replace(settings, window=window)
        once = settings.num_iterations == 1
        one, several = (step_cost(*of_window, shared_forward=shared) for shared in (once, False))
        memory = step_memory(*of_window)
        rows.append(
            WindowRatio(
                window=window,
                gradient_share=gradient_share(settings, window),
                activations_mib=memory.parts["activations"] / MIB,
                update_ratio_one=one.update / full.update,
                update_ratio_several=several.update / full.update,
                step_ratio_one=one.total / full.total,
                step_ratio_several=several.total / full.total,
            )
        )
    return Plan(
        student=student,
        teacher=teacher,
        settings=settings,
        memory=step_memory(student, teacher, settings),
        cost=step_cost(student, teacher, settings, shared_forward=settings.shared_forward),
        full_cost=full,
        windows=tuple(rows),
        communication=step_communication(student, teacher, settings),
    )
