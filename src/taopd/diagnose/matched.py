"""Matched top-N: the mean gain of the tokens each selector would have kept, at equal numbers.

What: every selector with a hard choice ranks the tokens of one frozen bank by its own code
(`taopd.selectors.select`) and keeps exactly N = max(1, round(rho n)). The mean gain of the kept
tokens is compared, always against random choice at the same N. The kept sets are fixed; prompts are
resampled, the same ones for every selector, so differences are paired.

Saturation: H~ and D~ are clipped at the 95 % quantile, so one token in
twenty has exactly 1. Below 5 % the divergence and entropy selectors therefore choose among equal scores, by
position; D^L, a product, is rarely tied. `num_tied` counts such places, and
`normalization="minmax"` compares the selectors without ties.

Random is averaged over many draws: its interval is that of the average random choice, and
`draw_low`, `draw_high` say how far single draws scatter (a training run makes single draws).

Limits: correlation on a bank, trained by somebody else's selection. That tokens gained does not say
that selecting them causes it; the one-step protocol asks that.

Source: METHOD section 4 (gain winsorized 1/99; published at 3 %: D^L 0.130, KL 0.120, D^I 0.105,
TIP 0.093, entropy 0.076, random -0.130).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from taopd.diagnose.bootstrap import (
    LEVEL,
    Bootstrap,
    cluster_codes,
    group_means,
)
from taopd.diagnose.features import clusters_of, token_features, usable_tokens, winsorize
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
    facts: dict[Any, Any]
    """`attrs` of the features, with cluster, budget and winsor."""


def matched_banks(
    tokens: pd.DataFrame,
    *,
    budgets: Sequence[float] = BUDGETS,
    selectors: Sequence[str] | None = None,
    k: int = 16,
    proxy: str = "mass",
    gain: str = "gain_forward",
    winsor: float = WINSOR,
    normalization: str = "quantile",
    cluster: str = "prompt",
    num_draws: int = NUM_DRAWS,
    num_resamples: int = 1000,
    seed: int = 0,
    method: str = "percentile",
    reference: bool = False,
) -> list[MatchedBank]:
    """Kept sets and paired resamples, one per budget; what `matched_top_n` is made from."""
    features = token_features(tokens, k=k, proxy=proxy, gain=gain, reference=reference)
    rows = usable_tokens(tokens, k=k, proxy=proxy, gain=gain, reference=reference)
    names = tuple(hard_selectors() if selectors is None else selectors)
    names = names if "random" in names else (*names, "random")
    codes, num_clusters = cluster_codes(clusters_of(features, cluster))
    values = winsorize(features["gain"].to_numpy(), winsor)
    signals: dict[str, Any] = {
        "k": k,
        "proxy": proxy,
        "normalization": normalization,
        "reference": reference,
    }
    fixed: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    banks = []
    for budget in budgets:
        num_requested = matched_count(budget, len(rows))
        times, draws = random_draws(values, num_requested, num_draws, seed)
        weights, num_kept, num_tied = [], [], []
        for name in names:
            if name == "random":
                weights.append(times)
                num_kept.append(num_requested)
                num_tied.append(0)
                continue
            if name not in fixed or resolve_selector(name).lead is not None:
                fixed[name] = selector_order(rows, name, num_requested, **signals)
            ranks, scores = fixed[name]
            kept = (ranks >= 0) & (ranks < num_requested)
            weights.append(kept.astype(np.float64))
            num_kept.append(int(kept.sum()))
            num_tied.append(places_by_position(ranks, scores, num_requested))
        boot = group_means(
            values,
            np.stack(weights, axis=1),
            codes,
            num_clusters,
            num_resamples=num_resamples,
            seed=seed,
            method=method,
        )
        facts = {**features.attrs, "cluster": cluster, "budget": budget, "winsor": winsor}
        banks.append(
            MatchedBank(
                names=names,
                num_requested=num_requested,
                num_kept=tuple(num_kept),
                num_tied=tuple(num_tied),
                boot=boot,
                draws=draws,
                facts=facts,
            )
        )
    return banks


def matched_top_n(
    tokens: pd.DataFrame, *, budgets: Sequence[float] = BUDGETS, **options: Any
) -> pd.DataFrame:
    """Mean gain of the N tokens each selector keeps, and its paired lead over random.

        N = max(1, round(rho n)),   value = mean over kept of the winsorized gain

    One row per (budget, selector), best first within a budget: num_requested N, num_kept (q3_*
    selectors may have too few candidates), num_tied (places given by position among equal scores),
    value with low, high and standard_error, minus_random with
    its interval, draw_low and draw_high (random only: 2.5 % and 97.5 % of single draws), n,
    n_excluded, num_clusters, unit, note.

    Args:
        options: as `matched_banks`: selectors, k, proxy, gain, winsor, normalization, cluster,
            num_draws, num_resamples, seed, method, reference ([P!=C]: relative gain and the released code's
            scores and rules; q3_* keep its online quadrants).

    Raises:
        DataError: as `token_features`.
        ConfigError: for an unknown selector, proxy, cluster, or a budget outside (0, 1].
    """
    tables = []
    for bank in matched_banks(tokens, budgets=budgets, **options):
        random = bank.names.index("random")
        lead = bank.boot.map(partial(_minus_column, column=random))
        low, high = bank.boot.interval()
        lead_low, lead_high = lead.interval()
        tails = np.quantile(bank.draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        is_random = np.arange(len(bank.names)) == random
        rows = {
            "budget": bank.facts["budget"],
            "selector": bank.names,
            "num_requested": bank.num_requested,
            "num_kept": bank.num_kept,
            "num_tied": bank.num_tied,
            "value": bank.boot.value,
            "low": low,
            "high": high,
            "standard_error": bank.boot.standard_error,
            "minus_random": lead.value,
            "minus_random_low": lead_low,
            "minus_random_high": lead_high,
            "draw_low": np.where(is_random, tails[0], np.nan),
            "draw_high": np.where(is_random, tails[1], np.nan),
            **{name: bank.facts[name] for name in ("gain", "unit", "k", "proxy")},
            **{name: bank.facts[name] for name in ("n", "n_excluded")},
            "num_clusters": bank.boot.num_clusters,
            "note": [_note(bank, index) for index in range(len(bank.names))],
        }
        table = pd.DataFrame(rows)
        tables.append(table.sort_values("value", ascending=False, kind="stable"))
    table = pd.concat(tables, ignore_index=True)
    table.attrs = bank.facts
    return table


def matched_differences(
    bank: MatchedBank, pairs: Sequence[tuple[str, str]], *, level: float = LEVEL
) -> pd.DataFrame:
    """Paired differences of mean gain, first minus second, with intervals.

    `low`, `high`: of one difference. `joint_low`, `joint_high`: Bonferroni over the pairs, for a
    claim that any one of them can refute.

    Raises:
        ConfigError: for a selector that the bank does not hold.
    """
    for name in {name for pair in pairs for name in pair}:
        if name not in bank.names:
            raise ConfigError(f"selector {name!r} is not in the bank.{suggest(name, bank.names)}")
    first = [bank.names.index(pair[0]) for pair in pairs]
    second = [bank.names.index(pair[1]) for pair in pairs]
    boot = bank.boot.map(lambda means: means[:, first] - means[:, second])
    low, high = boot.interval(level)
    joint_low, joint_high = boot.interval(1 - (1 - level) / len(pairs))
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


def _minus_column(means: np.ndarray, column: int) -> np.ndarray:
    return means - means[:, [column]]


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
