"""The specification of a lab: all settings that determine its files, and its folder name.

What: a flat frozen dataclass of sizes and seeds. Its JSON, the variant's rules and `CODE_VERSION`
are hashed into the folder's name, so a changed setting is another lab and never a stale one.
Why not hash the source: a comment would then throw away every built lab. Whoever changes what is
trained raises `CODE_VERSION`. Not in the hash: torch and transformers versions; they are in
`lab.json`.
With the sizes below the teacher gets all of 500 held-out sums right.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from taopd.errors import ConfigError, suggest
from taopd.experiments.lab.variants import NUM_NUMBERS, VARIANTS, Role, Variant

CODE_VERSION = 1
"""Raise it whenever the same spec would give other files."""
LATER_RULES = ("rarest_share",)
"""Rules of a variant that came after the first labs; None: the lab is what it was without them."""


def check_variant(name: str) -> None:
    """Refuse a variant that does not exist.

    Raises:
        ConfigError: with the nearest known name.
    """
    if name not in VARIANTS:
        raise ConfigError(f"no lab is called {name!r}.{suggest(name, VARIANTS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabSpec:
    """Sizes and seeds of a lab."""

    variant: str = "dialect"
    seed: int = 0
    num_train_prompts: int = 4000
    num_test_prompts: int = 500
    teacher_steps: int = 3000
    student_steps: int = 3000
    batch_size: int = 64
    """Sequences per pretraining step."""
    learning_rate: float = 3e-3
    """Peak of the one-cycle schedule."""
    teacher_width: int = 64
    student_width: int = 48
    num_layers: int = 2
    head_dim: int = 16
    rewrite_share: float = 0.5
    """Share of the markers in the teacher's training context that are the student's."""
    carryless_share: float = 0.5
    """Share of the student's training digits that ignore the carry."""

    def __post_init__(self) -> None:
        check_variant(self.variant)
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            # By type, not by instance: true is no number.
            if kind is float and (type(value) not in (int, float) or not 0 <= value <= 1):
                raise ConfigError(f"{name}: expected a number from 0 to 1, got {value!r}.")
            if kind is int and name != "seed" and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}: expected a whole number of at least 1, got {value!r}.")
        for name in ("teacher_width", "student_width"):
            if getattr(self, name) % self.head_dim:
                raise ConfigError(
                    f"{name}: {getattr(self, name)} is not a multiple of head_dim={self.head_dim}."
                )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim: rotary positions need an even number, got {self.head_dim}."
            )
        if self.num_train_prompts + self.num_test_prompts > NUM_NUMBERS**2:
            raise ConfigError(f"There are only {NUM_NUMBERS**2:,} prompts: ask for fewer.")

    @classmethod
    def from_sizes(cls, variant: str, seed: int, sizes: dict[str, Any]) -> "LabSpec":
        """Build a spec from keyword arguments.

        Raises:
            ConfigError: for an unknown variant or size, or a value outside its range.
        """
        known = {field.name for field in fields(cls)} - {"variant", "seed"}
        for name in sizes:
            if name not in known:
                raise ConfigError(f"build_lab has no size {name!r}.{suggest(name, known)}")
        return cls(variant=variant, seed=seed, **sizes)

    @property
    def rules(self) -> Variant:
        """The variant's rules."""
        return VARIANTS[self.variant]

    def width(self, role: Role) -> int:
        """Hidden size of a model."""
        return self.teacher_width if role == "teacher" else self.student_width

    def steps(self, role: Role) -> int:
        """Pretraining steps of a model."""
        return self.teacher_steps if role == "teacher" else self.student_steps

    def to_dict(self) -> dict[str, Any]:
        """Return everything that is hashed, ready for JSON."""
        rules = asdict(self.rules)
        for name in LATER_RULES:
            # A lab that was built before the rule existed keeps its name.
            if rules[name] is None:
                del rules[name]
        return {**asdict(self), "rules": rules, "code_version": CODE_VERSION}

    def folder_name(self) -> str:
        """Return `<variant>-<first 12 hex digits of the hash>`."""
        canonical = json.dumps(self.to_dict(), sort_keys=True).encode()
        return f"{self.variant}-{hashlib.sha256(canonical).hexdigest()[:12]}"
