"""Matched top-N: the mean gain of the tokens that each selector keeps, at the same N.

Every selector with a hard choice ranks the tokens of one bank by its own code
(`taopd.selectors.select`) and keeps exactly N = max(1, round(rho n)). The mean gain of the kept
tokens is compared with a random choice of N tokens. The kept sets are fixed. The bootstrap draws
the same prompts for every selector, so differences are paired.

Ties: H~ and D~ are clipped at the 95 % quantile, so one token in twenty has exactly 1. Below a
budget of 5 % the divergence and entropy selectors choose among equal scores, by position; D^L, a
product, rarely ties. `num_tied` counts these tokens, and `normalization="minmax"` compares the
selectors without ties.

The random control is averaged over many draws. Its interval is that of the average random choice;
`draw_low` and `draw_high` are the scatter of single draws (a training run makes one draw).

Limits: a correlation on a bank, after training with some other selection. Whether selecting the
tokens causes their gain is measured by the one-step protocol.

Source: docs/math.md, "The diagnostic" (gain winsorized 1/99; published at 3 %: D^L 0.130, KL 0.120,
D^I 0.105, TIP 0.093, entropy 0.076, random -0.130).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from taopd.diagnose.bootstrap import LEVEL, Bootstrap, group_means
from taopd.diagnose.features import DEFAULTS, AnalysisSettings, Tokens, TokenTable
from taopd.diagnose.kept_sets import (
    NUM_DRAWS,
    hard_selectors,
    matched_count,
    places_by_position,
    random_draws,
    selector_order,
)
from taopd.errors import ConfigError, suggest
from taopd.selectors import resolve_selector

BUDGETS = (0.01, 0.03, 0.05, 0.10)
WINSOR = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedBank:
    """Usable tokens of one bank and the kept sets of some selectors at one budget, resampled."""

    names: tuple[str, ...]
    num_requested: int
    num_kept: tuple[int, ...]
    num_tied: tuple[int, ...]
    """`places_by_position` of each."""
    boot: Bootstrap
    """One mean gain per name."""
    draws: Float[np.ndarray, " D"]
    """Mean gain of each single random draw."""
    budget: float
    facts: dict[str, Any]
    """`Features.facts`."""
    attrs: dict[Any, Any]
    """`attrs` of the features."""


def matched_banks(
    tokens: Tokens,
    settings: AnalysisSettings = DEFAULTS,
    *,
    budgets: Sequence[float] = BUDGETS,
    selectors: Sequence[str] | None = None,
    winsor: float = WINSOR,
    normalization: str = "quantile",
    num_draws: int = NUM_DRAWS,
) -> list[MatchedBank]:
    """Kept sets and paired resamples, one per budget; `matched_top_n` is made from them."""
    features = TokenTable.of(tokens).features(settings)
    names = tuple(hard_selectors() if selectors is None else selectors)
    names = names if "random" in names else (*names, "random")
    values = features.gain(winsor)
    orders: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    banks = []
    for budget in budgets:
        num_requested = matched_count(budget, len(values))
        times, draws = random_draws(values, num_requested, num_draws, settings.seed)
        weights, num_kept, num_tied = [], [], []
        for name in names:
            if name == "random":
                weights.append(times)
                num_kept.append(num_requested)
                num_tied.append(0)
                continue
            # The order does not depend on the budget, but for a selector with a lead.
            if name not in orders or resolve_selector(name).lead is not None:
                orders[name] = selector_order(
                    features.signals,
                    name,
                    num_requested,
                    normalization=normalization,
                    reference=settings.reference,
                )
            order, scores = orders[name]
            kept = (order >= 0) & (order < num_requested)
            weights.append(kept.astype(np.float64))
            num_kept.append(int(kept.sum()))
            num_tied.append(places_by_position(order, scores, num_requested))
        clusters = features.clusters, features.num_clusters
        boot = group_means(values, np.stack(weights, axis=1), *clusters, **settings.bootstrap)
        banks.append(
            MatchedBank(
                names=names,
                num_requested=num_requested,
                num_kept=tuple(num_kept),
                num_tied=tuple(num_tied),
                boot=boot,
                draws=draws,
                budget=budget,
                facts=features.facts,
                attrs=features.table.attrs,
            )
        )
    return banks


def matched_top_n(
    tokens: Tokens, settings: AnalysisSettings = DEFAULTS, **options: Any
) -> pd.DataFrame:
    """Mean gain of the N tokens each selector keeps, and its paired lead over random.

        N = max(1, round(rho n)),   value = mean over kept of the winsorized gain

    One row per (budget, selector), best first within a budget: num_requested N, num_kept (q3_*
    selectors may have too few candidates), num_tied (kept by position among equal scores), value
    with low, high and standard_error, minus_random with its interval, draw_low and draw_high
    (random only: 2.5 % and 97.5 % of single draws), n, n_excluded, num_clusters, unit, note.

    Args:
        settings: `reference`: the relative gain, and the released code's scores and rules; q3_* keep its
            online quadrants. [P!=C]
        options: of `matched_banks`: budgets, selectors, winsor, normalization, num_draws.

    Raises:
        DataError: as `token_features`.
        ConfigError: for an unknown selector, or a budget outside (0, 1].
    """
    banks = matched_banks(tokens, settings, **options)
    table = pd.concat([_rows(bank) for bank in banks], ignore_index=True)
    table.attrs = dict(banks[-1].attrs)
    return table


def _rows(bank: MatchedBank) -> pd.DataFrame:
    random = bank.names.index("random")
    lead = bank.boot.map(lambda means: means - means[:, [random]]).columns()
    tails = np.quantile(bank.draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    is_random = np.arange(len(bank.names)) == random
    table = pd.DataFrame(
        {
            "budget": bank.budget,
            "selector": bank.names,
            "num_requested": bank.num_requested,
            "num_kept": bank.num_kept,
            "num_tied": bank.num_tied,
            **bank.boot.columns(),
            "minus_random": lead["value"],
            "minus_random_low": lead["low"],
            "minus_random_high": lead["high"],
            "draw_low": np.where(is_random, tails[0], np.nan),
            "draw_high": np.where(is_random, tails[1], np.nan),
            **bank.facts,
            "note": [_note(bank, index) for index in range(len(bank.names))],
        }
    )
    return table.sort_values("value", ascending=False, kind="stable")


def matched_differences(bank: MatchedBank, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Paired differences of mean gain, first minus second, with intervals.

    `low`, `high`: of one difference. `joint_low`, `joint_high`: Bonferroni over the pairs, for a
    claim that any one of them can refute.

    Raises:
        ConfigError: for a selector that the bank does not hold.
    """
    for name in {name for pair in pairs for name in pair} - set(bank.names):
        raise ConfigError(f"selector {name!r} is not in the bank.{suggest(name, bank.names)}")
    first, second = ([bank.names.index(pair[side]) for pair in pairs] for side in (0, 1))
    boot = bank.boot.map(lambda means: means[:, first] - means[:, second])
    low, high = boot.interval()
    joint_low, joint_high = boot.interval(1 - (1 - LEVEL) / len(pairs))
    return pd.DataFrame(
        {
            "first": [pair[0] for pair in pairs],
            "second": [pair[1] for pair in pairs],
            "value": boot.value,
            "low": low,
            "high": high,
            "joint_low": joint_low,
            "joint_high": joint_high,
            "num_requested": bank.num_requested,
            "n": bank.facts["n"],
            "note": [_pair_note(bank, pair) for pair in pairs],
        }
    )


def _pair_note(bank: MatchedBank, pair: tuple[str, str]) -> str:
    notes = [bank.boot.note] if bank.boot.note else []
    for name in pair:
        index = bank.names.index(name)
        if bank.num_tied[index]:
            share = f"{bank.num_tied[index]} of {bank.num_kept[index]}"
            notes.append(f"{name} gave {share} places by position among equal scores")
    return "; ".join(notes)


def _note(bank: MatchedBank, index: int) -> str:
    notes = [bank.boot.note] if bank.boot.note else []
    if bank.num_kept[index] < bank.num_requested:
        notes.append(f"only {bank.num_kept[index]} candidates for {bank.num_requested} places")
    if bank.num_tied[index]:
        notes.append(
            f"{bank.num_tied[index]} of {bank.num_kept[index]} places by position among equal scores"
        )
    if bank.names[index] == "random":
        notes.append(f"mean over {len(bank.draws)} draws")
    return "; ".join(notes)
