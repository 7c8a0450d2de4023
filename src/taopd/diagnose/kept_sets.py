"""The tokens of a bank that a selector keeps, and repeated draws of the random control.

`taopd.selectors.select` ranks the bank's tokens and the first N are kept, so scores and ties are
those of training.

Source: docs/math.md, "The diagnostic"; ties R15.
"""

import numpy as np
from jaxtyping import Float, Int

from taopd.errors import require
from taopd.selectors import SELECTORS, check_budget, select
from taopd.signals import SignalTable

TIE = 1e-9
NUM_DRAWS = 200
"""Draws of the random control: the mean over draws is then known to 1/14 of one draw's scatter."""


def hard_selectors() -> tuple[str, ...]:
    """Names of the registered selectors that keep or drop a token by D, C, H and position alone.

    Without `full`, which has no N, and without those that read signals which a bank does not hold.
    """
    names = (n for n, rule in SELECTORS.items() if not rule.weighted and not rule.needs)
    return tuple(sorted(set(names) - {"full"}))


def matched_count(budget: float, num_tokens: int) -> int:
    """The number of kept tokens, N = max(1, round(budget n)), at most n. [docs/math.md, "The diagnostic"]"""
    check_budget(budget)
    return min(num_tokens, max(1, round(budget * num_tokens)))


def selector_order(
    signals: SignalTable, selector: str, num_kept: int, *, normalization: str, reference: bool
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """0-based rank (-1: no candidate) and score of every token for a selector keeping `num_kept`.

    Only a selector with a lead (`split`) ranks differently for another `num_kept`.
    """
    choice = select(
        signals,
        selector=selector,
        # select() rounds up; half a token less makes its budget, and so split's lead, exactly N.
        budget=(num_kept - 0.5) / signals.position.shape[0],
        normalization=normalization,
        rules="reference" if reference else "paper",
    )
    return choice.order.numpy(), choice.scores.numpy()


def places_by_position(ranks: np.ndarray, scores: np.ndarray, num_kept: int) -> int:
    """Number of kept tokens whose score ties with a token left out: position decided, not the score.

    Equal means within `TIE`: a saturated soft OR comes out as 1 or a rounding error below it.
    """
    candidates = ranks >= 0
    kept = candidates & (ranks < num_kept)
    if not kept.any() or kept.sum() == candidates.sum():
        return 0
    last = scores[kept][ranks[kept].argmax()]
    tied = candidates & (np.abs(scores - last) <= TIE)
    return int((tied & kept).sum()) if (tied & ~kept).any() else 0


def random_draws(
    values: np.ndarray, num_kept: int, num_draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each token was drawn, and the mean gain of each random draw of `num_kept` tokens.

    Not `select(selector="random")`: the same law, without 200 passes over the bank.

    Raises:
        ConfigError: for fewer than two draws.
    """
    require(num_draws >= 2, "num_draws", num_draws, f"at least 2; {NUM_DRAWS} is usual")
    generator = np.random.default_rng([seed, num_kept])
    times = np.zeros(len(values))
    means = np.empty(num_draws)
    for draw in range(num_draws):
        index = generator.choice(len(values), num_kept, replace=False, shuffle=False)
        times[index] += 1
        means[draw] = values[index].mean()
    return times, means
