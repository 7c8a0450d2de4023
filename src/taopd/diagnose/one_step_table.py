"""Tables of the one-step protocol: one row per selector, optimizer, variant and batch, and their summary."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from taopd.diagnose.bank import Rollouts
from taopd.diagnose.one_step import (
    DIRECTIONS,
    OPTIMIZERS,
    VARIANTS,
    FrozenBatch,
    OneStepSettings,
    freeze_batch,
    measure_divergences,
    moved,
    norm_of,
    selection_gradient,
    trainable,
    update_of,
)
from taopd.errors import DataError
from taopd.losses import reduction_weights
from taopd.selectors import Selection, select

GROUPS = ("selected", "others", "fresh")
INTERVAL = (0.025, 0.975)
AGREEMENT_NATS = 1e-7
"""A mean KL below this is rounding in float32."""


def one_step(
    student: Any,
    teacher: Any,
    frozen: Rollouts,
    fresh: Rollouts,
    settings: OneStepSettings,
    *,
    vocab_size: int,
    batch_index: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> pd.DataFrame:
    """Table of one step per selector, optimizer and variant from one frozen batch; restores the student.

    Columns: batch, selector, optimizer, variant, learning_rate, update_norm, num_selected, num_tokens,
    num_fresh, num_excluded (gains that are not finite, in no mean); `gain_<direction>_<group>`, mean fall
    of the divergence in nats per token for the groups selected, others and fresh; and
    `spearman_<direction>_<group>` of the score before the step with the gain of every token of the batch
    ("batch") or of the fresh contexts ("fresh"), NaN where scores do not differ.

    Args:
        fresh: rollouts of other prompts.
        progress: called after every step.

    Raises:
        ConfigError, DataError, NumericsError: see `freeze_batch`, `trainable` and `select`.
    """
    batch = freeze_batch(student, teacher, frozen, settings, vocab_size)
    fresh_batch = freeze_batch(student, teacher, fresh, settings, vocab_size)
    parameters = trainable(student)
    common = settings.learning_rate * math.sqrt(sum(p.numel() for p in parameters))

    choose = partial(select, budget=settings.budget, seed=settings.seed, step=batch_index)

    def gradient(selection: Selection) -> list[Any]:
        weights = reduction_weights(selection.weights, batch.table.completion, batch.table.valid)
        return selection_gradient(student, batch, weights, settings, vocab_size)

    everything = norm_of(gradient(choose(batch.table, selector="full")))
    if batch.before["forward"].mean() < AGREEMENT_NATS or not everything > 0:
        raise DataError("student and teacher agree on this batch: there is nothing to distill")
    rates = {"adamw": settings.learning_rate, "sgd": common / everything}
    rows = []
    for name in settings.selectors:
        chosen = choose(batch.table, selector=name)
        fresh_scores = choose(fresh_batch.table, selector=name).scores
        direction = gradient(chosen)
        for optimizer in OPTIMIZERS:
            update = update_of(parameters, direction, optimizer, rates[optimizer], settings)
            norm = norm_of(update)
            for variant in VARIANTS:
                scale = 1.0 if variant == "raw" or norm == 0 else common / norm
                with moved(parameters, update, scale):
                    gains = [_gains(student, b, settings, vocab_size) for b in (batch, fresh_batch)]
                rows.append(
                    {
                        "batch": batch_index,
                        "selector": name,
                        "optimizer": optimizer,
                        "variant": variant,
                        "learning_rate": rates[optimizer],
                        "update_norm": norm * scale,
                    }
                    | _outcome(chosen, fresh_scores.cpu().numpy(), *gains)
                )
                progress()
    return pd.DataFrame(rows)


def one_step_batches(
    student: Any,
    teacher: Any,
    batches: Sequence[tuple[Rollouts, Rollouts]],
    settings: OneStepSettings,
    *,
    vocab_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> pd.DataFrame:
    """`one_step` on several (frozen, fresh) pairs; rows of all of them.

    Args:
        progress: called with (steps done, steps in all).

    Raises:
        DataError: without a pair.
    """
    if not batches:
        raise DataError("no batches: the one-step protocol needs at least one")
    total = len(batches) * len(settings.selectors) * len(OPTIMIZERS) * len(VARIANTS)
    done = itertools.count(1)
    tables = [
        one_step(
            student,
            teacher,
            frozen,
            fresh,
            settings,
            vocab_size=vocab_size,
            batch_index=index,
            progress=lambda: progress(next(done), total),
        )
        for index, (frozen, fresh) in enumerate(batches)
    ]
    return pd.concat(tables, ignore_index=True)


def summarize_one_step(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over batches of every measure, its 2.5 and 97.5 percentiles over batches, and n.

    The interval is the spread of batches, not the error of the mean. `over_random` measures are paired: the
    gain less that of the random selector in the same batch, optimizer and variant. Long format: selector,
    optimizer, variant, measure, mean, low, high, num_batches.
    """
    keys = ["selector", "optimizer", "variant"]
    measures = [name for name in rows if str(name).startswith(("gain_", "spearman_"))]
    long = rows.melt(id_vars=["batch", *keys], value_vars=measures, var_name="measure")
    where = ["batch", "optimizer", "variant", "measure"]
    random = long[(long["selector"] == "random") & long["measure"].str.startswith("gain_")]
    if len(random):
        paired = long.merge(random[[*where, "value"]], on=where, suffixes=("", "_random"))
        paired["value"] -= paired.pop("value_random")
        paired["measure"] += "_over_random"
        long = pd.concat([long, paired[paired["selector"] != "random"]], ignore_index=True)
    groups = long.dropna(subset=["value"]).groupby([*keys, "measure"], sort=False)["value"]
    low, high = INTERVAL
    return groups.agg(
        mean="mean",
        low=lambda values: values.quantile(low),
        high=lambda values: values.quantile(high),
        num_batches="count",
    ).reset_index()


def split_batches(rollouts: Rollouts, size: int) -> Iterator[tuple[Rollouts, Rollouts]]:
    """Consecutive pairs of `size` completions: a frozen batch, then one of other prompts.

    Raises:
        DataError: a pair shares a prompt.
    """
    own = rollouts.teacher_prompt_ids
    for start in range(0, len(rollouts) - 2 * size + 1, 2 * size):
        pair = [
            Rollouts(
                prompt_ids=rollouts.prompt_ids[first : first + size],
                completion_ids=rollouts.completion_ids[first : first + size],
                settings=rollouts.settings,
                teacher_prompt_ids=own and own[first : first + size],
            )
            for first in (start, start + size)
        ]
        shared = {tuple(ids) for ids in pair[0].prompt_ids} & set(map(tuple, pair[1].prompt_ids))
        if shared:
            raise DataError(
                f"batch {start // (2 * size)}: a prompt is in both the frozen and the fresh contexts; "
                "remove duplicate prompts or use more of them"
            )
        yield pair[0], pair[1]


def _gains(
    student: Any, frozen: FrozenBatch, settings: OneStepSettings, vocab_size: int
) -> dict[str, np.ndarray]:
    after = measure_divergences(student, frozen, settings, vocab_size)
    return {name: frozen.before[name] - after[name] for name in DIRECTIONS}


def _outcome(
    chosen: Selection,
    fresh_scores: np.ndarray,
    gained: dict[str, np.ndarray],
    fresh: dict[str, np.ndarray],
) -> dict[str, float]:
    kept, scores = chosen.kept.cpu().numpy(), chosen.scores.cpu().numpy()
    finite, fresh_finite = (
        np.isfinite(np.stack(list(gains.values()))).all(axis=0) for gains in (gained, fresh)
    )
    row: dict[str, float] = {
        "num_selected": int(kept.sum()),
        "num_tokens": len(kept),
        "num_fresh": len(fresh_finite),
        "num_excluded": int((~finite).sum() + (~fresh_finite).sum()),
    }
    for name in DIRECTIONS:
        groups = (
            gained[name][finite & kept],
            gained[name][finite & ~kept],
            fresh[name][fresh_finite],
        )
        for group, gains in zip(GROUPS, groups, strict=True):
            row[f"gain_{name}_{group}"] = float(gains.mean()) if len(gains) else math.nan
        row[f"spearman_{name}_batch"] = spearman(scores[finite], gained[name][finite])
        row[f"spearman_{name}_fresh"] = spearman(
            fresh_scores[fresh_finite], fresh[name][fresh_finite]
        )
    return row


def spearman(scores: np.ndarray, gains: np.ndarray) -> float:
    """Rank correlation in [-1, 1]; NaN where one side does not vary.

    Example:
        >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.5, 0.9]))
        1.0
    """
    if len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(gains) == 0:
        return math.nan
    return float(spearmanr(scores, gains).statistic)
