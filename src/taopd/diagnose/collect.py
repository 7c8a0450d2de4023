"""An observer that collects the rollouts of a bank from a trainer."""

from taopd.diagnose.bank import NUM_COMPLETIONS, Rollouts
from taopd.errors import DataError, require
from taopd.models.batch import SEQUENCE, TEACHER_PROMPT
from taopd.trainer.scored_batch import ScoredBatch


class RolloutCollector:
    """Keeps the first completions that a trainer samples; an observer of `TeachabilityTrainer`.

    A bank's features must be those of the student before training, so freeze with that student and not
    with the one that training left. Completions of later steps were written by a student that had already
    moved: `rollouts` says of which steps they are.

    Example:
        >>> collector = RolloutCollector(num_completions=300)
        >>> trainer.observers.append(collector)  # doctest: +SKIP
    """

    def __init__(self, num_completions: int = NUM_COMPLETIONS) -> None:
        require(num_completions >= 1, "num_completions", num_completions, "at least 1")
        self._num_completions = num_completions
        self._prompts: list[list[int]] = []
        self._completions: list[list[int]] = []
        self._teachers: list[list[int]] = []
        self._steps: list[int] = []

    def __call__(self, scored: ScoredBatch) -> None:
        """Add completions of one generation batch, up to the requested number."""
        room = self._num_completions - len(self._completions)
        if room <= 0:
            return
        names = [name for name in (*SEQUENCE, *TEACHER_PROMPT) if name in scored.batch]
        rollouts = Rollouts.of_batch({name: scored.batch[name][:room] for name in names}, {})
        self._prompts += rollouts.prompt_ids
        self._completions += rollouts.completion_ids
        self._teachers += rollouts.teacher_prompt_ids or rollouts.prompt_ids
        self._steps.append(scored.step)

    def rollouts(self) -> Rollouts:
        """The collected rollouts.

        Raises:
            DataError: none were collected.
        """
        if not self._completions:
            raise DataError(
                "no completions were collected; add the collector to trainer.observers before train()"
            )
        return Rollouts(
            prompt_ids=self._prompts,
            completion_ids=self._completions,
            teacher_prompt_ids=self._teachers if self._teachers != self._prompts else None,
            settings={
                "source": "trainer",
                "num_completions": len(self._completions),
                "first_step": self._steps[0],
                "last_step": self._steps[-1],
            },
        )
