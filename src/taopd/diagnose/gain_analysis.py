"""Every analysis of the diagnostic on one folder of gains: tables by name, and the verdicts.

The tables are about the last checkpoint; the curve is about all of them. Every gain column is analysed
(nats and share of the initial KL, forward and reverse), because they order tokens differently.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from taopd.diagnose.features import discover_gains, discover_ks, gain_column
from taopd.diagnose.gain import CheckpointGain
from taopd.diagnose.matched import matched_top_n
from taopd.diagnose.quadrants import q3_buckets, q3_gap
from taopd.diagnose.regression import decomposition
from taopd.diagnose.robustness import gain_curve, robustness
from taopd.diagnose.verdicts import Verdict, verdicts
from taopd.errors import ConfigError

NUM_STAGES = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What one bank says about one training run."""

    checkpoint: str
    """Label of the checkpoint that the tables are about."""
    k: int
    tables: dict[str, pd.DataFrame]
    """decomposition, matched_top_n, q3_gap, q3_buckets, robustness, gain_curve; a `gain` column tells forms
    of the gain apart."""
    verdicts: list[Verdict]


def analyse(
    checkpoints: Sequence[CheckpointGain],
    *,
    k: int | None = None,
    cluster: str = "prompt",
    num_resamples: int = 1000,
    seed: int = 0,
    reference: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Analysis:
    """Run every analysis on the last checkpoint, and the curve over all.

    Args:
        k: support size; default 16 where the bank has it, else its largest.
        cluster: unit of the bootstrap, "prompt" or "completion".
        reference: the released tools' choices, for comparison with published numbers.

    Raises:
        ConfigError: for a K that the bank does not have.
        DataError: for tables that cannot be analysed.
    """
    last = checkpoints[-1].tokens
    ks = discover_ks(last)
    if k is None:
        k = 16 if 16 in ks else max(ks)
    if k not in ks:
        raise ConfigError(f"K = {k} is not in the bank; it has {', '.join(map(str, ks))}")
    forms = dict.fromkeys(gain_column(g, reference=reference) for g in discover_gains(last))
    options: dict[str, Any] = {
        "cluster": cluster,
        "num_resamples": num_resamples,
        "seed": seed,
        "reference": reference,
    }
    done = 0

    def over_gains(function: Callable[..., pd.DataFrame], *args: Any, **extra: Any) -> pd.DataFrame:
        nonlocal done
        parts = []
        for gain in forms:
            part = function(*args, gain=gain, **extra, **options)
            part.attrs = {}  # Notes and counts are columns; pandas cannot join what the attrs hold.
            part["gain"] = gain
            parts.append(part)
        done += 1
        progress("analyses", done, NUM_STAGES)
        return pd.concat(parts, ignore_index=True)

    tables = {
        "decomposition": over_gains(decomposition, last),
        "matched_top_n": over_gains(matched_top_n, last, k=k),
        "q3_gap": over_gains(q3_gap, last, k=k),
        "q3_buckets": over_gains(q3_buckets, last, k=k),
        "robustness": over_gains(robustness, last),
    }
    steps = [index if c.step is None else c.step for index, c in enumerate(checkpoints, start=1)]
    curve = [(step, c.tokens) for step, c in zip(steps, checkpoints, strict=True)]
    tables["gain_curve"] = over_gains(gain_curve, curve, k=k)
    judged = verdicts(last, k=k, **options)
    progress("analyses", NUM_STAGES, NUM_STAGES)
    return Analysis(checkpoint=checkpoints[-1].label, k=k, tables=tables, verdicts=judged)
