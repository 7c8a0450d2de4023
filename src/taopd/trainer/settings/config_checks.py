"""The checks of `TeachabilityConfig`: known names, ranges, and settings that fit each other."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from taopd.errors import ConfigError, require, require_known, suggest
from taopd.losses import LOSSES, needs_teacher_distribution
from taopd.models.quantization import QUANTIZATIONS
from taopd.models.teacher_prompts import TeacherPrompts
from taopd.selectors import (
    NORMALIZATIONS,
    SCHEDULES,
    SCOPES,
    SELECTORS,
    Rules,
    check_budget,
    check_settings,
    check_share,
    resolve_selector,
    resolve_weighting,
)
from taopd.signals import COMPATIBILITIES, INITIAL_GIVES, KNOWN_SIGNALS, LISTS_GIVE
from taopd.teachers.addresses import check_addresses
from taopd.teachers.connect import KINDS
from taopd.trainer.settings.filled import FilledNumber, is_filled
from taopd.trainer.settings.methods import METHODS, check_method
from taopd.trainer.settings.number_checks import Range, check_ranges, ranges
from taopd.trainer.settings.teacher_names import OWN_TEACHERS

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "signals": ("exact", "topk_lists"),
    "compatibility": COMPATIBILITIES,
    "normalization": NORMALIZATIONS,
    "stop_tokens": ("train", "exclude", "merge"),
    "budget_schedule": SCHEDULES,
    "budget_scope": SCOPES,
    "loss": LOSSES,
    "reduction": ("token_mean", "sample_mean"),
    "denominator": ("selected", "completion"),
    "method": tuple(METHODS),
    "anchor_loss": ("reverse_kl", "forward_kl"),
    "collapse_guard": ("off", "warn", "stop", "restore"),
    "teacher_server": ("auto", *KINDS),
}
_RANGES: dict[str, Range] = {
    **ranges(
        "at least 1",
        lambda value: value >= 1,
        *("score_top_k", "budget_steps", "guard_every", "num_generations", "num_iterations"),
        *("teacher_concurrency", "max_skipped_steps"),
    ),
    **ranges(
        "at least 0",
        lambda value: value >= 0,
        *("gather_limit", "ppo_clip_high", "anchor_coef", "gradient_check_every"),
        *("prefix_memory_mib", "teacher_patience_s", "log_rollouts"),
    ),
    **ranges("above 0", lambda value: value > 0, "match_update_norm", "max_update_norm"),
    **ranges("in [0, 1)", lambda value: 0 <= value < 1, "ppo_clip_low", "teacher_ema_decay"),
    "teacher_timeout_s": ("at least 0.001", lambda value: value >= 1e-3),
}
OFFLOADS = ("cpu",)
ON_BAD_NUMBERS = ("stop", "skip")
BETA_OF_LOSS = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}

_NO_HELP = "measured as no help (docs/results/collapse.md); leave it out, "
REMOVED = {
    "teachability_floor": f"{_NO_HELP}the default method holds the other tokens",
    "replay_fraction": f"{_NO_HELP}the default method holds the other tokens",
    "budget_memory": f"{_NO_HELP}budget_schedule and budget_end change the budget over time",
    "position_cost": "no measurement supports it; leave it out, gradient_window makes a step cheaper",
    "weights_mean_one": "no measurement supports it; leave it out, denominator: selected divides by the "
    "sum of the weights",
}
"""Options that taopd no longer has: why, and what to use instead."""


def refuse_removed(names: Iterable[str]) -> None:
    """Refuse an option that taopd no longer has, from a file, a flag or Python."""
    for name in names:
        if name in REMOVED:
            raise ConfigError(f"{name} was removed from taopd: {REMOVED[name]}")


def check_config(config: "TeachabilityConfig") -> None:
    """Refuse unknown names, values out of range, and settings that do not fit each other."""
    if config.trust_remote_code:
        raise ConfigError(
            "trust_remote_code: code from a model repository is never run; leave it out"
        )
    for name, choices in CHOICES.items():
        require_known(name, getattr(config, name), choices)
    check_ranges(config, _RANGES)
    bad = config.on_bad_numbers
    require(bad in ON_BAD_NUMBERS, "on_bad_numbers", bad, f"one of {', '.join(ON_BAD_NUMBERS)}")
    check_budget(config.budget)
    check_share(config.split_gamma, "split_gamma")
    check_share(config.reach_threshold, "reach_threshold")
    _check_selection(config)
    _check_schedule(config)
    check_method(config)
    _check_anchor(config)
    _check_gradient_window(config)
    if config.max_update_norm is not None and config.match_update_norm is not None:
        raise ConfigError("max_update_norm and match_update_norm exclude each other")
    if config.teacher_url is not None:
        check_remote_teacher(config)
    _check_own_teacher(config)
    _check_fit(config)


def _check_own_teacher(config: "TeachabilityConfig") -> None:
    TeacherPrompts(config.teacher_prompt_template)  # refuses a template that cannot be read
    name = config.teacher_model_name_or_path
    if name is not None and name.startswith(("http://", "https://")):
        raise ConfigError(
            f"the teacher {name!r} is an address: name a folder or hub id; a server's goes into teacher_url"
        )
    if name not in OWN_TEACHERS:
        return
    for other in ("teacher_url", "teacher_model_init_kwargs", "teacher_model_revision"):
        if getattr(config, other):
            raise ConfigError(
                f"{other} beside teacher_model_name_or_path={name!r}: the teacher is the student"
            )


def _check_fit(config: "TeachabilityConfig") -> None:
    """Refuse what does not go together."""
    quantization, offload = config.teacher_quantization, config.teacher_offload
    if quantization is not None:
        require_known("teacher_quantization", quantization, QUANTIZATIONS)
    if offload is not None:
        require_known("teacher_offload", offload, OFFLOADS)
    if quantization and offload:
        raise ConfigError(
            "teacher_quantization and teacher_offload: one of them; packed weights are not moved layer by "
            "layer"
        )
    given = config.teacher_model_init_kwargs
    if quantization and isinstance(given, dict) and "quantization_config" in given:
        raise ConfigError(
            "teacher_quantization and a quantization_config in teacher_model_init_kwargs: keep one of them"
        )
    for name, value in (("quantization", quantization), ("offload", offload)):
        if value and config.teacher_model_name_or_path in OWN_TEACHERS:
            raise ConfigError(
                f"teacher_{name} is about another model: the student is its own teacher; leave it out"
            )
        if value and config.teacher_url is not None:
            raise ConfigError(
                f"teacher_{name} is about a teacher in this process: with teacher_url it is the server's to "
                "set; leave it out"
            )


def _check_selection(config: "TeachabilityConfig") -> None:
    # Made only to be checked: `select` would refuse the same settings, but at the first step.
    rules = Rules(
        min_keep=config.min_keep,
        scope=config.budget_scope,
        draw=config.draw,
        draw_floor=config.draw_floor,
        draw_clip=config.draw_clip,
        weighting=config.weighting,
    )
    check_settings(rules, resolve_selector(config.selector))
    names = [config.selector, *(config.shadow_selectors or [])]
    needs = {name: resolve_selector(name).needs for name in names}
    weight = resolve_weighting(config.weighting)
    # A weighting that is a score reads signals just as a selector does.
    needs |= {} if weight is None else {config.weighting: weight.needs}
    for name, signals in needs.items():
        for signal in signals:
            if signal not in KNOWN_SIGNALS:
                raise ConfigError(
                    f"{name!r} needs the signal {signal!r}, which is unknown.{suggest(signal, KNOWN_SIGNALS)}"
                )
    if config.signals != "topk_lists":
        return
    for name, signals in needs.items():
        missing = sorted(set(signals) - LISTS_GIVE - INITIAL_GIVES)
        if missing:
            enough = [known for known, rule in SELECTORS.items() if set(rule.needs) <= LISTS_GIVE]
            raise ConfigError(
                f"{name!r} reads the signal {missing[0]!r}, which signals='topk_lists' cannot give: set "
                f"signals='exact', or choose among {', '.join(sorted(enough))}"
            )


def _check_schedule(config: "TeachabilityConfig") -> None:
    end = config.budget_end
    if end is not None:
        check_budget(end, "budget_end")
    if config.budget_schedule == "constant" and end is not None:
        raise ConfigError(
            f"budget_end={end} is the end of a schedule: set budget_schedule='linear' or 'cosine' too"
        )
    if config.budget_schedule != "constant" and end is None:
        raise ConfigError(f"budget_schedule={config.budget_schedule!r} needs budget_end too")
    # max_steps is -1 where epochs decide, and the last step is then not known in advance.
    if end is not None and config.budget_steps is None and config.max_steps <= 0:
        raise ConfigError("a budget schedule needs max_steps or budget_steps")


def _check_anchor(config: "TeachabilityConfig") -> None:
    fraction, responses = config.anchor_fraction, config.anchor_responses
    require(0.0 < fraction <= 1.0, "anchor_fraction", fraction, "in (0, 1]")
    # The drawn tokens lie in the drawn completions, which must hold enough of them.
    inside = fraction <= responses <= 1.0
    shown = f"anchor_fraction={fraction}"
    least = f"{fraction} (anchor_fraction unless it is set)" if is_filled(fraction) else shown
    require(inside, "anchor_responses", responses, f"at most 1 and at least {least}")
    if config.collapse_guard == "restore" and config.save_strategy == "no":
        raise ConfigError("collapse_guard='restore' needs checkpoints: set save_strategy='steps'")
    if config.collapse_guard == "restore" and config.save_only_model:
        raise ConfigError(
            "collapse_guard='restore' needs whole checkpoints: set save_only_model=False"
        )


def _check_gradient_window(config: "TeachabilityConfig") -> None:
    window, every = config.gradient_window, config.gradient_check_every
    inside = window is None or window >= 0
    require(inside, "gradient_window", window, "none, or 0 or more positions")
    if every and window is None:
        raise ConfigError(
            "gradient_check_every compares a windowed gradient with the exact one: set gradient_window"
        )
    # Its noise is by the length of the row, and the sparse forward packs all rows into one.
    if window is not None and config.neftune_noise_alpha:
        raise ConfigError(
            "gradient_window and neftune_noise_alpha: a windowed forward cannot have the noise of a whole "
            "one; leave one of them out"
        )
    # The comparison calls torch.autograd.grad, which reentrant checkpointing does not allow.
    given = config.gradient_checkpointing_kwargs
    if every and isinstance(given, dict) and given.get("use_reentrant"):
        raise ConfigError(
            "gradient_check_every does not work with reentrant checkpointing: set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


def loss_of_beta(beta: float | None) -> str:
    """The loss that TRL's interpolation coefficient alone stands for."""
    if beta is None:
        return "reverse_kl"
    require(0.0 <= beta <= 1.0, "beta", beta, "in [0, 1]")
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")


def beta_of(config: "TeachabilityConfig") -> float:
    """TRL's interpolation coefficient that belongs to the loss."""
    # TRL's field: a value that contradicts `loss` would be written to config.json and used by nothing.
    beta, derived = config.beta, BETA_OF_LOSS.get(str(config.loss), 1.0)
    if beta is None:
        return FilledNumber(derived)
    if config.loss == "jsd":
        require(0.0 < beta < 1.0, "beta", beta, "strictly between 0 and 1 for loss='jsd'")
    elif beta != derived:
        raise ConfigError(
            f"beta={beta} does not fit loss={config.loss!r}: leave one of them unset, or choose "
            "loss='reverse_kl' (1), 'forward_kl' (0) or 'jsd' (between)"
        )
    return beta


def check_remote_teacher(config: "TeachabilityConfig") -> None:
    """Refuse what only a teacher in this process can do."""
    if config.teacher_url is not None:
        check_addresses(config.teacher_url)
    # vLLM and SGLang answer with log-probs of single ids, at temperature 1.
    if needs_teacher_distribution(config.loss):
        served = [name for name in LOSSES if not needs_teacher_distribution(name)]
        # The user may have given another setting, or none.
        unset = config.beta is None or is_filled(config.beta)
        about = f"the default loss, {config.loss}," if unset else f"beta={config.beta}"
        named = about if is_filled(config.loss) else f"loss={config.loss!r}"
        raise ConfigError(
            f"{named} reads the teacher's full distribution, which no server sends: set "
            f"loss={' or '.join(map(repr, served))}, or load the teacher in this process"
        )
    if config.temperature != 1.0:
        raise ConfigError(
            f"temperature={config.temperature}: a server scores at temperature 1; set temperature=1, or "
            "load the teacher in this process"
        )
    if config.stop_tokens == "merge":
        raise ConfigError(
            "stop_tokens='merge' reads the teacher's mass on every stop id, which no server sends: set "
            "stop_tokens='exclude', or load the teacher in this process"
        )


def check_generation_batch(config: "TeachabilityConfig", size: int, *, streaming: bool) -> None:
    """Refuse a generation batch of `size` completions that cannot be divided into groups."""
    # A group that spans two generation batches would be sampled from two states of the student.
    if size % config.num_generations:
        raise ConfigError(
            f"num_generations={config.num_generations} does not divide the generation batch of {size} "
            "(per_device_train_batch_size x gradient_accumulation_steps x processes)"
        )
    if streaming and config.num_generations * config.num_iterations > 1:
        raise ConfigError(
            "num_generations and num_iterations above 1 need a dataset with a length, not a stream"
        )
