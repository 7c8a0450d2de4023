"""Measurements inside the arms of a stack during training: drift, interference, selected tokens.

An observer of `run_stack`. All divergences are over the full vocabulary, in nats, at the tokens of the step's
own rollouts; "unselected" is every token where everything is selected.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from taopd.experiments.lab.stacked.train import StackStep
from taopd.losses import reverse_kl
from taopd.signals import SignalTable, idle_drift
from taopd.trainer.watches.collapse_detector import CollapseWatch

KINDS = ("digit", "marker", "end")
GUARD_EVERY = 5
LEFT = 0.01
"""A token that the initial student gives less than this is where a completion leaves its path."""
COLUMNS = (
    *("step", "entropy", "length", "ended", "kept_disagreement", "kept_compatibility"),
    *("update_norm", "gradient_norm", "drift", "idle_drift", "interference", "derailed"),
    *(f"drift_{kind}" for kind in KINDS),
    *(f"kept_{kind}" for kind in KINDS),
)
"""entropy, drift, idle_drift: means over (unselected) tokens. interference: change of the unselected tokens'
drift through this one update, on the same contexts. derailed: share of the batch's D C that lies behind a
token which the initial student would hardly have written. drift_*: mean drift where such a token was sampled.
kept_*: their share of the kept tokens."""


class Trace:
    """Rows of `COLUMNS` for every arm, and the steps at which the guard's rules would have warned.

    Args:
        token_kinds: kind of every token id.
        every: steps between two rows; the guard looks every `GUARD_EVERY` steps.
    """

    def __init__(self, token_kinds: Sequence[str], num_arms: int, *, every: int) -> None:
        self._kinds = torch.tensor(
            [KINDS.index(kind) if kind in KINDS else -1 for kind in token_kinds]
        )
        self._every = every
        self.rows: list[list[list[float]]] = [[] for _ in range(num_arms)]
        self.watches = [CollapseWatch() for _ in range(num_arms)]

    def __call__(self, seen: StackStep) -> None:
        """One step of the stack."""
        tracing = seen.step % self._every == 0
        if not tracing and seen.step % GUARD_EVERY:
            return
        reference = seen.reference_logprobs()
        now = seen.student_logprobs
        idle = idle_drift_of(seen)
        drift = reverse_kl(now, reference)
        moved = reverse_kl(seen.after_logprobs(), reference) - drift if tracing else drift
        rare = reference.gather(1, seen.targets.unsqueeze(1)).squeeze(1).exp() < LEFT
        arms = zip(seen.rows, seen.tables, seen.choices, strict=True)
        for arm, (here, table, choice) in enumerate(arms):
            kept = choice.selection.kept
            rest = ~kept if bool((~kept).any()) else kept
            num_rows = int(table.completion.unique().numel())
            watched = {
                "idle_drift": float(idle[here][rest].mean()),
                "entropy": float(table.entropy.mean()),
                "length": len(table) / num_rows,
            }
            self.watches[arm].update(seen.step, watched)
            if not tracing:
                continue
            kinds = self._kinds[seen.targets[here]]
            dc = table.disagreement * table.compatibility
            self.rows[arm].append(
                [
                    float(seen.step),
                    watched["entropy"],
                    watched["length"],
                    float((kinds == KINDS.index("end")).sum()) / num_rows,
                    float(table.disagreement[kept].mean()),
                    float(table.compatibility[kept].mean()),
                    float(seen.update_norms[arm]),
                    float(seen.gradient_norms[arm]),
                    float(drift[here][rest].mean()),
                    watched["idle_drift"],
                    float(moved[here][rest].mean()),
                    float(dc[_behind(rare[here], table)].sum() / dc.sum().clamp_min(1e-9)),
                    *(_mean(drift[here][kinds == kind]) for kind in range(len(KINDS))),
                    *(_mean((kinds[kept] == kind).float()) for kind in range(len(KINDS))),
                ]
            )


def idle_drift_of(seen: StackStep) -> Tensor:
    """`idle_drift` [N] at every position of a stack, nats."""
    now, reference = seen.student_logprobs, seen.reference_logprobs()
    students, teachers = seen.signals.student_topk_ids, seen.signals.teacher_topk_ids
    return idle_drift(
        now.gather(1, students),
        reference.gather(1, students),
        seen.teacher_logprobs.gather(1, teachers),
        now.gather(1, teachers),
        reference.gather(1, teachers),
    )


def _behind(rare: Tensor, table: SignalTable) -> Tensor:
    """Tokens of a completion that come after its first rare one."""
    first = torch.full((int(table.completion.max()) + 1,), 1 << 30)
    at = table.position[rare].long()
    first.scatter_reduce_(0, table.completion[rare].long(), at, reduce="amin")
    return table.position.long() > first[table.completion.long()]


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else 0.0
