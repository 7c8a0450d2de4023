"""Settings, and the choice over a whole verl batch: from the workers' columns to a weight for every token.

Knows verl's batches (a `TensorDict` of jagged tensors); the choice itself is `selectors.select`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor
from verl.workers.utils.padding import response_from_nested, response_to_nested

from taopd.errors import ConfigError, DataError, check_budget, require, require_known, suggest
from taopd.integrations.verl.token_signals import COLUMNS, PREFIX, SIGNAL_COLUMNS
from taopd.losses import reduction_weights
from taopd.runs.shares import per_cent
from taopd.selectors import NORMALIZATIONS, Selection, resolve_selector, select
from taopd.selectors.settings import Rules, check_ranges
from taopd.signals import COMPATIBILITIES, SignalTable, TokenSignals, signal_table
from taopd.trainer.metrics import selection_metrics

WEIGHTS = PREFIX + "weights"
"""Column that the losses read: [B, T] float32, 0 where a token does not train."""
FIELDS = (*(PREFIX + name for name in COLUMNS), "response_mask", "loss_mask")
"""What `choose_weights` reads of a batch."""
GIVEN = frozenset({"mass", "overlap", "student_logprobs", "teacher_logprobs"})
"""Further signals that a selector may read here; `teacher_logprobs` if the lists hold every sampled token."""
REDUCTIONS = {"token-mean": "token_mean", "seq-mean-token-mean": "sample_mean"}
"""verl's `loss_agg_mode` and our reduction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerlSettings:
    """What `trainer.v1.taopd_sync` may hold; the defaults are the paper's but for `signals`."""

    selector: str = "teachability"
    budget: float = 0.1
    """Share of the batch's response tokens that trains, (0, 1]."""
    score_top_k: int = 16
    """K of both lists; at most verl's `distillation.distillation_loss.topk`."""
    signals: str = "topk_lists"
    """"topk_lists": C is a lower bound. "exact": needs a teacher list that holds the student's K ids."""
    compatibility: str = "mass"
    normalization: str = "quantile"
    min_keep: int = 0
    """At least this many tokens of every response."""
    seed: int = 0
    """Of the random selector."""

    @staticmethod
    def read(values: Mapping[str, Any], *, topk: int | None) -> "VerlSettings":
        """Settings from the mode's block of verl's config, checked against its teacher's list.

        Raises:
            ConfigError: an unknown key or name, a value out of range, or a signal that is not there.
        """
        known = [field.name for field in fields(VerlSettings)]
        for key in values:
            if key not in known:
                raise ConfigError(f"trainer.v1.taopd_sync.{key} is unknown.{suggest(key, known)}")
        settings = VerlSettings(**values)
        # All that `select` would refuse at the first step or, with the reference's rules, take for something
        # else: there a budget above 1 is all tokens.
        check_budget(settings.budget)
        check_ranges(Rules(min_keep=settings.min_keep))
        require_known("normalization", settings.normalization, NORMALIZATIONS)
        for name in ("score_top_k", "seed"):
            value = getattr(settings, name)
            require(
                isinstance(value, int) and not isinstance(value, bool),
                name,
                value,
                "a whole number",
            )
        if settings.signals not in ("topk_lists", "exact"):
            raise ConfigError(f"signals={settings.signals!r}: must be 'topk_lists' or 'exact'")
        # verl has no initial student whose reach could be asked.
        names = set(COMPATIBILITIES) - {"bound", "reach"}
        if settings.compatibility not in names:
            raise ConfigError(
                f"compatibility={settings.compatibility!r} is unknown."
                + suggest(settings.compatibility, names)
            )
        if not 1 <= settings.score_top_k <= (topk or 0):
            raise ConfigError(
                f"score_top_k={settings.score_top_k}: verl's teacher sends {topk} ids a token; set "
                "distillation.distillation_loss.topk to at least score_top_k (which is 1 or more)"
            )
        missing = sorted(set(resolve_selector(settings.selector).needs) - GIVEN)
        if missing:
            raise ConfigError(
                f"selector {settings.selector!r} reads the signal {missing[0]!r}, which verl's batches do "
                f"not give; they give D, C, H and {', '.join(sorted(GIVEN))}"
            )
        return settings


def choose_weights(
    data: TensorDict,
    settings: VerlSettings,
    *,
    step: int,
    agg_mode: str = "token-mean",
    on_teacher_list: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """Weights of a whole batch, jagged like `response_mask`, and the metrics of the selection.

    A weight is our reduction's times the count that verl will divide by: with budget 1 it is 1 everywhere.
    verl divides in every mini-batch by that mini-batch's own tokens, so that with several mini-batches a
    step each holds its share of the kept tokens, be it none.

    Args:
        data: `FIELDS`; signals jagged over prompt and response, masks over the response.
        agg_mode: verl's `loss_agg_mode`.
        on_teacher_list: only tokens that the teacher's list holds may train.

    Raises:
        DataError: columns that no worker wrote, or signals that the teacher's list cannot give.
    """
    missing = [name for name in FIELDS if name not in data]
    if missing:
        raise DataError(
            f"the batch has no {', '.join(missing)}: the scores come with verl's old log-probs, so set "
            "algorithm.rollout_correction.bypass_mode=false and model.use_fused_kernels=false"
        )
    response_mask = data["response_mask"]
    mask = response_mask.to_padded_tensor(0).bool()
    row, position = mask.nonzero(as_tuple=True)
    columns = {
        name: response_from_nested(data[PREFIX + name], response_mask).to_padded_tensor(0.0)[mask]
        for name in COLUMNS
    }
    table = _table(columns, settings, row, position, on_teacher_list)
    selection = select(
        table,
        selector=settings.selector,
        budget=settings.budget,
        min_keep=settings.min_keep,
        normalization=settings.normalization,
        seed=settings.seed,
        step=step,
        rules="reference" if settings.signals == "topk_lists" else "paper",
    )
    counted = data["loss_mask"].to_padded_tensor(0).sum(1)
    weights = torch.zeros(mask.shape, dtype=torch.float32)
    weights[mask] = _factors(selection, table, counted, agg_mode).float()
    metrics = selection_metrics(table, selection, settings.budget)
    metrics["select/off_teacher_list"] = 1.0 - _mean(columns["teacher_logprobs"].isfinite())
    metrics["select/teacher_list_covers"] = _mean(columns["covered"])
    return response_to_nested(weights, response_mask), metrics


def _table(
    columns: dict[str, Tensor],
    settings: VerlSettings,
    row: Tensor,
    position: Tensor,
    on_teacher_list: bool,
) -> SignalTable:
    exact = settings.signals == "exact"
    if exact and not bool(columns["covered"].bool().all()):
        raise DataError(
            f"signals='exact' needs the teacher's log-prob of all {settings.score_top_k} ids of the "
            f"student's list, and verl's teacher sent them at {per_cent(_mean(columns['covered']))}% of "
            "the tokens: raise distillation.distillation_loss.topk, lower score_top_k, or set "
            "signals='topk_lists'"
        )
    listed = columns["teacher_logprobs"].isfinite()
    nothing = torch.empty(len(row), 0)
    signals = TokenSignals(
        **{name: columns[name] for name in SIGNAL_COLUMNS},
        teacher_entropy=None,
        compatibility_is_exact=exact,
        student_logprobs=columns["student_logprobs"],
        teacher_logprobs=columns["teacher_logprobs"] if bool(listed.all()) else None,
        # The lists stay on the workers; `GIVEN` names no signal that reads them.
        student_topk_ids=nothing.long(),
        student_topk_logprobs=nothing,
        teacher_topk_ids=nothing.long(),
        teacher_topk_logprobs=nothing,
    )
    return signal_table(
        signals,
        completion=row,
        position=position,
        valid=listed if on_teacher_list else torch.ones_like(listed),
        compatibility=settings.compatibility,
        needs=resolve_selector(settings.selector).needs,
    )


def _factors(
    selection: Selection, table: SignalTable, counted: Tensor, agg_mode: str
) -> Float[Tensor, " N"]:
    """Our reduction's weights times what verl divides by: `counted` are its tokens of every response."""
    if agg_mode not in REDUCTIONS:
        raise ConfigError(
            f"loss_agg_mode={agg_mode!r} divides by no count of ours; set "
            f"actor_rollout_ref.actor.loss_agg_mode to {' or '.join(REDUCTIONS)}"
        )
    final = reduction_weights(
        selection.weights, table.completion, table.valid, reduction=REDUCTIONS[agg_mode]
    )
    if agg_mode == "token-mean":
        return final * counted.sum()
    return final * counted[table.completion] * len(counted)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 0.0
