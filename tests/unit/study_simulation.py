"""Simulated studies: accuracies with a common seed effect and independent noise, numpy only.

    accuracy[arm, seed] = level + effect[arm] + seed effect + noise[arm, seed]

`coverage` and `family_error` are asserted in test_study_statistics.py, `own_best_coverage` in
test_own_best.py; run this file to print the numbers that docs/math.md quotes:

    python -m tests.unit.study_simulation
"""

import numpy as np

from taopd.experiments.study.analysis import Question, analyse
from taopd.experiments.study.best_of import between_best
from taopd.experiments.study.statistics import t_estimate

NOISE, SEED_EFFECT, LEVEL = 0.02, 0.03, 0.5
DIFFERENCE = 0.04


def coverage(num_seeds: int, *, studies: int = 2000, seed: int = 0, collapse: float = 0.0) -> float:
    """Share of intervals of a paired difference that hold the true one.

    collapse: chance that a seed of the better arm loses 0.4.
    """
    generator = np.random.default_rng(seed)
    truth = DIFFERENCE - 0.4 * collapse
    covered = 0
    for _ in range(studies):
        shared = generator.normal(0, SEED_EFFECT, num_seeds)
        arms = LEVEL + shared + generator.normal(0, NOISE, (2, num_seeds))
        arms[1] += DIFFERENCE - 0.4 * (generator.random(num_seeds) < collapse)
        estimate = t_estimate(list(arms[1] - arms[0]))
        assert estimate.low is not None and estimate.high is not None
        covered += estimate.low <= truth <= estimate.high
    return covered / studies


WORSE = 0.2
"""By how much the other rates of an arm with one good rate are worse."""


def over_seeds(generator, equal_rates: tuple[int, int], num_rates: int, num_seeds: int):
    """[rate, seed] accuracies of two arms whose best rate is equally good.

    equal_rates: how many rates of each arm are as good as its best one.
    """
    arms = generator.normal(0, NOISE, (2, num_rates, num_seeds))
    arms += LEVEL + generator.normal(0, SEED_EFFECT, num_seeds)
    for arm, count in zip(arms, equal_rates, strict=True):
        arm[count:] -= WORSE
    return arms


def over_problems(generator, equal_rates: tuple[int, int], num_rates: int, num_problems: int):
    """[rate, problem] zeros and ones, easy and hard problems common to both arms."""
    chance = generator.beta(1.0, 1.0, num_problems)
    arms = np.empty((2, num_rates, num_problems))
    for arm, count in zip(arms, equal_rates, strict=True):
        for index in range(num_rates):
            good = chance if index < count else np.maximum(0.0, chance - WORSE)
            arm[index] = generator.random(num_problems) < good
    return arms


def own_best_coverage(
    draw, equal_rates: tuple[int, int], num_units: int, *, num_rates: int = 5, studies: int = 1000
) -> tuple[float, float]:
    """Share of intervals of the difference at own best that hold 0: corrected, and at the chosen rates."""
    generator = np.random.default_rng(0)
    corrected = naive = 0
    for _ in range(studies):
        first, second = draw(generator, equal_rates, num_rates, num_units)
        bounds = between_best(first, second)
        corrected += bounds.low <= 0 <= bounds.high
        chosen = (arm[arm.mean(1).argmax()] for arm in (first, second))
        estimate = t_estimate(list(np.subtract(*chosen)))
        naive += estimate.low <= 0 <= estimate.high
    return corrected / studies, naive / studies


def outcome(name, selector, budget, seed, accuracy, **more):
    """A per-arm result with a flat curve."""
    return {
        "name": name,
        "selector": selector,
        "budget": budget,
        "seed": seed,
        "base_accuracy": 0.4,
        "accuracy_greedy": accuracy,
        "accuracy_sampled": accuracy,
        "accuracy_curve": [[0, 0.4], [10, accuracy]],
        "accuracy_sampled_curve": [[0, 0.4], [10, accuracy]],
    } | more


def null_study(generator, num_seeds: int) -> list[dict]:
    """Full, and three selectors and random at two budgets, all equally good."""
    names = [("full", 1.0)] + [
        (selector, budget)
        for budget in (0.05, 0.1)
        for selector in ("random", "teachability", "entropy", "tip")
    ]
    shared = generator.normal(0, SEED_EFFECT, num_seeds)
    return [
        outcome(f"{selector}@{budget}", selector, budget, seed, LEVEL + shared[seed] + noise)
        for selector, budget in names
        for seed, noise in enumerate(generator.normal(0, NOISE, num_seeds))
    ]


def family_error(num_seeds: int, *, studies: int = 1000, seed: int = 0) -> float:
    """Share of studies without any difference in which some corrected p is below 0.05."""
    generator = np.random.default_rng(seed)
    wrong = 0
    for _ in range(studies):
        rows = analyse(null_study(generator, num_seeds), question=Question())["comparisons"]
        assert len(rows) == 14
        wrong += any(row["p_holm"] < 0.05 for row in rows)
    return wrong / studies


if __name__ == "__main__":
    for n in (3, 5, 10):
        print(f"{n} seeds: coverage {coverage(n):.3f}, family error {family_error(n):.3f}")
        print(f"  one seed in five collapses: coverage {coverage(n, collapse=0.2):.3f}")
    for draw, units in ((over_seeds, 3), (over_seeds, 10), (over_problems, 300)):
        for equal in ((5, 1), (5, 5), (1, 1)):
            found = own_best_coverage(draw, equal, units, studies=4000)
            print(
                f"{draw.__name__}, {units}, equally good rates {equal}: {found[0]:.3f}, naive {found[1]:.3f}"
            )
