"""Verdicts on the paper's claims: holds, does not hold, undecided here, or cannot be told, with the interval.

Each claim is a difference that should be positive. It holds where the 95 % paired cluster-bootstrap
interval lies above 0, does not hold where it lies below 0, and is undecided otherwise, or where there
is no interval (one prompt, too few Q3 tokens).

A claim of several differences (the order of selectors; random is worst) holds only if every one of
them does, which needs no correction. Any single one refutes it, so the interval is then Bonferroni's
over the differences. The number shown is that of the weakest difference, with the interval that
decided.

Learnable disagreement against divergence is judged twice. As published: clipping D~ at its 95 %
quantile makes the divergence selector choose by position among equal scores at 3 % (the sentence
says how often). On the min-max scale: it has no such ties.

All of them rest on C. Where C is saturated, the same number at nearly every token, min-max scaling stretches
its last digits over [0, 1] and any order of tokens comes out: every claim then "cannot be told".

Every claim is judged for each unit and each direction of KL, since they order learnable and
incompatible tokens differently. The 95 % is per verdict: with four gains and ten claims, two of 40
would be decided by chance if nothing were true.

Source: docs/math.md, "The diagnostic".
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from taopd.diagnose.features import (
    DEFAULTS,
    AnalysisSettings,
    Tokens,
    TokenTable,
    discover_gains,
    gain_direction,
    gain_unit,
)
from taopd.diagnose.matched import MatchedBank, matched_banks, matched_differences
from taopd.diagnose.quadrants import q3_gap
from taopd.diagnose.regression import CONTRAST, decomposition
from taopd.runs.shares import per_cent, signed

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided here"
CANNOT_TELL = "cannot be told"
NEAR, FEWEST = 0.01, 0.01
"""C is saturated where it differs from its median by more than `NEAR` at fewer than this share of tokens; the
smallest budget of a claim keeps 3 %."""
ORDER = ("teachability", "divergence", "incompatible", "tip", "entropy", "random")
"""The published order of mean gain at 3 % and 5 %, best first."""
WORDS = {
    "teachability": "learnable disagreement",
    "divergence": "divergence",
    "incompatible": "incompatible disagreement",
    "tip": "TIP",
    "entropy": "entropy",
    "random": "random",
}
CLAIM_BUDGETS = (0.03, 0.05)
TARGET = "winsorized_1"
"""Form of the gain for beta_L > beta_I: as the matched comparison, not at the mercy of few tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One claim, judged on one bank. Aligned example:

    claim     beta_L > beta_I
    verdict   does not hold
    value     -0.021  [low -0.030, high -0.012]
    """

    claim: str
    verdict: str
    """One of HOLDS, FAILS, UNDECIDED, CANNOT_TELL."""
    value: float
    """The difference that the claim says is positive; of several, the weakest."""
    low: float
    high: float
    """Ends of the interval that decided; NaN without one."""
    n: int
    """Tokens that the difference is computed from; N per selector in matched claims."""
    unit: str
    direction: str
    """Of the KL whose decrease is the gain: "forward" or "reverse"."""
    sentence: str


def judge(low: float, high: float) -> str:
    """The verdict on "this difference is positive" by its interval.

    Example:
        >>> judge(0.1, 0.3), judge(-0.3, -0.1), judge(-0.1, 0.3), judge(float("nan"), float("nan"))
        ('holds', 'does not hold', 'undecided here', 'undecided here')
    """
    if low > 0:
        return HOLDS
    return FAILS if high < 0 else UNDECIDED


def verdicts(
    tokens: Tokens,
    settings: AnalysisSettings = DEFAULTS,
    *,
    gains: Sequence[str] | None = None,
) -> list[Verdict]:
    """The verdict on every claim for every gain column of the table (both units, both directions).

    Args:
        settings: its `gain` is not read.
        gains: default: all that the table has. With `reference` each is replaced by its relative
            form, and forms named twice are judged once. [P!=C]

    Raises:
        DataError: as `token_features`.
    """
    table = TokenTable.of(tokens)
    gains = discover_gains(table.tokens) if gains is None else gains
    forms = dict.fromkeys(replace(settings, gain=name).gain_column for name in gains)
    return [verdict for gain in forms for verdict in _of_gain(table, replace(settings, gain=gain))]


def _of_gain(table: TokenTable, settings: AnalysisSettings) -> list[Verdict]:
    shared: dict[str, Any] = {"budgets": CLAIM_BUDGETS}
    banks = matched_banks(table, settings, selectors=ORDER, **shared)
    untied = matched_banks(table, settings, selectors=ORDER[:2], normalization="minmax", **shared)
    neighbors = list(itertools.pairwise(ORDER))
    order = " > ".join(WORDS[name] for name in ORDER)
    against_random = [(name, "random") for name in ORDER[:-1]]
    found = [
        _decomposition_verdict(table, settings),
        *(_one_pair(bank) for bank in banks),
        *(_one_pair(bank, ", min-max scale") for bank in untied),
        _q3_verdict(table, settings),
        *(_several(bank, f"order {order}", neighbors) for bank in banks),
        *(_several(bank, "random is worst", against_random) for bank in banks),
    ]
    why = saturated(table.features(settings).signals.compatibility.numpy())
    return [_untold(each, why) for each in found] if why else found


def saturated(compatibility: np.ndarray) -> str:
    """Why C orders no tokens, in words; empty where it does.

    Args:
        compatibility: C of every token, raw: before any scaling.

    Example:
        >>> saturated(np.full(200, 0.5))
        'C is saturated, 0.5000 within 0.01 at 100.0 % of the tokens'
        >>> saturated(np.linspace(0.9, 1, 200))
        ''
    """
    middle = float(np.median(compatibility))
    near = float(np.mean(np.abs(compatibility - middle) <= NEAR))
    if near <= 1 - FEWEST:
        return ""
    return f"C is saturated, {middle:.4f} within {NEAR} at {per_cent(near)} % of the tokens"


def _untold(verdict: Verdict, why: str) -> Verdict:
    about = f"{verdict.claim}, {verdict.direction} KL: "
    number = verdict.sentence.removeprefix(f"{about}{verdict.verdict}; ")
    return replace(verdict, verdict=CANNOT_TELL, sentence=f"{about}{CANNOT_TELL}; {why}; {number}")


def _decomposition_verdict(table: TokenTable, settings: AnalysisSettings) -> Verdict:
    rows = decomposition(table, settings, ks=[settings.k], targets=[TARGET])
    row = rows[rows["term"] == CONTRAST].iloc[0]
    return _verdict(
        "beta_L > beta_I",
        "beta_L - beta_I per standard deviation, gain winsorized at 1 %",
        row.rename({"beta": "value"}),
        int(row["n"]),
        settings.gain_column,
    )


def _q3_verdict(table: TokenTable, settings: AnalysisSettings) -> Verdict:
    row = q3_gap(table, settings, groups=[3]).iloc[0]
    return _verdict(
        "Q3 is heterogeneous: high C gains more than low C",
        "top minus bottom third of C in Q3",
        row,
        int(row["num_high"] + row["num_low"]),
        settings.gain_column,
    )


def _one_pair(bank: MatchedBank, scale: str = "") -> Verdict:
    return _verdict(
        f"learnable disagreement beats divergence, top {_percent(bank)}{scale}",
        "difference of mean gain of the kept tokens",
        matched_differences(bank, [("teachability", "divergence")]).iloc[0],
        bank.num_requested,
        str(bank.facts["gain"]),
    )


def _several(bank: MatchedBank, claim: str, pairs: list[tuple[str, str]]) -> Verdict:
    table = matched_differences(bank, pairs)
    joint = table.assign(low=table["joint_low"], high=table["joint_high"])
    if (table["low"] > 0).all():
        verdict, weakest = HOLDS, table.iloc[int(table["low"].argmin())]
    elif (joint["high"] < 0).any():
        verdict, weakest = FAILS, joint.iloc[int(joint["high"].argmin())]
    else:
        # Without intervals (one cluster) the smallest difference, else the one that may be negative.
        by = table["low"].fillna(np.inf) if table["low"].notna().any() else table["value"]
        verdict, weakest = UNDECIDED, joint.iloc[int(by.argmin())]
    positive = int((table["low"] > 0).sum())
    what = (
        f"{positive} of {len(table)} differences are above 0; the weakest is "
        f"{WORDS[weakest['first']]} minus {WORDS[weakest['second']]}"
    )
    title = f"{claim}, top {_percent(bank)}"
    return _verdict(title, what, weakest, bank.num_requested, str(bank.facts["gain"]), verdict)


def _verdict(
    claim: str, what: str, row: Any, n: int, gain: str, verdict: str | None = None
) -> Verdict:
    """The verdict on a difference: a row with value, low, high and note."""
    value, low, high = (float(row[name]) for name in ("value", "low", "high"))
    verdict = judge(low, high) if verdict is None else verdict
    unit = "of the initial KL" if gain_unit(gain) == "share" else "nats"
    direction = gain_direction(gain)
    number = f"{signed(value, 4)} {unit}" if np.isfinite(value) else "no estimate"
    if np.isfinite(low):
        number += f" [{signed(low, 4)}, {signed(high, 4)}]"
    elif np.isfinite(value):
        number += ", no interval"
    because = f" ({row['note']})" if row["note"] else ""
    return Verdict(
        claim=claim,
        verdict=verdict,
        value=value,
        low=low,
        high=high,
        n=n,
        unit=gain_unit(gain),
        direction=direction,
        sentence=f"{claim}, {direction} KL: {verdict}; {what}: {number}, n = {n}{because}.",
    )


def _percent(bank: MatchedBank) -> str:
    return f"{100 * bank.budget:g} %"
