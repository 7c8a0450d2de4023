"""All analyses of one folder of gains: tables by name, and the verdicts.

The tables are about the last checkpoint, the gain curve about all of them. Every gain column is analysed
(nats and share of the initial KL, forward and reverse), because they order tokens differently.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

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

ANALYSES = (decomposition, matched_top_n, q3_gap, q3_buckets, robustness)
"""The analyses of one checkpoint; `gain_curve` takes all of them."""


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
    by_step: bool
    """`step` of the gain curve is the optimizer's; else the place in the order given."""


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
    places, by_step = places_of(checkpoints)
    done, total = itertools.count(1), (len(ANALYSES) + 2) * len(forms)
    # One gain after the other, so that the features of only one are in memory.
    for gain in forms:
        of_gain = replace(settings, gain=gain)
        tokens = [TokenTable(checkpoint.tokens) for checkpoint in checkpoints]
        analyses = {each.__name__: partial(each, tokens[-1], of_gain) for each in ANALYSES}
        curve = list(zip(places, tokens, strict=True))
        analyses["gain_curve"] = partial(gain_curve, curve, of_gain)
        for name, analysis in analyses.items():
            table = analysis()
            table.attrs = {}  # pandas cannot join tables whose attrs hold dicts
            parts.setdefault(name, []).append(table.assign(gain=gain))
            progress("analyses", next(done), total)
        judged += verdicts(tokens[-1], of_gain, gains=[gain])
        progress("analyses", next(done), total)
    tables = {name: pd.concat(each, ignore_index=True) for name, each in parts.items()}
    label = checkpoints[-1].label
    return Analysis(checkpoint=label, k=k, tables=tables, verdicts=judged, by_step=by_step)


def places_of(checkpoints: Sequence[CheckpointGain]) -> tuple[list[int], bool]:
    """Where every checkpoint is on the curve, and whether these are optimizer steps.

    The steps, where each has one of its own; else the order given (1, 2, ...) for all: a step and a place do
    not go on one axis.
    """
    steps = [checkpoint.step for checkpoint in checkpoints if checkpoint.step is not None]
    if len(set(steps)) == len(checkpoints):
        return steps, True
    return list(range(1, len(checkpoints) + 1)), False
