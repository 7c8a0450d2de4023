"""From a table of signals and the settings to what every position weighs in the loss."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from taopd.config import TeachabilityConfig
from taopd.losses import anchor_weights, reduction_weights
from taopd.selectors import Selection, select
from taopd.signals import SignalTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The fate of the N positions of a whole generation batch."""

    selection: Selection
    loss_weights: Float[Tensor, " N"]
    """Selection weight over the global denominator; 0 where nothing is trained."""
    anchor_weights: Float[Tensor, " N"]
    """Weight of the anchor, coefficient included; 0 where none was drawn."""


def choose(table: SignalTable, args: TeachabilityConfig, *, step: int, training: bool) -> Choice:
    """Select by the settings, fold in the reduction, draw the anchors; the same on every rank.

    Evaluation (training=False) keeps everything: the selected tokens move with the student, so that a loss
    on them is not comparable over time.
    """
    selection = select(
        table,
        selector=args.selector if training else "full",
        budget=args.budget if training else 1.0,
        min_keep=args.min_keep,
        normalization=args.normalization,
        gamma=args.split_gamma,
        seed=args.seed,
        step=step,
        rules="reference" if args.signals == "topk_lists" else "paper",
    )
    weights = reduction_weights(
        selection.weights,
        table.response,
        table.valid,
        reduction=args.reduction,
        denominator=args.denominator,
    )
    anchors = torch.zeros_like(weights)
    if training and args.anchor_coef > 0.0:
        anchors = anchor_weights(
            selection.kept,
            table.valid,
            coef=args.anchor_coef,
            fraction=args.anchor_fraction,
            seed=args.seed,
            step=step,
        )
    return Choice(selection=selection, loss_weights=weights, anchor_weights=anchors)
