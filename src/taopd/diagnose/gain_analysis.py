"""All analyses of one folder of gains: tables by name, and the verdicts.

The tables are about the last checkpoint, the gain curve about all of them. Every gain column is analysed
(nats and share of the initial KL, forward and reverse), because they order tokens differently.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from taopd.diagnose.features import (
    DEFAULTS,
    AnalysisSettings,
    TokenTable,
    default_k,
    discover_gains,
    discover_ks,
)
from taopd.diagnose.gain import CheckpointGain
from taopd.diagnose.matched import matched_top_n
from taopd.diagnose.quadrants import q3_buckets, q3_gap
from taopd.diagnose.regression import decomposition
from taopd.diagnose.robustness import gain_curve, robustness
from taopd.diagnose.verdicts import Verdict, verdicts
from taopd.errors import ConfigError

NUM_ANALYSES = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """The tables and verdicts of one training run on one bank."""

    checkpoint: str
    """Label of the checkpoint that the tables are about."""
    k: int
    tables: dict[str, pd.DataFrame]
    """decomposition, matched_top_n, q3_gap, q3_buckets, robustness, gain_curve; a `gain` column tells forms
    of the gain apart."""
    verdicts: list[Verdict]


def analyse(
    checkpoints: Sequence[CheckpointGain],
    settings: AnalysisSettings = DEFAULTS,
    *,
    k: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Analysis:
    """Every analysis of the last checkpoint, and the gain curve over all of them.

    Args:
        settings: its `k` and `gain` are not read.
        k: support size; default `default_k`.
        progress: called with ("analyses", done, in all).

    Raises:
        ConfigError: for a K that the bank does not have.
        DataError: for tables that cannot be analysed.
    """
    last = checkpoints[-1].tokens
    ks = discover_ks(last)
    k = default_k(last) if k is None else k
    if k not in ks:
        raise ConfigError(f"K = {k} is not in the bank; it has {', '.join(map(str, ks))}")
    settings = replace(settings, k=k)
    forms = dict.fromkeys(replace(settings, gain=g).gain_column for g in discover_gains(last))
    parts: dict[str, list[pd.DataFrame]] = {}
    judged: list[Verdict] = []
    done = 0
    # One gain after the other, so that the features of only one are in memory.
    for gain in forms:
        of_gain = replace(settings, gain=gain)
        for name, result in _analyses(checkpoints, of_gain):
            if name == "verdicts":
                judged += result
            else:
                result.attrs = {}  # pandas cannot join tables whose attrs hold dicts
                parts.setdefault(name, []).append(result.assign(gain=gain))
            done += 1
            progress("analyses", done, NUM_ANALYSES * len(forms))
    tables = {name: pd.concat(each, ignore_index=True) for name, each in parts.items()}
    return Analysis(checkpoint=checkpoints[-1].label, k=k, tables=tables, verdicts=judged)


def _analyses(
    checkpoints: Sequence[CheckpointGain], settings: AnalysisSettings
) -> Iterator[tuple[str, Any]]:
    """Every analysis of one gain column by name, on shared features."""
    tables = [TokenTable(checkpoint.tokens) for checkpoint in checkpoints]
    steps = [index if c.step is None else c.step for index, c in enumerate(checkpoints, start=1)]
    last = tables[-1]
    yield "decomposition", decomposition(last, settings)
    yield "matched_top_n", matched_top_n(last, settings)
    yield "q3_gap", q3_gap(last, settings)
    yield "q3_buckets", q3_buckets(last, settings)
    yield "robustness", robustness(last, settings)
    yield "gain_curve", gain_curve(list(zip(steps, tables, strict=True)), settings)
    yield "verdicts", verdicts(last, settings, gains=[settings.gain])
