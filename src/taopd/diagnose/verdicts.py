"""The paper's claims as sentences: holds, does not hold, or undecided here, and by which interval.

What: each claim is a difference that should be positive. It holds where the 95 % paired
cluster-bootstrap interval lies above 0, does not hold where it lies below 0, and is undecided
otherwise, or where there is no interval (one prompt, too few Q3 tokens).

A claim of several differences (the order of selectors; random is worst) holds only if every one of
them does, which needs no correction. It is refuted by any single one, so there the interval is
Bonferroni's over the differences: looking five times must not make refutation five times as likely.
The number shown is that of the weakest
difference, with the interval that decided.

Learnable disagreement against divergence is judged twice: as published, where clipping D~ at its 95 %
quantile makes the divergence selector choose by position among equal scores at 3 % (the sentence
says how often), and on the min-max scale, which has no such ties. A lead that only the first shows
is a lead over ties, not over divergence.

Every claim is judged for each unit and each direction of KL, since they order learnable and
incompatible tokens differently; a reader who is shown one of the four may be misled. The 95 % is per
verdict: with four gains and ten claims, two of 40 would be decided by chance if nothing were true.

Source: METHOD section 4.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from taopd.diagnose.features import (
    discover_gains,
    gain_column,
    gain_direction,
    gain_unit,
)
from taopd.diagnose.matched import MatchedBank, matched_banks, matched_differences
from taopd.diagnose.quadrants import q3_gap
from taopd.diagnose.regression import CONTRAST, decomposition

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided here"
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
    """One of HOLDS, FAILS, UNDECIDED."""
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
    tokens: pd.DataFrame,
    *,
    gains: Sequence[str] | None = None,
    k: int = 16,
    proxy: str = "mass",
    cluster: str = "prompt",
    num_resamples: int = 1000,
    seed: int = 0,
    method: str = "percentile",
    reference: bool = False,
) -> list[Verdict]:
    """Judge every claim for every gain column of the table (both units, both directions).

    Args:
        gains: default: all that the table has. With `reference` each is replaced by its relative
            form, and forms named twice are judged once. [P!=C]

    Raises:
        DataError: as `token_features`.
    """
    gains = discover_gains(tokens) if gains is None else gains
    gains = list(dict.fromkeys(gain_column(name, reference=reference) for name in gains))
    shared: dict[str, Any] = {
        "k": k,
        "proxy": proxy,
        "cluster": cluster,
        "num_resamples": num_resamples,
        "seed": seed,
        "method": method,
        "reference": reference,
    }
    found = []
    for gain in gains:
        found.append(_decomposition_verdict(tokens, gain, shared))
        banks = matched_banks(tokens, budgets=CLAIM_BUDGETS, selectors=ORDER, gain=gain, **shared)
        untied = matched_banks(
            tokens,
            budgets=CLAIM_BUDGETS,
            selectors=ORDER[:2],
            normalization="minmax",
            gain=gain,
            **shared,
        )
        found += [_one_pair(bank) for bank in banks]
        found += [_one_pair(bank, ", min-max scale") for bank in untied]
        found.append(_q3_verdict(tokens, gain, shared))
        neighbors = list(itertools.pairwise(ORDER))
        order = " > ".join(WORDS[name] for name in ORDER)
        against_random = [(name, "random") for name in ORDER[:-1]]
        found += [_several(bank, f"order {order}", neighbors) for bank in banks]
        found += [_several(bank, "random is worst", against_random) for bank in banks]
    return found


def _decomposition_verdict(tokens: pd.DataFrame, gain: str, shared: dict[str, Any]) -> Verdict:
    options = {key: value for key, value in shared.items() if key != "k"}
    table = decomposition(tokens, ks=[shared["k"]], gain=gain, targets=[TARGET], **options)
    row = table[table["term"] == CONTRAST].iloc[0]
    return _verdict(
        "beta_L > beta_I",
        "beta_L - beta_I per standard deviation, gain winsorized at 1 %",
        row["beta"],
        (row["low"], row["high"]),
        judge(row["low"], row["high"]),
        int(row["n"]),
        row["gain"],
        row["note"],
    )


def _q3_verdict(tokens: pd.DataFrame, gain: str, shared: dict[str, Any]) -> Verdict:
    row = q3_gap(tokens, groups=[3], gain=gain, **shared).iloc[0]
    return _verdict(
        "Q3 is heterogeneous: high C gains more than low C",
        "top minus bottom third of C in Q3",
        row["value"],
        (row["low"], row["high"]),
        judge(row["low"], row["high"]),
        int(row["num_high"] + row["num_low"]),
        row["gain"],
        row["note"],
    )


def _one_pair(bank: MatchedBank, scale: str = "") -> Verdict:
    row = matched_differences(bank, [("teachability", "divergence")]).iloc[0]
    return _verdict(
        f"learnable disagreement beats divergence, top {_percent(bank)}{scale}",
        "difference of mean gain of the kept tokens",
        row["value"],
        (row["low"], row["high"]),
        judge(row["low"], row["high"]),
        bank.num_requested,
        str(bank.facts["gain"]),
        row["note"],
    )


def _several(bank: MatchedBank, claim: str, pairs: list[tuple[str, str]]) -> Verdict:
    table = matched_differences(bank, pairs)
    if (table["low"] > 0).all():
        verdict, weakest = HOLDS, table.iloc[int(table["low"].argmin())]
        ends = (weakest["low"], weakest["high"])
    elif (table["joint_high"] < 0).any():
        verdict, weakest = FAILS, table.iloc[int(table["joint_high"].argmin())]
        ends = (weakest["joint_low"], weakest["joint_high"])
    else:
        # Without intervals (one cluster) the smallest difference, else the one that may be negative.
        by = table["low"].fillna(np.inf) if table["low"].notna().any() else table["value"]
        verdict, weakest = UNDECIDED, table.iloc[int(by.argmin())]
        ends = (weakest["joint_low"], weakest["joint_high"])
    shown = int((table["low"] > 0).sum())
    what = (
        f"{shown} of {len(table)} differences are above 0; the weakest is "
        f"{WORDS[weakest['first']]} minus {WORDS[weakest['second']]}"
    )
    return _verdict(
        f"{claim}, top {_percent(bank)}",
        what,
        weakest["value"],
        ends,
        verdict,
        bank.num_requested,
        str(bank.facts["gain"]),
        weakest["note"],
    )


def _verdict(
    claim: str,
    what: str,
    value: float,
    ends: tuple[float, float],
    verdict: str,
    n: int,
    gain: str,
    note: str,
) -> Verdict:
    unit = "of the initial KL" if gain_unit(gain) == "share" else "nats"
    direction = gain_direction(gain)
    number = "no estimate" if not np.isfinite(value) else f"{value:+.4f} {unit}"
    if np.isfinite(ends[0]):
        number += f" [{ends[0]:+.4f}, {ends[1]:+.4f}]"
    elif np.isfinite(value):
        number += ", no interval"
    because = f" ({note})" if note else ""
    return Verdict(
        claim=claim,
        verdict=verdict,
        value=float(value),
        low=float(ends[0]),
        high=float(ends[1]),
        n=n,
        unit=gain_unit(gain),
        direction=direction,
        sentence=f"{claim}, {direction} KL: {verdict}; {what}: {number}, n = {n}{because}.",
    )


def _percent(bank: MatchedBank) -> str:
    return f"{100 * float(str(bank.facts['budget'])):g} %"
