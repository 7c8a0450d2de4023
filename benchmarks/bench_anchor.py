"""bench_anchor: what the default's anchors, and `method: reach`, add to the published student update.

The same model, sequences, scoring and selected positions (5 %) as in bench_sparse, eight completions of one
generation batch. `published` trains the selected positions; `anchored` also those that the default draws
(5 % of the unselected in a quarter of the completions): the initial student's forward on these completions,
both losses, the larger backward. `reach` runs the initial student on all completions and both heads once more
for r, and trains 10 % of the unselected of all completions towards the teacher and the initial student.
`remembered` is reach with `anchor_responses=0.25`: the initial student on a quarter of the completions.
  one       exact gradient, one micro-batch a step: the scoring pass is the training forward
  two       exact gradient, scoring and training forwards
  w8        a gradient window of 8, prefix and sparse pass
  w8 eighth the same with as many anchors in an eighth of the completions
Target: at most 1.3 times the published update.

Checked before anything is timed: the anchored gradient is the published one plus the anchor's.
Compute-bound. Expected from counts (forward 2 units a token, backward 4; head 0.18): one
(6 + 0.25 * 2) / 6 = 1.08, two 1.06, plus the head at 5 % more positions; reach (6 + 2) / 6 = 1.33 and two
heads; a window pays for the positions that are added to it. The frozen copy takes the memory of the model's
weights; it is not in the times. Times are of the process, so that a busy machine changes them little.

Run: python -m benchmarks.bench_anchor [--tiny]
"""

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from benchmarks.bench_sparse import BUDGET, Case, Workload
from benchmarks.measuring import update_seconds, versions
from scripts.arguments import Arguments
from taopd.kernels import Head
from taopd.losses import (
    Targets,
    anchor_weights,
    by_reach,
    head_loss,
    held_share,
    resolve_loss,
)
from taopd.models.gradient_window import sparse_states
from taopd.signals import (
    THRESHOLD,
    StartMemory,
    reach_from_states,
    remembered_reach,
    sums_from_states,
)

CASES = {
    "tiny": Case("tiny", 32, 2, 2, 8, 8, 24, 2),
    "balanced": Case("balanced", 256, 8, 4, 8, 64, 448, 5),
}
FRACTION, RESPONSES = 0.05, 0.25
"""The default's."""
TOLERANCE = 1e-5


class Anchored(Workload):
    """A workload with anchors drawn as the trainer draws them."""

    def __init__(
        self, case: Case, responses: float = RESPONSES, fraction: float = FRACTION
    ) -> None:
        super().__init__(case)
        self.initial = copy.deepcopy(self.model).requires_grad_(False)
        self.initial.lm_head.weight.mul_(1.01)  # Else the anchor's gradient is zero.
        rows = self.every.nonzero()[:, 0]
        weights = anchor_weights(
            self.wanted[self.every],
            torch.ones_like(rows, dtype=torch.bool),
            rows,
            fraction=fraction,
            responses=responses,
            seed=0,
            step=0,
        )
        self.weights = torch.zeros_like(self.every, dtype=torch.float)
        self.weights[self.every] = weights.float()
        self.held = self.weights != 0
        self.both = self.wanted | self.held
        self.reverse = resolve_loss("reverse_kl")

    def anchor_at(self, hidden: Tensor) -> Tensor:
        """The anchor on hidden states of the held positions, the initial student's forward included."""
        rows = self.held.any(1)
        with torch.no_grad():
            states = self.initial.model(
                input_ids=self.ids[rows], attention_mask=self.mask[rows]
            ).last_hidden_state
        targets = Targets(
            token_ids=self.ids.roll(-1, 1)[self.held],
            teacher_hidden=states[self.held[rows]],
            teacher_head=Head(weight=self.initial.lm_head.weight),
        )
        head = Head(weight=self.model.lm_head.weight)
        return head_loss(hidden, head, self.weights[self.held], targets, self.reverse)[0]

    def total(self, hidden: Tensor) -> Tensor:
        """Both losses on hidden states of `both`, in the order of its positions."""
        loss = self.loss_at(hidden[self.wanted[self.both]], self.wanted)
        return loss + self.anchor_at(hidden[self.held[self.both]])

    def states(self) -> Tensor:
        """A full forward."""
        return self.model.model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state

    def anchored_step(self, *, forwards: int) -> Tensor:
        """As `step`, with the anchor."""
        return self.total(self.selected_states(forwards)[self.both])

    def anchored_window(self, window: int) -> Tensor:
        """As `window`, with the anchor."""
        made = sparse_states(self.model, self.ids, self.mask, self.both, window=window)
        return self.total(made.hidden)

    def selected_states(self, forwards: int) -> Tensor:
        """States of the training forward, after scoring and selection."""
        if forwards == 2:
            with torch.no_grad():
                self.score_and_select(self.states())
        hidden = self.states()
        if forwards == 1:
            self.score_and_select(hidden.detach())
        return hidden

    def pairs(self) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
        """Name -> published and anchored update."""
        return {
            "one": (lambda: self.step(forwards=1), lambda: self.anchored_step(forwards=1)),
            "two": (lambda: self.step(forwards=2), lambda: self.anchored_step(forwards=2)),
            "w8": (lambda: self.window(8), lambda: self.anchored_window(8)),
        }


class Reaching(Anchored):
    """A workload with the hold of `method: reach`."""

    def __init__(self, case: Case, responses: float = 1.0) -> None:
        super().__init__(case, responses=responses, fraction=0.1)
        self.divided = by_reach(self.reverse)
        self.tokens, self.start = self.ids.roll(-1, 1), Head(weight=self.initial.lm_head.weight)

    @torch.no_grad()
    def judged(self) -> tuple[Tensor, Tensor]:
        """The initial student's states at the held positions, and r at every completion token."""
        states = self.initial.model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
        reach = torch.zeros_like(self.weights)
        reach[self.every], _ = self.reach_at(states, self.every)
        return states[self.held], reach

    def reach_at(self, states: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """r and log p_S0 of the sampled tokens at some positions, from the initial student's states."""
        teacher = self.teacher[where], self.teacher_head
        start = states[where], self.start
        return reach_from_states(start, teacher, self.tokens[where], threshold=THRESHOLD)

    def total(self, hidden: Tensor) -> Tensor:
        """The loss by reach at the selected, the mixed hold at the drawn; r at every completion token. As at
        the first step of a run: later less is held at the start, and at last nothing."""
        states, reach = self.judged()
        share, drawn = held_share(reach[self.held]), self.weights[self.held]
        to_teacher, at_start = drawn * (1.0 - share), drawn * share
        weights = self.wanted.float() / self.wanted.sum()
        weights[self.held] = to_teacher
        targets = Targets(
            token_ids=self.tokens[self.both],
            teacher_hidden=self.teacher[self.both],
            teacher_head=self.teacher_head,
            reach=reach.masked_fill(self.held, 1.0)[self.both],
        )
        head = Head(weight=self.model.lm_head.weight)
        loss = head_loss(hidden, head, weights[self.both], targets, self.divided)[0]
        targets = Targets(
            token_ids=self.tokens[self.held], teacher_hidden=states, teacher_head=self.start
        )
        held = hidden[self.held[self.both]]
        return loss + head_loss(held, head, 3.0 * at_start, targets, self.reverse)[0]


class Remembering(Reaching):
    """The same with the initial student on a quarter of the completions (`signals.remembered`)."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, RESPONSES)
        self.memory = StartMemory()

    @torch.no_grad()
    def judged(self) -> tuple[Tensor, Tensor]:
        """As of `Reaching`; r is remembered where the initial student does not run."""
        rows = self.held.any(1)
        states = self.teacher.new_zeros(*self.ids.shape, self.start.weight.shape[1])
        states[rows] = self.initial.model(
            input_ids=self.ids[rows], attention_mask=self.mask[rows]
        ).last_hidden_state
        here, away = self.every & rows[:, None], self.every & ~rows[:, None]
        reach = torch.zeros_like(self.weights)
        reach[here], sampled = self.reach_at(states, here)
        teacher = self.teacher[here], self.teacher_head
        both = (states[here], self.start), teacher
        rule = {"threshold": THRESHOLD}
        self.memory.add(sums_from_states(*both, self.tokens[here], sampled, **rule))
        reach[away] = remembered_reach(self.teacher[away], self.teacher_head, self.memory.shares())
        return states[self.held], reach


def check(work: Anchored) -> float:
    """Relative error of the anchored gradient against the sum of its two parts."""
    leaves = list(work.model.parameters())

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])

    parts = gradient(work.full_at(work.wanted)) + gradient(work.anchor_at(work.states()[work.held]))
    error = float((gradient(work.anchored_step(forwards=1)) - parts).norm() / parts.norm())
    if error > TOLERANCE:
        raise SystemExit(
            f"FAILED: the anchored gradient differs by {error:.1e}; no time is printed"
        )
    return error


def _ratio(times: list[float], base: list[float]) -> float:
    # Alternating runs: the ratio of neighbours hardly knows how busy the machine was.
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small case that finishes at once")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    case = CASES["tiny" if settings.tiny else "balanced"]
    work = Anchored(case)
    error = check(work)
    pairs = work.pairs()
    pairs["w8 eighth"] = Anchored(case, RESPONSES / 2).pairs()["w8"]
    losses = {
        f"{name} {kind}": loss
        for name, both in pairs.items()
        for kind, loss in zip(("published", "anchored"), both, strict=True)
    }
    kinds = {"reach": Reaching(case), "remembered": Remembering(case)}
    losses |= {
        f"{name} {kind}": both[1]
        for kind, own in kinds.items()
        for name, both in own.pairs().items()
    }
    models = [work.model, *(own.model for own in kinds.values())]
    leaves = [parameter for model in models for parameter in model.parameters()]
    times = update_seconds(losses, leaves, repeats=case.repeats, clock=time.process_time)
    rows = []
    print(
        f"{'update':<10} {'published s':>12} {'anchored s':>12} {'ratio':>7} {'reach s':>12} {'ratio':>7} "
        f"{'remembered s':>12} {'ratio':>7}"
    )
    for name in pairs:
        published, anchored = (times[f"{name} {kind}"] for kind in ("published", "anchored"))
        row = {
            "update": name,
            "published_s": statistics.median(published),
            "anchored_s": statistics.median(anchored),
            "ratio": _ratio(anchored, published),
        }
        line = (
            f"{name:<10} {row['published_s']:12.3f} {row['anchored_s']:12.3f} {row['ratio']:7.3f}"
        )
        for kind in kinds:
            if (own := times.get(f"{name} {kind}")) is None:
                continue
            row |= {f"{kind}_s": statistics.median(own), f"{kind}_ratio": _ratio(own, published)}
            line += f" {row[f'{kind}_s']:12.3f} {row[f'{kind}_ratio']:7.3f}"
        rows.append(row)
        print(line)
    document = {
        "name": "bench_anchor",
        "case": asdict(case) | {"vocab": work.vocab},
        "budget": BUDGET,
        "held": float(work.held.sum() / work.every.sum()),
        "max_rel_err": error,
        "rows": rows,
    } | versions()
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
