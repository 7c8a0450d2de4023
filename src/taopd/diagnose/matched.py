"""Matched top-N: the mean gain of the tokens each selector would have kept, at equal numbers.

What: every selector with a hard choice ranks the tokens of one frozen bank by its own code
(`taopd.selectors.select`) and keeps exactly N = max(1, round(rho n)). The mean gain of the kept
tokens is compared, always against random choice at the same N. The kept sets are fixed; prompts are
resampled, the same ones for every selector, so differences are paired.

Random is averaged over many draws: its interval is that of the average random choice, and
`draw_low`, `draw_high` say how far single draws scatter (a training run makes single draws).

Limits: correlation on a bank, trained by somebody else's selection. That tokens gained does not say
that selecting them causes it; the one-step protocol asks that.

Source: METHOD section 4 (gain winsorized 1/99; published at 3 %: D^L 0.130, KL 0.120, D^I 0.105,
TIP 0.093, entropy 0.076, random -0.130).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from taopd.diagnose.bootstrap import (
    LEVEL,
    Bootstrap,
    cluster_codes,
    group_means,
)
from taopd.diagnose.features import (
    clusters_of,
    signal_table_of,
    token_features,
    usable_tokens,
    winsorize,
)
from taopd.errors import ConfigError, suggest
from taopd.selectors import SELECTORS, select

BUDGETS = (0.01, 0.03, 0.05, 0.10)
WINSOR = 0.01
NUM_DRAWS = 200
"""Draws of the random control: the mean over draws is then known to 1/14 of one draw's scatter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedBank:
    """Usable tokens of one bank and the kept sets of some selectors at one budget, resampled."""

    names: tuple[str, ...]
    num_requested: int
    num_kept: tuple[int, ...]
    boot: Bootstrap
    """One mean gain per name."""
    draws: Float[np.ndarray, " D"]
    """Mean gain of each single random draw."""
    facts: dict[str, object]


def hard_selectors() -> tuple[str, ...]:
    """Registered selectors that keep or drop a token, without `full`, which has no N."""
    return tuple(
        sorted(name for name, rule in SELECTORS.items() if name != "full" and not rule.weighted)
    )


def matched_count(budget: float, num_tokens: int) -> int:
    """N = max(1, round(budget n)), at most n. [METHOD section 4]"""
    if not 0 < budget <= 1:
        raise ConfigError(f"budget={budget} must be in (0, 1]; five percent is 0.05")
    return min(num_tokens, max(1, round(budget * num_tokens)))


def selector_ranks(
    tokens: pd.DataFrame,
    selector: str,
    num_kept: int,
    *,
    k: int = 16,
    proxy: str = "mass",
    reference: bool = False,
) -> Int[np.ndarray, " N"]:
    """0-based rank of every token for a selector that keeps `num_kept`; -1: no candidate.

    Only a selector with a lead (`split`) ranks differently for another `num_kept`. `tokens` in the
    order (completion, position).
    """
    if selector not in SELECTORS:
        raise ConfigError(f"selector {selector!r} is unknown.{suggest(selector, SELECTORS)}")
    choice = select(
        signal_table_of(tokens, k=k, proxy=proxy),
        selector=selector,
        # select() rounds up; half a token less makes its budget, and so split's lead, exactly N.
        budget=(num_kept - 0.5) / len(tokens),
        rules="reference" if reference else "paper",
    )
    return choice.ranks.numpy()


def matched_banks(
    tokens: pd.DataFrame,
    *,
    budgets: Sequence[float] = BUDGETS,
    selectors: Sequence[str] | None = None,
    k: int = 16,
    proxy: str = "mass",
    gain: str = "gain_forward",
    winsor: float = WINSOR,
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
    fixed: dict[str, np.ndarray] = {}
    banks = []
    for budget in budgets:
        num_requested = matched_count(budget, len(rows))
        times, draws = _random_draws(values, num_requested, num_draws, seed)
        weights, num_kept = [], []
        for name in names:
            if name == "random":
                weights.append(times)
                num_kept.append(num_requested)
                continue
            ranks = fixed.get(name)
            if ranks is None:
                ranks = selector_ranks(
                    rows, name, num_requested, k=k, proxy=proxy, reference=reference
                )
            if SELECTORS[name].lead is None:
                fixed[name] = ranks
            kept = (ranks >= 0) & (ranks < num_requested)
            weights.append(kept.astype(np.float64))
            num_kept.append(int(kept.sum()))
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
    selectors may have too few candidates), value with low, high and standard_error, minus_random with
    its interval, draw_low and draw_high (random only: 2.5 % and 97.5 % of single draws), n,
    n_excluded, num_clusters, unit, note.

    Args:
        options: as `matched_banks`: selectors, k, proxy, gain, winsor, cluster, num_draws,
            num_resamples, seed, method, reference ([P!=C]: relative gain and the released code's
            scores and rules; q3_* keep its online quadrants).

    Raises:
        DataError: as `token_features`.
        ConfigError: for an unknown selector, proxy, cluster, or a budget outside (0, 1].
    """
    tables = []
    for bank in matched_banks(tokens, budgets=budgets, **options):
        random = bank.names.index("random")
        lead = bank.boot.map(lambda means, at=random: means - means[:, [at]])
        low, high = bank.boot.interval()
        lead_low, lead_high = lead.interval()
        tails = np.quantile(bank.draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        is_random = np.arange(len(bank.names)) == random
        rows = {
            "budget": bank.facts["budget"],
            "selector": bank.names,
            "num_requested": bank.num_requested,
            "num_kept": bank.num_kept,
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
            "note": boot.note,
        }
    )


def _random_draws(
    values: np.ndarray, num_kept: int, num_draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each token was drawn, and the mean gain of each draw.

    Own draws, not `select(selector="random")`: the same law, without 200 passes over the bank.
    """
    if num_draws < 2:
        raise ConfigError(f"num_draws={num_draws} must be at least 2; {NUM_DRAWS} is usual")
    generator = np.random.default_rng([seed, num_kept])
    times = np.zeros(len(values))
    means = np.empty(num_draws)
    for draw in range(num_draws):
        index = generator.choice(len(values), num_kept, replace=False, shuffle=False)
        times[index] += 1
        means[draw] = values[index].mean()
    return times, means


def _note(bank: MatchedBank, index: int) -> str:
    notes = [bank.boot.note] if bank.boot.note else []
    if bank.num_kept[index] < bank.num_requested:
        notes.append(f"only {bank.num_kept[index]} candidates for {bank.num_requested} places")
    if bank.names[index] == "random":
        notes.append(f"mean over {len(bank.draws)} draws")
    return "; ".join(notes)
