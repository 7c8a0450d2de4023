"""From signals and the settings to what every position weighs in the loss; any engine can call this.

`local_table` on every rank, gather the tables, then `choose` once on the whole: a pure function of the
table, the settings and the step, so that all ranks get the same answer. A table too large to gather stays
in parts (`table.ranks`): then every rank calls `choose` on its own, and gets its part of that answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.losses import anchor_weights, reduction_weights
from taopd.models.stop_tokens import merged_ids
from taopd.selectors import (
    Rules,
    Selection,
    check_spread,
    resolve_selector,
    resolve_weighting,
    scheduled_budget,
    select,
)
from taopd.selectors.budget import teacher_of_rows
from taopd.selectors.formulas import worth_reaching
from taopd.signals import (
    FOREIGN,
    INITIAL,
    INITIAL_GIVES,
    OF_THE_START,
    TEACHER,
    SignalTable,
    TokenSignals,
    signal_table,
)
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.reach_sums import judge, ordering, used_share
from taopd.trainer.settings.methods import judges, orders

_READS_C = re.compile(
    r"teachab(?!ility_(raw_c|frozen))|compatib|fade|split|bottom|q3\b|q3_(high|low)_c|bellman(?!\()"
)
"""In the names of the selectors that read C~; all names are compared with what they read in the tests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the loss does with the N positions of a generation batch, or of the part of it on this rank."""

    selection: Selection
    loss_weights: Float[Tensor, " N"]
    """Towards the teacher: selection weight over the global denominator, and under `method: reach` the part
    of the hold that is within reach; 0 elsewhere."""
    anchor_weights: Float[Tensor, " N"]
    """Weight of the anchor, coefficient included; 0 where none was drawn."""
    reference_mask: Bool[Tensor, " N"]
    """Unselected tokens at which the reference model is run: those of the anchor, or of the guard. Where
    everything is selected the guard looks at selected ones."""
    reach: Float[Tensor, " N"] | None = None
    """r by which the loss at the selected tokens is divided (`losses.by_reach`)."""
    budget: float = 1.0
    """Nominal share at this step."""
    shadows: dict[str, Bool[Tensor, " N"]] = field(default_factory=dict)
    """What each shadow selector would have kept of the same table at the same budget."""

    @property
    def trains(self) -> Bool[Tensor, " N"]:
        """Tokens that enter the loss."""
        return (self.loss_weights != 0) | (self.anchor_weights != 0)

    @property
    def held(self) -> Bool[Tensor, " N"]:
        """Tokens that `method: reach` holds to the teacher, as far as that is within reach."""
        return self.reference_mask & ~self.selection.kept & (self.loss_weights != 0)

    def divided(self, here: slice = slice(None)) -> tuple[Tensor | None, Tensor | None]:
        """`reach` and `held` of `losses.Targets` at the n positions in `here`."""
        if self.reach is None:
            return None, None
        held = self.held[here]
        return self.reach[here].float().masked_fill(held, 1.0), held


class SignalNeeds(NamedTuple):
    """What selector, weighting and shadow selectors read beyond D, C and H."""

    signals: tuple[str, ...]
    """Names of what they declare, sorted."""
    all_declared: bool
    """They read nothing else; a selector of the user's may read whatever a table holds."""


def signal_needs(args: TeachabilityConfig, *, shadows: bool = True) -> SignalNeeds:
    """Resolve the names in the settings, of shadow selectors only if asked; the same for every step."""
    names = (args.selector, *((args.shadow_selectors or []) if shadows else []))
    rules = [*map(resolve_selector, names), resolve_weighting(args.weighting)]
    known = [rule for rule in rules if rule is not None]
    signals = {need for rule in known for need in rule.needs}
    if judges(args) or args.compatibility == "reach":
        signals.add("reach")
    return SignalNeeds(tuple(sorted(signals)), all(rule.local for rule in known))


def scales_compatibility(args: TeachabilityConfig) -> bool:
    """Whether a built-in selector or weighting reads C, scaled to the batch."""
    named = f"{'' if orders(args) else args.selector} {args.weighting}"
    return args.normalization != "none" and _READS_C.search(named) is not None


def reads_initial(args: TeachabilityConfig, *, shadows: bool = True) -> bool:
    """Whether the initial student has to be run at every token: for reach, or for its own D and C."""
    needs = signal_needs(args, shadows=shadows).signals
    return not (INITIAL_GIVES | OF_THE_START).isdisjoint(needs)


def gather_options(args: TeachabilityConfig) -> dict[str, Any]:
    """Keyword arguments of `gather.gather_table`: the limit, and the further signals that selection reads."""
    needs = signal_needs(args)
    # A function that did not promise `local` may read any column of the table.
    of_sampled = INITIAL, "student_logprobs", "teacher_logprobs"
    also = (FOREIGN, *of_sampled) if "reach" in needs.signals else ()
    columns = (*needs.signals, *also, TEACHER) if needs.all_declared else None
    return {"limit": args.gather_limit, "columns": columns}


def check_size(args: TeachabilityConfig, num_rows: int, num_ranks: int) -> None:
    """Refuse settings that would fail at the first generation batch too large to gather.

    Args:
        num_rows: completions of a generation batch, all ranks.
    """
    # At full length: a run that may fail must do so before it starts, not at the first long batch.
    if num_ranks == 1 or num_rows * args.max_completion_length <= args.gather_limit:
        return
    rules = Rules(draw=args.draw, weighting=args.weighting)
    check_spread(rules, resolve_selector(args.selector))
    for name in args.shadow_selectors or []:
        check_spread(Rules(), resolve_selector(name))


def signal_options(args: TeachabilityConfig, stop_ids: Sequence[int] = ()) -> dict[str, Any]:
    """What the settings ask of scoring, as keyword arguments of `signals.exact_signals`."""
    return {
        "k": args.score_top_k,
        "full_kl": not {"forward_kl", "reverse_kl"}.isdisjoint(signal_needs(args).signals),
        "stop_ids": merged_ids(args.stop_tokens, stop_ids),
    }


def local_table(
    signals: TokenSignals,
    args: TeachabilityConfig,
    completion: Int[Tensor, " N"],
    position: Int[Tensor, " N"],
    stop_ids: Sequence[int] = (),
    *,
    needs: SignalNeeds | None = None,
    teacher: Int[Tensor, " N"] | None = None,
) -> SignalTable:
    """One rank's rows of the table that `choose` reads; excluded stop tokens may not train.

    Args:
        teacher: which of several each row has.
    """
    # Excluded here and not in the loss, so that stop tokens set no scale and use no budget either.
    valid = torch.ones_like(completion, dtype=torch.bool)
    if args.stop_tokens == "exclude" and signals.token_ids is not None:
        valid = ~torch.isin(signals.token_ids, signals.token_ids.new_tensor(list(stop_ids)))
    table = signal_table(
        signals,
        completion=completion,
        position=position,
        valid=valid,
        compatibility=args.compatibility,
        needs=(needs or signal_needs(args)).signals,
    )
    if teacher is None:
        return table
    return replace(table, extra=table.extra | {TEACHER: teacher.double()})


def choose(
    table: SignalTable,
    args: TeachabilityConfig,
    *,
    step: int,
    training: bool,
    num_steps: int = 0,
    distribution: bool = True,
    teacher_weights: Sequence[float] = (),
) -> Choice:
    """Select by the settings, fold in the reduction, draw the anchors; the same on every rank.

    Args:
        num_steps: of the whole run, over which `method: reach` lets go of the start. 0: not known.
        distribution: the teacher's full distribution is at hand.
        teacher_weights: factors on the loss of each teacher's rows. The denominator is as without them: a
            factor changes the gradient of its own rows and of no other's.

    Evaluation (training=False) keeps everything: the selected tokens move with the student, so that a loss
    on them is not comparable over time.
    """
    budget = budget_at(step, args) if training else 1.0
    rules: dict[str, Any] = {
        "budget": budget,
        "min_keep": args.min_keep,
        "normalization": args.normalization,
        "gamma": args.split_gamma,
        "seed": args.seed,
        "step": step,
        "rules": "reference" if args.signals == "topk_lists" else "paper",
    }
    judged = None
    if training and judges(args):
        judged = judge(table, step=step, num_steps=num_steps, distribution=distribution)
    if training:
        selection = select(
            table,
            allowed=None if judged is None else worth_reaching(table.disagreement, judged.reach),
            selector=ordering(args, None if judged is None else judged.held_back),
            scope=args.budget_scope,
            draw=args.draw,
            draw_floor=args.draw_floor,
            draw_clip=args.draw_clip,
            weighting=args.weighting,
            **rules,
        )
    else:
        selection = select(table, selector="full", **rules)
    weights = reduction_weights(
        selection.weights,
        table.completion,
        table.valid,
        reduction=args.reduction,
        denominator=args.denominator,
        used=1.0 if judged is None else used_share(selection, args.loss, distribution),
        ranks=table.ranks,
    )
    drawn = watched = torch.zeros_like(weights)
    if training:
        drawn, watched = _anchor_draws(table, selection, args, step)
    held = drawn
    if judged is not None:
        weights, held = weights + drawn * (1.0 - judged.at_start), drawn * judged.at_start
    # After the reduction: the denominator is as without them. After the hold: it is taught by a teacher too.
    if teacher_weights:
        teacher = teacher_of_rows(table, "teacher_weights")
        weights = weights * weights.new_tensor(list(teacher_weights))[teacher]
    # Always the plain top of the batch: a shadow shows a selector, not a scope or a draw.
    shadows = args.shadow_selectors if training else None
    return Choice(
        selection=selection,
        loss_weights=weights,
        anchor_weights=held * (args.anchor_coef or 0.0),
        reference_mask=watched != 0,
        reach=None if judged is None else judged.divides,
        budget=budget,
        shadows={name: select(table, selector=name, **rules).kept for name in shadows or []},
    )


def _anchor_draws(
    table: SignalTable, selection: Selection, args: TeachabilityConfig, step: int
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Weights of the positions that are held, and of those at which the reference model is run: these, or
    where nothing is held those that the guard looks at."""
    guarded = guard_is_due(step, args)
    holds = bool(args.anchor_coef) or args.method == "reach"
    nothing = torch.zeros_like(selection.weights)
    if not holds and not guarded:
        return nothing, nothing
    # Where everything is selected, the anchor has nothing to hold, and the guard looks at everything.
    some_left = table.ranks.any(table.valid & ~selection.kept)
    if not some_left and not guarded:
        return nothing, nothing
    drawn = anchor_weights(
        selection.kept if some_left else ~table.valid,
        table.valid,
        table.completion,
        fraction=args.anchor_fraction,
        responses=args.anchor_responses,
        seed=args.seed,
        step=step,
        ranks=table.ranks,
    )
    return (drawn if some_left else nothing), drawn


def guard_is_due(step: int, args: TeachabilityConfig) -> bool:
    """Whether the guard looks at a step's generation batch, which trains a step that it asks for."""
    return args.collapse_guard != "off" and -step % args.guard_every < args.num_iterations


def budget_at(step: int, args: TeachabilityConfig) -> float:
    """The nominal budget of a step, by `budget_schedule`."""
    if args.budget_schedule == "constant":
        return args.budget
    return scheduled_budget(
        step,
        start=args.budget,
        end=args.budget_end,
        schedule=args.budget_schedule,
        num_steps=args.budget_steps or args.max_steps,
    )
