"""Gain per token: the fall of KL(teacher, student) by training, at the bank's fixed contexts.

    gain_forward = KL(p_T || p_S,before) - KL(p_T || p_S,after)     full vocabulary, nats, positive = better
    gain_reverse = KL(p_S,before || p_T) - KL(p_S,after || p_T)
    *_share      = gain / (KL_before + 1e-12)

Both units are always given, because they order learnable and incompatible tokens differently: in nats the
tokens with a large initial KL come first, as a share those with a small one. Tokens whose initial KL is near
zero dominate a mean of per-token shares, so a summary pools them (sum of gains over sum of KL).

A gain that is not finite is NaN in its row, counted and logged, and is in no mean.

Source: docs/math.md, "The diagnostic"; eq. 1 of arXiv 2605.26844 (nats) and the released code (share).
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taopd.diagnose.bank import FixedContextBank
from taopd.diagnose.bank.score import divergences, measuring
from taopd.diagnose.features import GAINS, default_k, discover_ks
from taopd.errors import DataError
from taopd.models.forward import State
from taopd.models.loading import VOCABULARY_FILES, load_model, load_tokenizer
from taopd.runs.checkpoints import step_of
from taopd.runs.paths import has_any

logger = logging.getLogger(__name__)

SHARE_EPSILON = 1e-12
"""Added to the initial KL, nats. [docs/math.md, "The diagnostic"]"""
LEARNABLE_COMPATIBILITY = 0.5
"""More than half of the teacher's mass on the student's support is called learnable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointGain:
    """The bank's tokens with the gains of one checkpoint: one point of a curve."""

    label: str
    step: int | None
    """Optimizer steps of the checkpoint, where it says so."""
    tokens: pd.DataFrame
    """The bank's tokens plus `GAINS`, `forward_kl_after` and `reverse_kl_after`; NaN = not finite."""

    @property
    def measured(self) -> pd.DataFrame:
        """The rows whose gains are finite."""
        return self.tokens[self.tokens[list(GAINS)].notna().all(axis=1)]

    @property
    def num_excluded(self) -> int:
        return len(self.tokens) - len(self.measured)

    def summary(self) -> dict[str, Any]:
        """Means over the measured tokens: nats, pooled shares, learnable and incompatible apart."""
        return {
            "label": self.label,
            "step": self.step,
            "num_tokens": len(self.tokens),
            "num_excluded": self.num_excluded,
        } | summarize(self.measured)


def summarize(tokens: pd.DataFrame, *, k: int | None = None) -> dict[str, float]:
    """Mean gains (nats) and pooled shares of all tokens, the learnable and the incompatible ones.

    Keys are `gain_<direction>_<unit>/<group>`; groups as in `learnable_groups`. NaN for an empty group.
    """
    values: dict[str, float] = {}
    for direction in ("forward", "reverse"):
        for group, rows in learnable_groups(tokens, k=k).items():
            part = tokens[rows]
            gain = float(part[f"gain_{direction}"].mean())
            initial = float(part[f"{direction}_kl"].mean())
            values[f"gain_{direction}_nats/{group}"] = gain
            values[f"gain_{direction}_share/{group}"] = gain / (initial + SHARE_EPSILON)
    return values


def learnable_groups(tokens: pd.DataFrame, *, k: int | None = None) -> dict[str, np.ndarray]:
    """Row masks of the groups "mean" (all tokens), "learnable" and "incompatible".

    The last two are the tokens with D at or above the bank's median (quadrants 1 and 3), with C above
    and at most 0.5. Tokens where the models agree are in neither.

    Args:
        k: support size of D and C; default 16 if the bank has it, else its largest.

    Raises:
        DataError: if the bank has no such k.
    """
    chosen = default_k(tokens) if k is None else k
    sizes = discover_ks(tokens)
    if chosen not in sizes:
        raise DataError(f"k={chosen}: the bank has {', '.join(map(str, sizes))}")
    disagree = tokens[f"quadrant_k{chosen}"].isin((1, 3)).to_numpy()
    compatible = (tokens[f"compatibility_k{chosen}"] > LEARNABLE_COMPATIBILITY).to_numpy()
    return {
        "mean": np.ones(len(tokens), dtype=bool),
        "learnable": disagree & compatible,
        "incompatible": disagree & ~compatible,
    }


def gain_tokens(
    bank: FixedContextBank, forward_after: np.ndarray, reverse_after: np.ndarray, *, label: str
) -> pd.DataFrame:
    """The bank's tokens with the gain columns; logs how many gains are not finite, and the first."""
    tokens = bank.tokens.copy()
    for direction, after in (("forward", forward_after), ("reverse", reverse_after)):
        before = tokens[f"{direction}_kl"].to_numpy()
        gain = before - after
        tokens[f"gain_{direction}"] = gain
        tokens[f"gain_{direction}_share"] = gain / (before + SHARE_EPSILON)
        tokens[f"{direction}_kl_after"] = after
    bad = ~np.isfinite(tokens[list(GAINS)].to_numpy()).all(axis=1)
    if bad.any():
        tokens.loc[bad, list(GAINS)] = np.nan
        logger.warning(
            "%s: %d of %d gains are not finite and excluded, the first at %s",
            label,
            bad.sum(),
            len(bad),
            bank.locate(int(bad.argmax())),
        )
    return tokens


def model_gain(
    bank: FixedContextBank,
    model: Any,
    teacher_states: Iterable[State],
    *,
    label: str,
    step: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointGain:
    """Gain of a model in memory.

    Args:
        teacher_states: from `teacher_states`, a list where several models are compared.
    """
    with measuring(model):
        after = divergences(
            bank.states(model),
            teacher_states,
            num_tokens=len(bank.tokens),
            temperature=bank.temperature,
            locate=bank.locate,
            progress=progress,
        )
    return CheckpointGain(label=label, step=step, tokens=gain_tokens(bank, *after, label=label))


def teacher_states(bank: FixedContextBank, teacher: Any) -> Iterable[State]:
    """The teacher's states at the bank's tokens, computed lazily.

    Raises:
        DataError: it is not the bank's teacher.
    """
    bank.check_model("teacher", teacher)
    return bank.states(teacher, of_teacher=True)


def measure_gains(
    bank: FixedContextBank,
    checkpoints: Sequence[str | Path],
    teacher: PreTrainedModel,
    *,
    device: Any = "cpu",
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> list[CheckpointGain]:
    """Gains of checkpoints (folders or hub ids, LoRA adapters too), in the order given: a curve.

    Each is loaded in the dtype of the bank's student, so that rounding is no gain. With several of them
    the teacher's states are kept: tokens times its width.

    Args:
        progress: called with (checkpoint, positions done, positions in all).

    Raises:
        DataError: no checkpoint, one that cannot be read or has another vocabulary, or another teacher.
    """
    if not checkpoints:
        raise DataError("no checkpoint: name at least one")
    gains: list[CheckpointGain] = []
    with measuring(teacher):
        states = teacher_states(bank, teacher)
        if len(checkpoints) > 1:
            states = list(states)
        for label, checkpoint in zip(_labels(checkpoints), checkpoints, strict=True):
            model = load_checkpoint(bank, checkpoint).to(device)
            gain = model_gain(
                bank,
                model,
                states,
                label=label,
                step=step_of(Path(checkpoint)),
                progress=partial(progress, label),
            )
            gains.append(gain)
            del model  # or it would stay in memory while the next one is loaded
    return gains


def load_checkpoint(bank: FixedContextBank, checkpoint: str | Path) -> Any:
    """A trained student, loaded in the dtype of the bank's student, with the vocabulary checked.

    Raises:
        DataError: it cannot be read, or has another vocabulary.
    """
    model = load_model(checkpoint, dtype=bank.fingerprints["student"]["dtype"])
    folder, tokenizer = Path(checkpoint), None
    # A LoRA folder may come without one; then the number of rows must do.
    if not folder.is_dir() or has_any(folder, VOCABULARY_FILES):
        tokenizer = load_tokenizer(checkpoint)
    check_vocabulary(bank, model, tokenizer, name=str(checkpoint))
    return model


def check_vocabulary(
    bank: FixedContextBank, model: Any, tokenizer: PreTrainedTokenizerBase | None, *, name: str
) -> None:
    """Refuse a model whose ids are not the bank's.

    Raises:
        DataError: another tokenizer; or too few rows in the head; or, without a tokenizer to prove more,
            another number of rows than the student had.
    """
    if tokenizer is not None:
        try:
            bank.check_tokenizer(tokenizer)
        except DataError as error:
            raise DataError(f"{name} has another vocabulary: {error}") from error
    rows = int(model.get_output_embeddings().weight.shape[0])
    expected = int(bank.fingerprints["student"]["vocab_size"])
    if rows < bank.vocab_size or (tokenizer is None and rows != expected):
        raise DataError(
            f"{name} has another vocabulary: its head has {rows} rows, the bank's student had {expected}"
        )


def _labels(checkpoints: Sequence[str | Path]) -> list[str]:
    """Folder names; with the parents' where these are not unique."""
    names = [Path(checkpoint).name or str(checkpoint) for checkpoint in checkpoints]
    if len(set(names)) == len(names):
        return names
    longer = ["/".join(Path(checkpoint).absolute().parts[-2:]) for checkpoint in checkpoints]
    if len(set(longer)) == len(longer):
        return longer
    return [f"{name} ({index})" for index, name in enumerate(longer, start=1)]
