"""The description of one arm of a comparison, and the problems it is graded on."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from taopd.errors import DataError
from taopd.models.prompts import load_prompts
from taopd.runs.jsonl import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """The description of one arm; plain values that convert to JSON."""

    name: str
    seed: int
    config: dict[str, Any]
    """Fields of `TeachabilityConfig` without output_dir and seed, and of `trl.ModelConfig`: `arm_student`."""
    student: str
    teacher: str
    prompts: str
    """File or hub name with prompt, answer and the splits "train" and "test"."""
    match: str
    """How a completion is graded; see `taopd.experiments.evaluation.evaluate`."""
    evaluate_every: int
    """Optimizer steps between two evaluations; also before the first and after the last step."""
    num_test_prompts: int
    token_kinds: list[str] | None = None
    """Kind of each token id, for the tally of what was kept."""
    save_model: bool = False
    test_prompts: str | None = None
    """Evaluation set of its own; default the split "test" of `prompts`."""
    max_new_tokens: int | None = None
    """Of evaluation; default `max_completion_length`."""
    evaluation_batch_size: int | None = None
    """Completions generated together; default all."""
    max_selected_tokens: int | None = None
    """Stop at the first step with this many kept tokens, summed over generation batches."""
    max_seconds: float | None = None
    """Stop at the first step after so many seconds of training, evaluations left out."""

    @property
    def folder_name(self) -> str:
        """Name of the arm's folder below its comparison's."""
        return f"{self.name}-seed{self.seed}"


def load_problems(arm: Arm):
    """The arm's evaluation problems, the first `num_test_prompts` of them.

    Raises:
        DataError: no answers, or fewer problems than asked for.
    """
    name = arm.test_prompts or arm.prompts
    rows = load_prompts(name, split=None if arm.test_prompts else "test", require_answer=True)
    if len(rows) < arm.num_test_prompts:
        raise DataError(
            f"{name} has {len(rows)} test problems: num_test_prompts={arm.num_test_prompts} is too many"
        )
    return rows.select(range(arm.num_test_prompts))


def write_arm(arm: Arm, folder: Path) -> None:
    """Put `arm.json` into the arm's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "arm.json", asdict(arm))
