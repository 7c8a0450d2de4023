"""The settings of the anchor: what holds the unselected tokens while the selected ones train.

Part of `TeachabilityConfig`, in a file of its own.
"""

from dataclasses import dataclass, field
from typing import Any

from taopd.errors import ConfigError, suggest

ANCHOR_LOSSES = ("reverse_kl", "forward_kl")
METHODS = ("anchored", "published")
GUARDS = ("off", "warn", "stop", "restore")


@dataclass
class AnchorSettings:
    """How strongly, where and to what the unselected tokens are held."""

    method: str = field(
        default="anchored",
        metadata={
            "help": "anchored: unselected tokens are held near the initial student, so long runs stay up. "
            "published: the paper's method, unchanged, which can collapse (docs/results/collapse.md)."
        },
    )
    anchor_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the anchor, KL(student || initial student) on unselected tokens. None: 1 with "
            "method='anchored', 0 with 'published'; a number wins over both."
        },
    )
    anchor_fraction: float = field(
        default=0.05,
        metadata={"help": "Random share of the unselected tokens that carries the anchor, (0, 1]."},
    )
    anchor_responses: float = field(
        default=0.25,
        metadata={
            "help": "Random share of the completions that these tokens are drawn from, at least "
            "anchor_fraction. Only they need the reference's forward."
        },
    )
    anchor_loss: str = field(
        default="reverse_kl",
        metadata={
            "help": "reverse_kl: KL(student || reference). forward_kl: KL(reference || student), which let "
            "go of a seed in the tiny lab."
        },
    )

    collapse_guard: str = field(
        default="warn",
        metadata={
            "help": "When the run shows signs of collapse: warn, stop, restore (stop, and load the last "
            "healthy checkpoint), or off. Compares with the initial student, of which it keeps a frozen copy "
            "unless the student is a LoRA adapter."
        },
    )
    guard_every: int = field(
        default=5, metadata={"help": "Optimizer steps between two looks of the guard."}
    )

    @property
    def coef(self) -> float:
        """The anchor's weight, whichever setting it came from."""
        return self.anchor_coef or 0.0

    def check_anchor(self) -> None:
        """Refuse values out of range, and settle the coefficient.

        Raises:
            ConfigError: names the setting.
        """
        if self.anchor_coef is None:
            self.anchor_coef = 1.0 if self.method == "anchored" else 0.0
        _require(self.coef >= 0.0, "anchor_coef", self.coef, "0 or more")
        fraction, responses = self.anchor_fraction, self.anchor_responses
        _require(0.0 < fraction <= 1.0, "anchor_fraction", fraction, "in (0, 1]")
        _require(
            fraction <= responses <= 1.0,
            "anchor_responses",
            responses,
            f"in [anchor_fraction={fraction}, 1]",
        )
        _require(self.guard_every >= 1, "guard_every", self.guard_every, "1 or more steps")
        for name, choices in (
            ("method", METHODS),
            ("anchor_loss", ANCHOR_LOSSES),
            ("collapse_guard", GUARDS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is unknown.{suggest(str(value), choices)}")


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r}: must be {expected}")
