"""The settings of a selection beyond the paper's: schedules, scopes, weights, draws, stop tokens, controls.

Part of `TeachabilityConfig`, in a file of its own. Every default is the paper's method.
"""

from dataclasses import dataclass, field
from typing import Any

from taopd.errors import ConfigError, suggest
from taopd.selectors import (
    DRAWS,
    SCHEDULES,
    SCOPES,
    SELECTORS,
    Rules,
    check_settings,
    resolve_selector,
    resolve_weighting,
)
from taopd.signals import LISTS_GIVE

STOP_TOKENS = ("train", "exclude", "merge")


@dataclass
class SelectionSettings:
    """Which tokens train and how much, beyond selector and budget."""

    budget_schedule: str = field(
        default="constant",
        metadata={"help": "From `budget` to `budget_end`: constant, linear or cosine."},
    )
    budget_end: float | None = field(
        default=None, metadata={"help": "Budget at the last step of a schedule, (0, 1]."}
    )
    budget_steps: int | None = field(
        default=None, metadata={"help": "Steps that a schedule runs over. None: max_steps."}
    )
    budget_scope: str = field(
        default="global",
        metadata={
            "help": "global: one budget for the generation batch (the paper). response: the share holds in "
            "every completion by itself."
        },
    )
    budget_memory: float | None = field(
        default=None,
        metadata={
            "help": "None: exactly the budget in every generation batch. In [0, 1): keep what reaches a "
            "threshold that is averaged over batches with this memory, so that the budget holds on average."
        },
    )
    weighting: str = field(
        default="hard",
        metadata={
            "help": "Weight of a kept token: hard (1, or the selector's own), score, rank, or the name or "
            "expression of a score."
        },
    )
    weights_mean_one: bool = field(
        default=False,
        metadata={"help": "Scale the weights to a mean of one over the kept tokens."},
    )
    draw: str = field(
        default="top",
        metadata={
            "help": "top: the best tokens. proportional: drawn with probability in proportion to the score, "
            "weight 1 / probability, so that the expected loss is that of all tokens."
        },
    )
    draw_floor: float = field(
        default=0.1, metadata={"help": "Share of the draws that ignores the score, [0, 1]."}
    )
    draw_clip: float = field(
        default=10.0,
        metadata={"help": "Largest weight of a drawn token, as a multiple of the mean one; >= 1."},
    )
    gather_limit: int = field(
        default=10_000_000,
        metadata={
            "help": "Several processes: completion tokens of a generation batch up to which every process "
            "gets the signals of all of them (some 20 bytes a token). Above, only counts travel; same tokens."
        },
    )
    position_cost: float = field(
        default=0.0,
        metadata={
            "help": "Score units that a selection pays for reaching the longest completion's last token; "
            "above 0 it prefers early tokens, and the forward ends earlier."
        },
    )
    teachability_floor: float = field(
        default=0.0,
        metadata={
            "help": "Only tokens with D x C of at least this many nats are kept, so that the budget shrinks "
            "when little is left to teach. 0: the budget is always spent."
        },
    )
    replay_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Share of the budget that goes to random tokens on which the models agree (C >= 0.9, "
            "D <= 0.1 nats), [0, 1]."
        },
    )
    stop_tokens: str = field(
        default="train",
        metadata={
            "help": "train: like any token. exclude: never selected. merge: all ids that end a completion "
            "are one token in signals and loss (not for tool use, where they differ)."
        },
    )
    stop_token_ids: list[int] | None = field(
        default=None,
        metadata={"help": "Which ids stop_tokens means. None: those of student and teacher."},
    )
    shadow_selectors: list[str] | None = field(
        default=None,
        metadata={
            "help": "Selectors whose masks are compared with the active one at every step (Jaccard), at no "
            "model cost; names or expressions."
        },
    )
    match_update_norm: float | None = field(
        default=None,
        metadata={
            "help": "Rescale every optimizer update to this L2 norm, so that arms differ in direction "
            "alone; the learning rate then only decides the direction's mix with weight decay."
        },
    )

    max_update_norm: float | None = field(
        default=None,
        metadata={
            "help": "Trust region: larger optimizer updates are scaled down to this L2 norm."
        },
    )

    def check_selection(
        self, *, signals: str, selector: str, max_steps: int, min_keep: int
    ) -> None:
        """Refuse values out of range, unknown names, and signals that the source cannot give.

        Raises:
            ConfigError: names the setting, and for a signal the selectors that do without.
        """
        for name, choices in (
            ("budget_schedule", SCHEDULES),
            ("budget_scope", SCOPES),
            ("draw", DRAWS),
            ("stop_tokens", STOP_TOKENS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is unknown.{suggest(str(value), choices)}")
        self._check_numbers(max_steps)
        check_settings(
            Rules(
                min_keep=min_keep,
                scope=self.budget_scope,
                draw=self.draw,
                memory=self.budget_memory,
                draw_floor=self.draw_floor,
                draw_clip=self.draw_clip,
                position_cost=self.position_cost,
                floor=self.teachability_floor,
                replay=self.replay_fraction,
                weighting=self.weighting,
            ),
            resolve_selector(selector),
        )
        names = [selector, *(self.shadow_selectors or [])]
        read = {name: resolve_selector(name).needs for name in names}
        weight = resolve_weighting(self.weighting)
        read |= {} if weight is None else {self.weighting: weight.needs}
        if signals == "topk_lists":
            _check_lists(read)

    def _check_numbers(self, max_steps: int) -> None:
        end, steps, norm = self.budget_end, self.budget_steps, self.match_update_norm
        _require(end is None or 0.0 < end <= 1.0, "budget_end", end, "in (0, 1]")
        _require(self.gather_limit >= 0, "gather_limit", self.gather_limit, "0 or more tokens")
        _require(steps is None or steps >= 1, "budget_steps", steps, "1 or more")
        _require(norm is None or norm > 0.0, "match_update_norm", norm, "above 0")
        most = self.max_update_norm
        _require(most is None or most > 0.0, "max_update_norm", most, "above 0")
        if most is not None and norm is not None:
            raise ConfigError("max_update_norm and match_update_norm exclude each other")
        if (self.budget_schedule == "constant") != (end is None):
            raise ConfigError(
                f"budget_schedule={self.budget_schedule!r} and budget_end={end}: a schedule needs both, "
                "a constant budget neither"
            )
        if end is not None and steps is None and max_steps <= 0:
            raise ConfigError("a budget schedule needs max_steps or budget_steps")
        if self.stop_token_ids is not None and self.stop_tokens == "train":
            raise ConfigError("stop_token_ids has no effect with stop_tokens='train'")


def _check_lists(read: dict[str, tuple[str, ...]]) -> None:
    for name, needs in read.items():
        missing = sorted(set(needs) - LISTS_GIVE)
        if missing:
            enough = [known for known, rule in SELECTORS.items() if set(rule.needs) <= LISTS_GIVE]
            raise ConfigError(
                f"{name!r} reads the signal {missing[0]!r}, which signals='topk_lists' cannot give: set "
                f"signals='exact', or choose among {', '.join(sorted(enough))}"
            )


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r}: must be {expected}")
