"""Normalized columns and quadrants, one readable formula each.

What: h, d, c are H~, D~, C~ (eq. 11) and dc is Norm(D C). A score is a function of these columns;
more of it means more worth training on. Selectors (`taopd.selectors.registry`) add who is a
candidate and which end is kept.

Two sets of rules. `paper`: valid rows set the scale, eq. 11 with its epsilon. `reference`: the
released code's R8-R11, where loss-masked rows set the scale too, non-finite values become 0 and a
column with no spread becomes 0. A column of equal values gives 0 under both, never NaN.

The forms `h + d - h d` are kept as written: the released code's order among saturated rows depends
on how they round.

Source: docs/math.md, docs/released-code.md; arXiv 2605.26844, eq. 5, 11, 12, 16.
"""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.distributed.collectives import ALONE, Ranks, quantiles, uniform_part
from taopd.errors import ConfigError, NumericsError, require_known
from taopd.signals import SignalTable

EPSILON = 1e-12
"""Epsilon of eq. 11, whose value the paper does not give; the released code's smallest spread
(R8)."""
QUANTILES = (0.05, 0.95)
"""Q05 and Q95 of eq. 11."""
NORMALIZATIONS = ("quantile", "minmax", "none")
RULES = ("paper", "reference")
Scale = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedView:
    """What a score function reads: normalized columns of every row, and the table they come from.

    Under the paper's rules rows that may not train hold 0 and quadrant 0. Aligned example:

        valid       T    T    T    F
        h          .0   1.   .4   .0
        quadrant    3    1    1    0
    """

    h: Float[Tensor, " N"]
    """H~ in [0, 1]."""
    d: Float[Tensor, " N"]
    """D~ in [0, 1]."""
    c: Float[Tensor, " N"]
    """C~ in [0, 1]."""
    dc: Float[Tensor, " N"]
    """Norm(D C) in [0, 1]."""
    quadrant: Int[Tensor, " N"]
    """int8: 1 high H high D, 2 high H low D, 3 low H high D, 4 both low; 0 outside the
    population."""
    table: SignalTable
    generator: torch.Generator
    """On the CPU, seeded from (seed, step): the same draws whatever the number of ranks."""
    normalization: str = "quantile"
    rules: str = "paper"

    def signal(self, name: str) -> Float[Tensor, " N"]:
        """A further signal of the table, as it is; a selector that reads it declares it in `needs`.

        Raises:
            ConfigError: if the table does not hold it.
        """
        if name not in self.table.extra:
            raise ConfigError(
                f"the table does not hold the signal {name!r}; declare needs=({name!r},) where the selector "
                f"is registered. It holds: {', '.join(sorted(self.table.extra)) or 'no further signal'}"
            )
        return self.table.extra[name].double()

    def normalized(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Any values scaled to [0, 1] as H, D and C are."""
        everything = torch.ones_like(self.table.valid)
        population = self.table.valid if self.rules == "paper" else everything
        return normalize(
            values,
            population,
            normalization=self.normalization,
            rules=self.rules,
            ranks=self.table.ranks,
        )

    def uniform(self) -> Float[Tensor, " N"]:
        """One draw on [0, 1) per row of the global table."""
        # Every rank draws the numbers of all rows and keeps its own: the number of ranks changes nothing.
        draws = uniform_part(len(self.table), self.generator, self.table.ranks)
        return draws.to(self.h.device)


def scale_of(
    values: Float[Tensor, " N"],
    population: Bool[Tensor, " N"],
    *,
    normalization: str = "quantile",
    rules: str = "paper",
    ranks: Ranks = ALONE,
) -> Scale | None:
    """The two values that `normalize` maps to 0 and 1; None where nothing is finite on any rank."""
    ascending = values[population & values.isfinite()].sort().values
    ends = QUANTILES if normalization == "quantile" else (0.0, 1.0)
    found = quantiles(ascending, ends, snap=rules == "paper", ranks=ranks)
    if found is None:
        return None
    smallest, largest = found
    if normalization == "quantile":
        return smallest, largest
    return (smallest, largest) if normalization == "minmax" else (0.0, max(largest, EPSILON))


def normalize(
    values: Float[Tensor, " N"],
    population: Bool[Tensor, " N"],
    *,
    normalization: str = "quantile",
    rules: str = "paper",
    ranks: Ranks = ALONE,
) -> Float[Tensor, " N"]:
    """Scale values to [0, 1] by the spread of the finite values of the population. [eq. 11; R8-R10]

        quantile   clip((z - Q05) / (Q95 - Q05 + eps), 0, 1)
        minmax     the same with the smallest and the largest value
        none       clip(z / max(largest, 1e-12), 0, 1)

    Rules "reference": no eps, 0 everywhere if the spread is below 1e-12. Rows outside the
    population and non-finite values become 0.

    Args:
        ranks: who holds the rest of the population.
    """
    scale = scale_of(values, population, normalization=normalization, rules=rules, ranks=ranks)
    if scale is None:
        return torch.zeros_like(values)
    # Rows outside the population are no part of the scale; a value of theirs could be anything.
    usable, (low, high) = population & values.isfinite(), scale
    spread = high - low
    if rules == "reference" and abs(spread) < EPSILON:
        return torch.zeros_like(values)
    # Eq. 11's epsilon, which also keeps a column of equal values from becoming NaN.
    if rules == "paper" and normalization != "none":
        spread += EPSILON
    # `where`, not a product: 0 times NaN is NaN.
    scaled = ((values - low) / spread).clamp(0.0, 1.0)
    return torch.where(usable, scaled, torch.zeros_like(scaled))


def quadrants(
    h: Float[Tensor, " N"],
    d: Float[Tensor, " N"],
    population: Bool[Tensor, " N"],
    ranks: Ranks = ALONE,
) -> Int[Tensor, " N"]:
    """Quadrant 1..4 (int8) by the medians of H~ and D~; on the median counts as high. [R11]"""
    if not ranks.any(population):
        return torch.zeros_like(h, dtype=torch.int8)
    columns = [values[population].sort().values for values in (h, d)]
    medians = [quantiles(column, (0.5,), ranks=ranks) for column in columns]
    assert medians[0] is not None and medians[1] is not None
    high_h, high_d = h >= medians[0][0], d >= medians[1][0]
    number = 4 - 2 * high_h.to(torch.int8) - high_d.to(torch.int8)  # HH 1, HL 2, LH 3, LL 4
    return number.masked_fill_(~population, 0)


def normalized_view(
    table: SignalTable,
    *,
    normalization: str = "quantile",
    rules: str = "paper",
    generator: torch.Generator | None = None,
) -> NormalizedView:
    """Normalize D, C, H and D C of a table, and place every row in its quadrant.

    Raises:
        ConfigError: for an unknown normalization or set of rules.
        NumericsError: under the paper's rules, if a valid row's D, C or H is not finite.
    """
    require_known("normalization", normalization, NORMALIZATIONS)
    require_known("rules", rules, RULES)
    columns = {
        "h": table.entropy.double(),
        "d": table.disagreement.double(),
        "c": table.compatibility.double(),
    }
    # R8: in the released code rows that may not train set the scale too.
    population = table.valid if rules == "paper" else torch.ones_like(table.valid)
    # A NaN at a token that may train is a fault of a model; normalized to 0 it would go unseen.
    if rules == "paper":
        for name, column in columns.items():
            bad = ~column.isfinite() & table.valid
            if bool(bad.any()):
                raise NumericsError(
                    f"{name.upper()} is not finite at row {int(bad.nonzero()[0])} of the table; "
                    'mask the row or look for NaN logits (rules="reference" reads it as 0)'
                )
    # Norm(D C) is a column of its own: the product of normalized columns is another number.
    columns["dc"] = columns["d"] * columns["c"]
    scaled = {
        name: normalize(
            column, population, normalization=normalization, rules=rules, ranks=table.ranks
        )
        for name, column in columns.items()
    }
    return NormalizedView(
        **scaled,
        quadrant=quadrants(scaled["h"], scaled["d"], population, table.ranks),
        table=table,
        generator=torch.Generator() if generator is None else generator,
        normalization=normalization,
        rules=rules,
    )


def seeded_generator(seed: int, step: int) -> torch.Generator:
    """CPU generator for one step, the same on every rank; neighboring seeds and steps share
    nothing."""
    # Not seed + step: seed 0 at step 1 would then draw what seed 1 draws at step 0.
    digest = hashlib.blake2b(f"{seed},{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
