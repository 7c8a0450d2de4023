"""The demo on a real language model: four arms of one seed on the SmolLM2 pair, as a study."""

from typing import Any

from taopd.errors import ConfigError
from taopd.experiments.smollm2.pair import Pair
from taopd.experiments.smollm2.word_problems import MATCH, MAX_NEW_TOKENS
from taopd.experiments.study.file import StudyFile
from taopd.runs.host_memory import free_bytes

STEPS = 24
GIB_PER_ARM = 6.5
"""Resident memory of one arm at most; up to 6.4 GiB were measured (docs/results/smollm2-cpu.md)."""
CONFIG: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "constant",
    "max_completion_length": MAX_NEW_TOKENS,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "method": "published",
    "budget": 0.1,
}
ARMS: list[dict[str, Any]] = [
    {"name": "full", "selector": "full"},
    {"name": "published-10", "selector": "teachability"},
    {"name": "reach-10", "selector": "teachability", "method": "reach"},
    {"name": "random-10", "selector": "random"},
]


def real_study(pair: Pair, *, steps: int | None = None) -> StudyFile:
    """Full, published, reach and random at a tenth of the tokens; evaluated at the begin and the end."""
    steps = STEPS if steps is None else steps
    return StudyFile(
        title="SmolLM2-135M, two-step word problems",
        student=str(pair.student),
        teacher=str(pair.teacher),
        prompts=str(pair.prompts),
        match=MATCH,
        config=CONFIG | {"max_steps": steps},
        arms=ARMS,
        seeds=[0],
        evaluate_every=steps,
        num_test_prompts=100,
        evaluation_batch_size=100,
        random_control=False,
        full_control=False,
    )


def arms_that_fit() -> int:
    """How many arms fit side by side into the memory that this process may still use: 1 or 2.

    Raises:
        ConfigError: not even one.
    """
    free = free_bytes() / 2**30
    if free < GIB_PER_ARM:
        raise ConfigError(
            f"{free:.1f} GiB of memory are free, and one arm on SmolLM2-135M takes "
            f"{GIB_PER_ARM:.1f}: close other programs, or run taopd demo without --real"
        )
    return 2 if free >= 2 * GIB_PER_ARM else 1
