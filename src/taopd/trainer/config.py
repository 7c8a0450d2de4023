"""`TeachabilityConfig`: TRL's `DistillationConfig` plus what selective distillation needs.

The one dial is `budget`. Everything else has a default that follows the paper (arXiv 2605.26844) or says
where it departs from it. `config_checks` looks at the values when the config is made: a typo costs a second.
"""

import warnings
from dataclasses import dataclass, fields
from typing import Any, Self

from trl import DistillationConfig

from taopd.errors import ConfigError
from taopd.runs.redaction import redact_document
from taopd.signals import THRESHOLD
from taopd.trainer.settings import config_checks
from taopd.trainer.settings.filled import filled, is_filled, plain, take_back
from taopd.trainer.settings.generation_checks import check_generation_kwargs
from taopd.trainer.settings.methods import fill_in
from taopd.trainer.settings.number_checks import check_numbers, worded
from taopd.trainer.settings.setting_types import check_types
from taopd.trainer.settings.teacher_entries import check_teachers, read_teachers
from taopd.trainer.settings.teacher_settings import TeacherSettings, option


@dataclass
class TeachabilityConfig(TeacherSettings, DistillationConfig):
    """Settings of `TeachabilityTrainer`: all of `trl.DistillationConfig` and the fields below.

    Raises:
        ConfigError: at construction, for a value outside its range, an unknown name (with the nearest
            one), or an option that was removed (with what to use instead).

    Example:
        >>> config = TeachabilityConfig(output_dir="runs/x", budget=0.1, bf16=False, use_cpu=True)
        >>> config.selector
        'teachability'
    """

    # Which tokens train

    selector: str = option(
        "teachability",
        "Name of a selector, an expression of names such as 'teachability*entropy' or 'rank_or(tip, ier)', "
        "or the dotted path of a function of your own.",
    )
    budget: float = option(
        0.1, "Share of all completion tokens of the generation batch that train, (0, 1]."
    )
    score_top_k: int = option(16, "K of the supports on which D and C are computed (paper: 16).")
    signals: str = option(
        "exact",
        "'exact': the paper's definitions from full distributions. 'topk_lists': the released code's "
        "arithmetic and selection rules, from two top-K lists.",
    )
    compatibility: str = option(
        None, "C: mass (the paper's), bound, set, bc, jaccard, prefix_ema, reach. None: by method."
    )
    normalization: str = option(
        "quantile", "Scale of the signals over the batch: quantile (5-95 %), minmax or none."
    )
    min_keep: int = option(
        0, "Keep at least this many tokens of every completion (released code: 1)."
    )
    split_gamma: float = option(
        0.5, "Share of the budget that selector='split' spends by entropy, [0, 1]."
    )
    shadow_selectors: list[str] | None = option(
        None,
        "Selectors whose masks are compared with the active one at every step (Jaccard), at no model cost; "
        "names or expressions.",
    )
    stop_tokens: str = option(
        "train",
        "train: like any token. exclude: never selected. merge: all ids that end a completion are one token "
        "in signals and loss (not for tool use, where they differ).",
    )
    stop_token_ids: list[int] | None = option(
        None,
        "Token ids that stop_tokens is about. None: those of student and teacher. With method reach "
        "also: further ids that end the teacher's texts.",
    )

    # How many, and with what weight

    budget_schedule: str = option(
        "constant", "From `budget` to `budget_end`: constant, linear or cosine."
    )
    budget_end: float | None = option(None, "Budget at the last step of a schedule, (0, 1].")
    budget_steps: int | None = option(None, "Steps that a schedule runs over. None: max_steps.")
    budget_scope: str = option(
        "global",
        "global: one budget for the generation batch (the paper). response: the share holds in every "
        "completion by itself. teacher: in the completions of each of several teachers.",
    )
    weighting: str = option(
        "hard",
        "Weight of a kept token: hard (1, or the selector's own), score, rank, or the name or expression of "
        "a score.",
    )
    draw: str = option(
        "top",
        "top: the best tokens. proportional: drawn with probability in proportion to the score, weight 1 / "
        "probability, so that the expected loss is that of all tokens.",
    )
    draw_floor: float = option(0.1, "Share of the draws that ignores the score, [0, 1].")
    draw_clip: float = option(
        10.0, "Largest weight of a drawn token, as a multiple of the mean one; >= 1."
    )
    gather_limit: int = option(
        10_000_000,
        "Several processes: completion tokens of a generation batch up to which every process gets the "
        "signals of all of them (some 20 bytes a token, with method='reach' 36). Above it only counts are "
        "exchanged; same tokens.",
    )

    # The loss at the kept tokens

    # Left out it is None here, and a name once the config is made.
    loss: str = option(
        None,
        "Loss at the kept tokens: reverse_kl (default), sampled_reverse_kl (detached advantage times "
        "log-prob, the paper's training signal; sampled_ida, sampled_tv: other advantages), forward_kl, jsd, "
        "topk_reverse_kl (student's top-K and a tail bucket), sampled_tail_kl (its tail is sampled), "
        "routed_kl (forward KL where the student cannot reach the teacher), fixed_advantage (no teacher).",
    )
    beta: float | None = option(
        None,
        "TRL's interpolation coefficient. Alone it chooses the loss: 0 forward_kl, 1 reverse_kl, between "
        "them jsd. None: it follows from `loss` (jsd: 0.5).",
    )
    reduction: str = option(
        "token_mean", "token_mean (paper), or sample_mean: per completion, then over completions."
    )
    denominator: str = option(
        "selected",
        "What a mean is over: 'selected' tokens (paper; multiplies the gradient by 1/budget), or all "
        "'completion' tokens.",
    )
    ppo_clip_low: float = option(
        0.2,
        "sampled_reverse_kl: the ratio to the sampling policy is clipped at 1 - this. Without effect when "
        "num_iterations=1, where the ratio is 1.",
    )
    ppo_clip_high: float = option(0.28, "sampled_reverse_kl: the ratio is clipped at 1 + this.")

    # The method and its hold on unselected tokens (None: see `methods.METHODS`); the guard against collapse

    method: str = option(
        None,
        "reach: teaches first what the initial student could have said, holds the rest. anchored: a KL "
        "penalty holds unselected tokens near it. published: the paper's, holds nothing. None: reach; "
        "anchored with another selector than teachability or another reduction than token_mean.",
    )
    reach_threshold: float = option(
        THRESHOLD,
        "reach: a token to which the initial student gave this probability counts half, [0, 1].",
    )
    anchor_coef: float | None = option(
        None,
        "Weight of the anchor, KL(student || initial student) on unselected tokens. None: 1 with "
        "method='anchored', 3 with 'reach', 0 with 'published'.",
    )
    anchor_fraction: float = option(
        None, "Random share of the unselected tokens that is held, (0, 1]. None: 0.05; reach: 0.1."
    )
    anchor_responses: float = option(
        None,
        "Random share of the completions in which tokens are held, at least anchor_fraction. The initial "
        "student runs on these alone; reach remembers by token id what it would say in the others. None: "
        "0.25; reach: 1.",
    )
    anchor_loss: str = option(
        "reverse_kl",
        "reverse_kl: KL(student || reference). forward_kl: KL(reference || student).",
    )
    collapse_guard: str = option(
        "warn",
        "When the run shows signs of collapse: warn, stop, restore (stop, and load the last healthy "
        "checkpoint), or off. Compares with the initial student, of which it keeps a frozen copy unless the "
        "student is a LoRA adapter.",
    )
    guard_every: int = option(5, "Optimizer steps between two checks of the guard.")

    # The step: rollouts, gradient, update

    num_generations: int = option(
        1, "Completions sampled per prompt. Divides the generation batch."
    )
    num_iterations: int = option(1, "Optimizer steps per generation batch.")
    gradient_window: int | None = option(
        None,
        "None: the exact gradient. W: gradient flows only through the positions that train and the W before "
        "each; same loss, a cheaper and less exact step (see gradient_check_every).",
    )
    gradient_check_every: int = option(
        0,
        "Every so many steps, log cosine and norm of the windowed gradient against the exact one; costs a "
        "full forward and backward, and two copies of the gradients. 0: never.",
    )
    prefix_memory_mib: int = option(
        8192,
        "gradient_window: keys and values of the scoring pass that may be kept for training, in MiB per "
        "device; beyond it they are computed again. 0: never kept.",
    )
    match_update_norm: float | None = option(
        None,
        "Rescale every optimizer update to this L2 norm, so that arms differ only in direction. The "
        "learning rate then only decides how the direction mixes with weight decay.",
    )
    max_update_norm: float | None = option(
        None, "Trust region: larger optimizer updates are scaled down to this L2 norm."
    )

    # Steps that fail

    on_bad_numbers: str = option(
        "stop",
        "A NaN or infinity in logits, loss or gradient: 'stop' before the update, or 'skip' the update, "
        "count and warn. The batch is saved to <output_dir>/bad_numbers either way.",
    )
    max_skipped_steps: int = option(
        10,
        "Stop after so many steps in a row without an update: bad numbers that are skipped, or batches "
        "without a token to train on.",
    )

    # Logs

    log_selection: bool = option(
        False,
        "Write every token's signals and whether it trained to <output_dir>/selection/*.parquet.",
    )
    log_update_norm: bool = option(
        True,
        "Log the norm of every parameter update. Holds one copy of the trainable weights for the duration "
        "of the optimizer step.",
    )
    log_rollouts: int = option(
        4, "Completions of every generation batch that are written to <output_dir>/rollouts.jsonl."
    )

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        # Before `__init__`, whose answer to an option that was removed is a TypeError without advice.
        config_checks.refuse_removed(settings)
        made = super().__new__(cls)
        # No field: what the caller named, for the report.
        named = (name for name, value in settings.items() if not is_filled(value))
        vars(made)["given"] = frozenset(named)
        return made

    def __post_init__(self) -> None:
        self._resolve()
        # TRL's own default bears the old name of a setting: there is nothing that a caller could change.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`gradient_checkpointing", FutureWarning)
            try:
                super().__post_init__()
            except (ValueError, TypeError) as error:
                raise worded(error) from error
        # Once more: only now JSON text of a mapping, as flags have it, is one.
        config_checks.check_config(self)
        check_generation_kwargs(self)

    def _resolve(self) -> None:
        take_back(self)
        check_types(self, choices=config_checks.CHOICES)
        # Before the others: what the loss is decides which of them fit.
        if self.loss is None:
            self.loss = filled(config_checks.loss_of_beta(self.beta))
        fill_in(self)
        read_teachers(self)
        config_checks.check_config(self)
        check_numbers(self)
        # Teachers given to the trainer are not known yet: `TeacherRoutes` checks with their names.
        if isinstance(self.teachers, dict):
            check_teachers(self, self.teachers)
        self.beta = config_checks.beta_of(self)

    @classmethod
    def of(cls, args: DistillationConfig | None, model: Any) -> "TeachabilityConfig":
        """The settings of a trainer: our own as they are, TRL's with our defaults added, or none given.

        Args:
            model: the student, a path or a model; it names the run folder where no settings are given.

        Raises:
            ConfigError: settings of another kind, or a value out of range.
        """
        if isinstance(args, cls):
            args._resolve()  # A setting may have been changed since.
            return args
        if args is None:
            from trl.trainer.utils import get_config_model_id

            name = model if isinstance(model, str) else get_config_model_id(model.config)
            return cls(f"{name.rsplit('/', 1)[-1]}-Distillation")
        if not isinstance(args, DistillationConfig):
            raise ConfigError(
                f"args is a {type(args).__name__}: pass a TeachabilityConfig or a DistillationConfig"
            )
        # Not `__init__`: TRL's checks have run, and not every resolved value passes them twice.
        config = cls.__new__(cls)
        added = {each.name: each.default for each in fields(cls) if not hasattr(args, each.name)}
        config.__dict__.update(added | vars(args))
        config._resolve()
        check_generation_kwargs(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Every setting as JSON has it, secrets masked: what trackers and run folders are given."""
        return redact_document(plain(super().to_dict()))
