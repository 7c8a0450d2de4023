"""Scores and soft weights from the work around the paper, and controls; one formula each.

What: each function maps a `NormalizedView` to [N] numbers, higher is kept first. p student, q teacher, y the
sampled token, Delta = log q(y) - log p(y). Parameters have the source's defaults and can be set where a
selector is named: `selector="dial(beta=0.5)"`.

Not here: DEAR (arXiv 2606.22830) weighs tokens by the cosine of last-layer states, which do not travel with
the table; CROP (2608.13387) needs teacher forwards on edited prompts; SCOPE and PACED need a verifier.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taopd.errors import ConfigError
from taopd.selectors.formulas import teachability
from taopd.selectors.normalize import NormalizedView
from taopd.signals import SignalTable

REJECTED_WEIGHT = 0.01
"""Weight of a token that the gate of arXiv 2510.24021 rejects."""


def delta(view: NormalizedView) -> Float[Tensor, " N"]:
    """Delta = log q(y) - log p(y), nats."""
    return view.signal("teacher_logprobs") - view.signal("student_logprobs")


def prefix(view: NormalizedView) -> Float[Tensor, " N"]:
    """Earliest positions of every completion first: -t. Source: ESR, arXiv 2605.27028; POPD 2605.31490."""
    return -view.table.position.double()


def compatible(view: NormalizedView, *, threshold: float = 0.9) -> Float[Tensor, " N"]:
    """Drawn at random among positions with C > threshold, then the most compatible of the others.

        (1 + u) / 2  where C > threshold,   C / 2  elsewhere,   u uniform on [0, 1)

    C itself, not C~. Control for D: what is left of teachability when disagreement plays no part.
    """
    _inside("threshold", threshold, 0.0, 1.0)
    c = view.table.compatibility.double()
    return torch.where(c > threshold, 1.0 + view.uniform(), c.clamp(0.0, 1.0)) / 2


def pgt(view: NormalizedView) -> Float[Tensor, " N"]:
    """Var_p[log q - log p] on S u T, see `signals.derived.log_ratio_variance`. Source: PGT."""
    return view.signal("log_ratio_variance")


def ier(view: NormalizedView) -> Float[Tensor, " N"]:
    """Information-to-error ratio, see `signals.derived`. Source: arXiv 2609.24432."""
    return view.signal("ier")


def corrective(view: NormalizedView) -> Float[Tensor, " N"]:
    """Sum over S of max(q - p, 0), see `signals.derived.corrective_mass`. Source: RAC."""
    return view.signal("corrective_mass")


def reverse_kl(view: NormalizedView) -> Float[Tensor, " N"]:
    """KL(p || q) over the full vocabulary, TIP's own divergence. Source: arXiv 2604.14084."""
    return view.signal("reverse_kl")


def dial(view: NormalizedView, *, beta: float = 1.0) -> Float[Tensor, " N"]:
    """|Delta|^(1 - beta) |q(y) - p(y)|^beta; beta = 1 is |q - p|, 0 is |Delta|. Source: DIAL-OPD."""
    _inside("beta", beta, 0.0, 1.0)
    log_p, log_q = view.signal("student_logprobs"), view.signal("teacher_logprobs")
    gap = (log_q - log_p).abs()
    return gap ** (1.0 - beta) * (log_q.exp() - log_p.exp()).abs() ** beta


def opsa(view: NormalizedView) -> Float[Tensor, " N"]:
    """-log p(y): the student's least likely tokens; reads no teacher.

    The control of arXiv 2608.31046 is this at budget 0.2 with `loss="fixed_advantage"`.
    """
    return -view.signal("student_logprobs")


def selectkd(view: NormalizedView) -> Float[Tensor, " N"]:
    """Drawn at random among accepted tokens (student's first id in the teacher's first five), then among
    the others. Source: SelecTKD, arXiv 2510.24021."""
    return (view.signal("student_top1_accepted") + view.uniform()) / 2


def selectkd_weight(view: NormalizedView) -> Float[Tensor, " N"]:
    """1 for an accepted token, 0.01 for a rejected one. Source: SelecTKD, arXiv 2510.24021."""
    # Not 0: a rejected token that was selected still trains a little, as in the source.
    accepted = view.signal("student_top1_accepted")
    return torch.where(accepted > 0, 1.0, REJECTED_WEIGHT).double()


def iw(view: NormalizedView, *, gamma: float = 0.5) -> Float[Tensor, " N"]:
    """1 + gamma (1 - sum_(k<t) |Delta_k| / sum_k |Delta_k|) along the completion, in [1, 1 + gamma].

    Source: IW-OPD, arXiv 2606.22600.
    """
    _inside("gamma", gamma, 0.0, float("inf"))
    size = delta(view).abs()
    # Where student and teacher agree on every token there is nothing to divide by.
    total = response_sum(size, view.table)
    spent = earlier_sum(size, view.table) / torch.where(total > 0, total, 1.0)
    return 1.0 + gamma * (1.0 - spent.clamp(0.0, 1.0))


def pw(
    view: NormalizedView, *, floor: float = 0.25, center: float = 0.30, width: float = 0.10
) -> Float[Tensor, " N"]:
    """floor + (1 - floor) sigmoid((pos - center) / width), pos in [0, 1] along the completion; increasing.

    Source: PW-OPSD, arXiv 2605.21606.
    """
    _inside("floor", floor, 0.0, 1.0)
    _inside("width", width, 1e-9, float("inf"))
    rise = torch.sigmoid((relative_position(view.table) - center) / width)
    return floor + (1.0 - floor) * rise


def fire(
    view: NormalizedView, *, alpha: float = 1.0, beta: float = 1.0, drop: float = 0.2
) -> Float[Tensor, " N"]:
    """(1 + alpha (1 - H_T / max H_T)) (1 + beta H_S / max H_S); 0 in the dropped completions.

    Dropped are the `drop` share of completions with the lowest mean log q(y); the maxima are over the batch.
    Source: FiRe-OPD, arXiv 2606.02684 (the released code's scope; the paper normalizes per completion).
    """
    _inside("drop", drop, 0.0, 0.999)
    sure = 1.0 - view.signal("teacher_entropy") / _largest(view.signal("teacher_entropy"), view)
    unsure = view.table.entropy.double() / _largest(view.table.entropy.double(), view)
    weight = (1.0 + alpha * sure.clamp(0.0, 1.0)) * (1.0 + beta * unsure.clamp(0.0, 1.0))
    return torch.where(_dropped(view, drop), 0.0, weight)


def sure(view: NormalizedView, *, alpha: float = 1.0) -> Float[Tensor, " N"]:
    """1 + alpha (1 - p(y)). Source: SuRe, arXiv 2608.25643."""
    _inside("alpha", alpha, 0.0, float("inf"))
    return 1.0 + alpha * (1.0 - view.signal("student_logprobs").exp())


def bellman(
    values: Float[Tensor, " N"], view: NormalizedView, *, gamma: float = 0.995
) -> Float[Tensor, " N"]:
    """Look-ahead of any score: V = R / M along the completion, a_t = min(q(y) / p(y), 1).

        R_t = values_t + gamma a_t R_(t+1),   M_t = 1 + gamma a_t M_(t+1)

    A weighted mean of this and later values, so it keeps their range. Source: BellmanOPD (its weight is
    `weighting="0.1 + 0.9 * bellman * bellman"`).
    """
    _inside("gamma", gamma, 0.0, 1.0)
    # The clamp is min(q / p, 1) in logs, where a large ratio cannot overflow.
    decay = gamma * delta(view).clamp_max(0.0).exp()
    future = discounted_future(values, decay, view.table)
    steps = discounted_future(torch.ones_like(values), decay, view.table)
    return future / torch.where(steps > 0, steps, 1.0)


def bellman_teachability(view: NormalizedView, *, gamma: float = 0.995) -> Float[Tensor, " N"]:
    """`bellman` of D~ C~."""
    return bellman(teachability(view), view, gamma=gamma)


def dash(view: NormalizedView, *, kappa: float = 1.0) -> Float[Tensor, " N"]:
    """|A_t|, A_t = d_t + lambda_t A_(t+1), lambda_t = sigmoid(-kappa (d_t - mean d)), d = Delta.

    Credit flows back through tokens on which the teacher does not object. The source gives no kappa; 1 is
    ours. Source: DASH, arXiv 2608.06243, which uses A as the advantage.
    """
    gap = delta(view)
    valid = view.table.valid
    mean = gap[valid].mean() if bool(valid.any()) else gap.new_zeros(())
    decay = torch.sigmoid(-kappa * (gap - mean))
    return discounted_future(gap, decay, view.table).abs()


def _largest(values: Tensor, view: NormalizedView) -> Tensor:
    valid = values[view.table.valid]
    largest = valid.max() if valid.numel() else values.new_ones(())
    return torch.where(largest > 0, largest, 1.0)


def _dropped(view: NormalizedView, share: float) -> Bool[Tensor, " N"]:
    """Rows of the floor(share R) completions whose sampled tokens the teacher finds least likely.

    R counts those with a row that may train: a completion that was cut off and masked is not one of them.
    """
    table = view.table
    completions, group = table.completion.unique(return_inverse=True)
    num_valid = response_sum(torch.ones_like(view.h), table)
    mean = response_sum(view.signal("teacher_logprobs"), table) / num_valid
    of_response = torch.empty_like(completions, dtype=mean.dtype).index_put_((group,), mean)
    dropped = torch.zeros_like(completions, dtype=torch.bool)
    # Stable: among equal completions the earlier one is dropped on every device. 0 / 0 comes last.
    num_responses = int((~of_response.isnan()).sum())
    dropped[of_response.argsort(stable=True)[: int(share * num_responses)]] = True
    return dropped[group]


def _inside(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}={value} must be in [{low}, {high}]")


def in_order(table: SignalTable) -> Int[Tensor, " N"]:
    """Index that puts the rows in the order (completion, position)."""
    if len(table) == 0:
        return table.completion.new_zeros(0)
    width = table.position.max() + 1
    return (table.completion.long() * width + table.position).argsort(stable=True)


def earlier_sum(values: Float[Tensor, " N"], table: SignalTable) -> Float[Tensor, " N"]:
    """Sum of `values` over the valid rows of the same completion that come before each row."""
    order = in_order(table)
    counted = torch.where(table.valid, values, 0.0)[order]
    before = counted.cumsum(0) - counted
    starts = _starts(table.completion[order])
    # The running sum of the whole table, less what it was where the completion began.
    return torch.empty_like(values).index_put_((order,), before - before[starts])


def response_sum(values: Float[Tensor, " N"], table: SignalTable) -> Float[Tensor, " N"]:
    """Sum of `values` over the valid rows of each row's completion."""
    groups, group = table.completion.unique(return_inverse=True)
    counted = torch.where(table.valid, values, 0.0)
    return counted.new_zeros(len(groups)).index_add_(0, group, counted)[group]


def completion_max(values: Float[Tensor, " N"], table: SignalTable) -> Float[Tensor, " N"]:
    """The largest value in each row's completion."""
    groups, group = table.completion.unique(return_inverse=True)
    largest = values.new_full((len(groups),), -torch.inf)
    return largest.scatter_reduce(0, group, values, "amax")[group]


def discounted_future(
    values: Float[Tensor, " N"], decay: Float[Tensor, " N"], table: SignalTable
) -> Float[Tensor, " N"]:
    """R_t = values_t + decay_t R_(t+1) along each completion, R = 0 after its last row.

    A row that may not train adds nothing itself and hands on what comes after it.
    """
    order = in_order(table)
    own = torch.where(table.valid, values, 0.0)[order]
    carry = torch.where(table.valid, decay, torch.ones_like(decay))[order]
    _, lengths = torch.unique_consecutive(table.completion[order], return_counts=True)
    starts = lengths.cumsum(0) - lengths
    # Backward over positions, all completions at once: as many steps as the longest completion has tokens.
    result = own.clone()
    for step in range(int(lengths.max()) - 2 if lengths.numel() else -1, -1, -1):
        rows = starts[lengths > step + 1] + step
        result[rows] = own[rows] + carry[rows] * result[rows + 1]
    return torch.empty_like(values).index_put_((order,), result)


def relative_position(table: SignalTable) -> Float[Tensor, " N"]:
    """Place in the completion, 0 at its first position and 1 at its last."""
    position = table.position.double()
    return position / completion_max(position, table).clamp_min(1.0)


def _starts(ordered_response: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    _, inverse, counts = torch.unique_consecutive(
        ordered_response, return_inverse=True, return_counts=True
    )
    return (counts.cumsum(0) - counts)[inverse]
