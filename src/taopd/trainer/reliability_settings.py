"""Settings of `TeachabilityConfig` for numbers that are not finite and steps with nothing to learn from."""

from dataclasses import dataclass, field

from taopd.errors import ConfigError

ACTIONS = ("stop", "skip")


@dataclass
class ReliabilitySettings:
    """What happens to a step with a NaN or an infinity, and to one without a token to train on."""

    on_bad_numbers: str = field(
        default="stop",
        metadata={
            "help": "A NaN or infinity in logits, loss or gradient: 'stop' before the update, or 'skip' the "
            "update, count and warn. The batch is saved to <output_dir>/bad_numbers either way."
        },
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={
            "help": "Stop after so many steps in a row without an update: bad numbers that are skipped, or "
            "batches without a token to train on."
        },
    )

    def check_reliability(self) -> None:
        """Refuse values outside their range.

        Raises:
            ConfigError: an unknown action, or fewer than one step.
        """
        if self.on_bad_numbers not in ACTIONS:
            raise ConfigError(
                f"on_bad_numbers={self.on_bad_numbers!r}: must be one of {', '.join(ACTIONS)}"
            )
        if self.max_skipped_steps < 1:
            raise ConfigError(f"max_skipped_steps={self.max_skipped_steps}: must be at least 1")
