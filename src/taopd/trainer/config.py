"""`TeachabilityConfig`: TRL's `DistillationConfig` plus what selective distillation needs.

The one dial is `budget`. Everything else has a default that follows the paper (arXiv 2605.26844) or says
where it departs from it. Values are checked when the config is made, so that a typo costs a second and not
a queue slot.
"""

from dataclasses import dataclass, field
from typing import Any

from trl import DistillationConfig

from taopd.errors import ConfigError, suggest
from taopd.losses import LOSSES
from taopd.runs.redaction import redact_document
from taopd.signals import COMPATIBILITIES
from taopd.trainer.anchor_settings import AnchorSettings
from taopd.trainer.reliability_settings import ReliabilitySettings
from taopd.trainer.selection_settings import SelectionSettings
from taopd.trainer.teacher_settings import TeacherSettings

_CHOICES: dict[str, tuple[str, ...]] = {
    "signals": ("exact", "topk_lists"),
    "compatibility": COMPATIBILITIES,
    "normalization": ("quantile", "minmax", "none"),
    "loss": tuple(LOSSES),
    "reduction": ("token_mean", "sample_mean"),
    "denominator": ("selected", "completion"),
}
_BETA_OF_LOSS = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}


@dataclass
class TeachabilityConfig(
    AnchorSettings, TeacherSettings, ReliabilitySettings, SelectionSettings, DistillationConfig
):
    """Settings of `TeachabilityTrainer`: all of `trl.DistillationConfig`, and the fields below.

    Schedules, scopes, weights, draws, stop tokens and shadow selectors are in `SelectionSettings`; what
    holds the unselected tokens is in `AnchorSettings`, a teacher behind a server in `TeacherSettings`, steps
    with bad numbers or without a token in `ReliabilitySettings`.

    Raises:
        ConfigError: at construction, for a value outside its range or an unknown name (with the nearest one).

    Example:
        >>> config = TeachabilityConfig(output_dir="runs/x", budget=0.05, bf16=False, use_cpu=True)
        >>> config.selector
        'teachability'
    """

    logging_steps: float = field(
        default=1,
        metadata={"help": "Log every N optimizer steps; what was kept changes with every step."},
    )
    selector: str = field(
        default="teachability",
        metadata={
            "help": "Name of a selector, an expression of names such as 'teachability*entropy' or "
            "'rank_or(tip, ier)', or the dotted path of a function of your own."
        },
    )
    budget: float = field(
        default=0.05,
        metadata={
            "help": "Share of all completion tokens of the generation batch that train, (0, 1]."
        },
    )
    score_top_k: int = field(
        default=16,
        metadata={"help": "K of the supports on which D and C are computed (paper: 16)."},
    )
    signals: str = field(
        default="exact",
        metadata={
            "help": "'exact': the paper's definitions from full distributions. 'topk_lists': the released "
            "code's arithmetic and selection rules, from two top-K lists."
        },
    )
    compatibility: str = field(
        default="mass",
        metadata={"help": "What C is: mass (the paper), set, bc, jaccard or prefix_ema."},
    )
    normalization: str = field(
        default="quantile",
        metadata={
            "help": "Scale of the signals over the batch: quantile (5-95 %), minmax or none."
        },
    )
    min_keep: int = field(
        default=0,
        metadata={"help": "Keep at least this many tokens of every completion (released code: 1)."},
    )
    split_gamma: float = field(
        default=0.5,
        metadata={"help": "Share of the budget that selector='split' spends by entropy, [0, 1]."},
    )
    loss: str = field(
        default="reverse_kl",
        metadata={
            "help": "Loss at the kept tokens: reverse_kl, sampled_reverse_kl (detached advantage times "
            "log-prob, the paper's training signal), forward_kl, jsd, topk_reverse_kl (student's top-K and "
            "a tail bucket)."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "TRL's interpolation coefficient. Follows from `loss` (reverse_kl 1, forward_kl 0, jsd "
            "0.5); set it only to move `jsd` between the two."
        },
    )
    reduction: str = field(
        default="token_mean",
        metadata={
            "help": "token_mean (paper), or sample_mean: per completion, then over completions."
        },
    )
    denominator: str = field(
        default="selected",
        metadata={
            "help": "What a mean is over: 'selected' tokens (paper; multiplies the gradient by 1/budget), or "
            "all 'completion' tokens."
        },
    )
    gradient_window: int | None = field(
        default=None,
        metadata={
            "help": "None: the exact gradient. W: gradient flows only through the positions that train and "
            "the W before each; same loss, a cheaper and less exact step (see gradient_check_every)."
        },
    )
    gradient_check_every: int = field(
        default=0,
        metadata={
            "help": "Every so many steps, log cosine and norm of the windowed gradient against the exact "
            "one; costs a full forward and backward, and two copies of the gradients. 0: never."
        },
    )
    prefix_memory_mib: int = field(
        default=8192,
        metadata={
            "help": "gradient_window: keys and values of the scoring pass that may be kept for training, in "
            "MiB per device; beyond it they are computed again. 0: never kept."
        },
    )
    num_generations: int = field(
        default=1,
        metadata={"help": "Completions sampled per prompt. Divides the generation batch."},
    )
    num_iterations: int = field(
        default=1, metadata={"help": "Optimizer steps per generation batch."}
    )
    ppo_clip_low: float = field(
        default=0.2,
        metadata={
            "help": "sampled_reverse_kl: the ratio to the sampling policy is clipped at 1 - this. Without "
            "effect when num_iterations=1, where the ratio is 1."
        },
    )
    ppo_clip_high: float = field(default=0.28, metadata={"help": "... and at 1 + this."})
    cut_renamed_control_tokens: bool = field(
        default=False,
        metadata={
            "help": "Accept tokenizers that differ only in the names of control tokens (R1-Distill and "
            "Qwen2.5): the ids from the first of them on are not shared and never train."
        },
    )
    log_selection: bool = field(
        default=False,
        metadata={
            "help": "Write every token's signals and fate to <output_dir>/selection/*.parquet."
        },
    )
    log_update_norm: bool = field(
        default=True,
        metadata={
            "help": "Log the norm of every parameter update. Holds one copy of the trainable weights for "
            "the duration of the optimizer step."
        },
    )
    log_rollouts: int = field(
        default=4,
        metadata={
            "help": "Completions written to <output_dir>/rollouts.jsonl at every logging step."
        },
    )

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is unknown.{suggest(str(value), choices)}")
        self.check_selection(
            signals=self.signals,
            selector=self.selector,
            max_steps=self.max_steps,
            min_keep=max(0, self.min_keep),
        )
        _require(
            0.0 < self.budget <= 1.0,
            "budget",
            self.budget,
            "in (0, 1]; 0.05 keeps 5 % of the tokens",
        )
        _require(self.score_top_k >= 1, "score_top_k", self.score_top_k, "at least 1")
        _require(self.min_keep >= 0, "min_keep", self.min_keep, "0 or more tokens")
        _require(0.0 <= self.split_gamma <= 1.0, "split_gamma", self.split_gamma, "in [0, 1]")
        self.check_anchor()
        self.check_reliability()
        self.check_teacher(asked=self.teacher_url is not None)
        if self.collapse_guard == "restore" and str(self.save_strategy) in (
            "no",
            "SaveStrategy.NO",
        ):
            raise ConfigError(
                "collapse_guard='restore' needs checkpoints: set save_strategy='steps'"
            )
        self._check_gradient_window()
        _require(self.num_generations >= 1, "num_generations", self.num_generations, "at least 1")
        _require(self.num_iterations >= 1, "num_iterations", self.num_iterations, "at least 1")
        _require(0.0 <= self.ppo_clip_low < 1.0, "ppo_clip_low", self.ppo_clip_low, "in [0, 1)")
        _require(self.ppo_clip_high >= 0.0, "ppo_clip_high", self.ppo_clip_high, "0 or more")
        _require(self.temperature > 0.0, "temperature", self.temperature, "above 0")
        _require(self.log_rollouts >= 0, "log_rollouts", self.log_rollouts, "0 or more")
        self.beta = self._beta()
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """Every setting as JSON has it, secrets masked: what trackers and run folders are given."""
        return redact_document(super().to_dict())

    def check_generation_batch(self, size: int, *, streaming: bool) -> None:
        """Refuse a generation batch of `size` completions that cannot be divided into groups.

        Raises:
            ConfigError: if num_generations does not divide it, or a stream would have to be repeated.
        """
        if size % self.num_generations:
            raise ConfigError(
                f"num_generations={self.num_generations} does not divide the generation batch of {size} "
                "(per_device_train_batch_size x gradient_accumulation_steps x processes)"
            )
        if streaming and self.num_generations * self.num_iterations > 1:
            raise ConfigError(
                "num_generations and num_iterations above 1 need a dataset with a length, not a stream"
            )

    def _check_gradient_window(self) -> None:
        window, every = self.gradient_window, self.gradient_check_every
        _require(
            window is None or window >= 0, "gradient_window", window, "none, or 0 or more positions"
        )
        _require(every >= 0, "gradient_check_every", every, "0 or more steps")
        _require(
            self.prefix_memory_mib >= 0, "prefix_memory_mib", self.prefix_memory_mib, "0 or more"
        )
        if every and window is None:
            raise ConfigError(
                "gradient_check_every compares a windowed gradient with the exact one: set gradient_window"
            )
        if every and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigError(
                "gradient_check_every does not work with reentrant checkpointing: set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )

    def _beta(self) -> float:
        derived = _BETA_OF_LOSS.get(self.loss, 1.0)
        if self.beta is None:
            return derived
        if self.loss == "jsd":
            _require(
                0.0 < self.beta < 1.0, "beta", self.beta, "strictly between 0 and 1 for loss='jsd'"
            )
            return self.beta
        if self.beta != derived:
            raise ConfigError(
                f"beta={self.beta} does not fit loss={self.loss!r}: leave beta unset, or choose "
                "loss='reverse_kl' (1), 'forward_kl' (0) or 'jsd' (between)"
            )
        return derived


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r}: must be {expected}")
