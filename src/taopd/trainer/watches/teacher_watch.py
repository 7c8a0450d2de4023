"""Watches the teacher during training: warns once when its distributions stop being a teacher's.

A teacher can fail in mid-run without an error: parameters that were freed, overwritten or reloaded, a server
that serves another model. Every later step then trains on noise. The looks read the signals of the generation
batch alone, so a teacher here and one behind a server are watched alike, at no cost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from taopd.signals import TokenSignals, taken
from taopd.trainer.scored_batch import ScoredBatch

FEWEST = 8
"""Tokens of a generation batch that are worth a look."""
SAME = 1e-4
"""Nats between two distributions that count as one: what float32 leaves between two forwards."""
ALIKE = 0.3
"""Nats between the lists of two models, rank by rank, below which they may be one in two precisions.

SmolLM2-135M in float32 and in bfloat16 are 0.09 apart, in 8 bits 0.12, before and after SFT 2.7. A student
that has learned the likely tokens of its teacher and no others had D = 0.002 and lists 2.9 apart."""
RECENT = 5
"""Generation batches with which the next one is compared: entropy with the first, D with the last ones."""
CAUSES = {
    "uniform": "the teacher gives every token the same probability (entropy {entropy:.2f} nats, the "
    "largest possible is {largest:.2f} nats{at_start}): its weights are lost. Usual "
    "causes: parameters freed by an offload or sleep mode and not loaded again, a failed weight update of "
    "the server, a teacher that the optimizer or another model overwrites",
    "constant": "the teacher gives the same distribution at every position: it does not read the text. Usual "
    "causes: lost embeddings or layers, a wrong attention mask, a server or proxy that repeats one answer",
    "student": "teacher and student give the same distributions (they differ by {disagreement:.2g} nats a "
    "token{earlier}): they are one model, and there is nothing to learn. "
    "Usual causes: shared weights, an adapter that is on for both or off for both, a server that was "
    "given the student",
    "changed": "the disagreement of student and teacher rose from {apart:.2g} to "
    "{disagreement:.2g} nats a token from one batch to the next: "
    "the teacher is another one, or the last update broke the student. Usual causes: lost or reloaded "
    "teacher weights, another model or adapter on the server; see also update/norm and learning_rate",
}
ADVICE = (
    ". Stop the run, and resume from a checkpoint of an earlier step once the teacher is mended"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a generation batch says about the teacher; nats."""

    entropy: float
    """Upper bound of its mean entropy: what its list leaves is spread evenly over the other ids."""
    disagreement: float
    """Mean D."""
    is_uniform: bool
    is_constant: bool
    """One distribution at all positions."""
    is_student: bool
    gap: float
    """Between both lists, rank by rank: mean over a position's ranks, median over positions."""

    @classmethod
    def at(cls, signals: TokenSignals, vocab_size: int) -> "Look":
        """Of the positions of one process."""
        ids, logprobs = signals.teacher_topk_ids, signals.teacher_topk_logprobs.double()
        probs = logprobs.exp()
        rest = (1.0 - probs.sum(1)).clamp_min(0.0)
        others = math.log(max(1, vocab_size - ids.shape[1]))
        entropy = (
            torch.special.entr(probs).sum(1) + torch.special.entr(rest) + rest * others
        ).mean()
        first, last = logprobs[:, 0], logprobs.masked_fill(ids < 0, math.inf).amin(1)
        at_student = signals.student_topk_logprobs.double()
        same_ids = torch.equal(ids, signals.student_topk_ids)
        # Both lists and not the sampled tokens: two models that are sure of a token agree on it alone.
        both = (ids >= 0) & (signals.student_topk_ids >= 0)
        apart = torch.where(both, logprobs - at_student, 0.0).abs()
        return cls(
            entropy=float(entropy),
            disagreement=float(signals.disagreement.double().mean()),
            is_uniform=bool(
                (first - last).max() < SAME and float(first[0]) < -others + math.log(2)
            ),
            is_constant=bool((ids[:, 0] == ids[0, 0]).all() and first.max() - first.min() < SAME),
            # Exactly: a student that has learned its teacher agrees with it to a few hundredths.
            is_student=same_ids and bool(apart.max() < SAME),
            gap=float((apart.sum(1) / both.sum(1).clamp_min(1)).median()),
        )


class TeacherWatch(TrainerCallback):
    """Looks at every generation batch in training; a failure is told once.

    Args:
        vocab_size: ids that teacher and student share.
        warn: takes (step, source, reason).
        name: of several teachers the one that is watched, at its own completions.
    """

    def __init__(
        self, vocab_size: int, warn: Callable[[int, str, str], None], name: str = ""
    ) -> None:
        self._vocab_size, self._warn, self.name = vocab_size, warn, name
        self._begin()

    def _begin(self) -> None:
        self._entropies: list[float] = []
        self._disagreements: list[float] = []
        self._suspicion = ""
        self._told: list[str] = []

    def __call__(self, scored: ScoredBatch) -> None:
        """Look at one generation batch."""
        signals = scored.signals
        if self.name:
            assert scored.of_teacher is not None
            own = scored.of_teacher.eq(scored.teachers.index(self.name))
            signals = taken(signals, own)
        if len(signals) >= FEWEST:
            self.update(scored.step, Look.at(signals, self._vocab_size))

    def update(self, step: int, look: Look) -> None:
        """Take note of a look; warn of a failure that is certain, or seen twice in a row."""
        finding, certain = self._finding(look)
        if not finding:
            self._suspicion = ""
            # Of the beginning, so that a slow loss shows as well; D falls with training, by design.
            self._entropies = [*self._entropies, look.entropy][:RECENT]
            self._disagreements = [*self._disagreements, look.disagreement][-RECENT:]
            return
        # One odd batch (short completions, one prompt) is not yet a failure of the teacher.
        if (certain or finding == self._suspicion) and finding not in self._told:
            self._told.append(finding)
            # The first batch has none before it.
            before, apart = median(self._entropies or [0.0]), median(self._disagreements or [0.0])
            reason = CAUSES[finding].format(
                entropy=look.entropy,
                largest=math.log(self._vocab_size),
                at_start=f"; at the start {before:.2f} nats" if self._entropies else "",
                disagreement=look.disagreement,
                earlier=f", before by {apart:.2g} nats" if self._disagreements else "",
                apart=apart,
            )
            of = f"teacher {self.name!r}: " if self.name else ""
            self._warn(step, "teacher", of + reason + ADVICE)
        self._suspicion = finding

    def _finding(self, look: Look) -> tuple[str, bool]:
        """Name of a failure or "", and whether one look is enough."""
        for name in ("uniform", "student", "constant"):
            if getattr(look, f"is_{name}"):
                return name, True
        if not self._disagreements:
            return "", False
        largest = math.log(self._vocab_size)
        # Both are relative: teachers differ by far in entropy, pairs in D.
        usual, apart = largest - median(self._entropies), median(self._disagreements)
        # Weights that were drawn anew are near to uniform, not on it.
        if largest - look.entropy < 0.2 * usual:
            return "uniform", False
        # D alone says little: once the student has learned, a few tokens make it, and a batch may have none.
        if look.disagreement < 0.02 * apart and look.gap < ALIKE:
            return "student", False
        if look.disagreement > max(5.0 * apart, apart + 1.0):
            return "changed", False
        return "", False

    # -- callback ---------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin()

    def checkpoint_state(self) -> dict[str, Any]:
        """What the next batch is compared with, and what was told."""
        return {
            "entropies": list(self._entropies),
            "disagreements": list(self._disagreements),
            "suspicion": self._suspicion,
            "told": list(self._told),
        }

    def load_checkpoint_state(self, state: dict[str, Any]) -> None:
        self._entropies, self._disagreements = state["entropies"], state["disagreements"]
        self._suspicion, self._told = state["suspicion"], state["told"]


class TeacherWatches(TrainerCallback):
    """The watches of several teachers as one callback: transformers warns of two of one class."""

    def __init__(self, watches: Sequence[TeacherWatch]) -> None:
        self._watches = list(watches)

    def __call__(self, scored: ScoredBatch) -> None:
        """Look at one generation batch, each at its own completions."""
        for watch in self._watches:
            watch(scored)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for watch in self._watches:
            watch.on_train_begin(args, state, control)

    def checkpoint_state(self) -> dict[str, dict[str, Any]]:
        """The state of each by name."""
        return {watch.name: watch.checkpoint_state() for watch in self._watches}

    def load_checkpoint_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Go on from `checkpoint_state()`; a teacher that was not there is watched from here on."""
        for watch in self._watches:
            if watch.name in state:
                watch.load_checkpoint_state(state[watch.name])
