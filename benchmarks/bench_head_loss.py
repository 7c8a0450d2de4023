"""bench_head_loss: score, loss and backward of the heads at a budget, against TRL's fused loss on everything.

Measures, on given last hidden states of student and teacher (float32, one thread, reverse KL):
  ours   `pair_score` of every position (K = 16, nothing of [N, V] kept), then `head_loss` at the budget's
         share of them and its backward to the student's states and head
  trl    TRL's `_chunked_divergence_loss` and its backward, all positions
  gkd    `GKDTrainer.generalized_jsd_loss` on full logits, all positions, where they fit into memory
  liger  Liger's fused linear JSD, all positions, where it is installed and runs
Not measured: backbones, selection (`bench_select`), the optimizer.

Arithmetic alone, one unit a matmul over [V, D] per position: TRL spends 2 forward, 2 more for its two
gradients and 2 to compute the logits again in the backward; ours 2 for the scores and 4 at the selected
positions: a floor of 0.37 at 5 %. Where passes over the logits dominate, as on a CPU, these decide.

First, at budget 1, loss and gradients are compared with TRL's on some positions. Times alternate; each
memory figure is the peak of a process of its own above inputs and gradient buffers.

Run: python -m benchmarks.bench_head_loss [--case head-heavy ...] [--tiny]
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from benchmarks.measuring import last_line, update_peak_mib, update_seconds, versions
from scripts.arguments import Arguments
from taopd.kernels import Head, pair_score
from taopd.losses import Targets, head_loss, resolve_loss

BUDGETS = (0.01, 0.05, 0.1, 0.3, 1.0)
K = 16
NUM_CHECKED = 64
TOLERANCE = 1e-4
FULL_LOGITS_LIMIT = 2**28
"""Largest [N, V] that the full-logit peer is given: with its copies about ten times 1 GiB."""


@dataclass(frozen=True)
class Case:
    """Positions, vocabulary, width of the models, rounds."""

    name: str
    num_rows: int
    vocab_size: int
    width: int
    repeats: int
    teacher_width: int = 0
    """Default the student's."""


CASES = {
    "head-heavy": Case("head-heavy", 4096, 151_936, 64, 3),
    "balanced": Case("balanced", 4096, 16_384, 512, 5),
    "tiny": Case("tiny", 128, 997, 32, 2),
}


class Workload:
    """States and heads of both models, from a fixed seed."""

    def __init__(
        self,
        case: Case,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        impl: str = "auto",
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.case, self.impl = case, impl
        width, other = case.width, case.teacher_width or case.width

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

        self.student = normal(case.num_rows, width).requires_grad_()
        self.teacher = normal(case.num_rows, other)
        # Logits with a standard deviation of two.
        self.weight = normal(case.vocab_size, width, scale=2 / width**0.5).requires_grad_()
        self.teacher_weight = normal(case.vocab_size, other, scale=2 / other**0.5)
        self.targets = torch.randint(case.vocab_size, (case.num_rows,), generator=generator).to(
            device
        )
        self.order = torch.randperm(case.num_rows, generator=generator).to(device)
        self.leaves = (self.student, self.weight)
        self.loss = resolve_loss("reverse_kl")

    def trl(self, rows: Tensor | None = None) -> Tensor:
        """Mean reverse KL by TRL."""
        device = self.student.device
        rows = torch.arange(self.case.num_rows, device=device) if rows is None else rows
        return _chunked_divergence_loss(
            self.student[rows][None],
            self.teacher[rows][None],
            self.weight,
            self.teacher_weight,
            torch.ones(1, len(rows), device=device),
            1.0,
        )[0]

    def score(self) -> object:
        """Signals of every position."""
        with torch.no_grad():
            return pair_score(
                self.student.detach(),
                Head(weight=self.weight.detach()),
                self.teacher,
                Head(weight=self.teacher_weight),
                self.targets,
                k=K,
                impl=self.impl,
            )

    def selected(self, rows: Tensor) -> Tensor:
        """Mean reverse KL at `rows` by `head_loss`."""
        targets = Targets(
            token_ids=self.targets[rows],
            teacher_hidden=self.teacher[rows],
            teacher_head=Head(weight=self.teacher_weight),
        )
        weights = torch.full((len(rows),), 1.0 / len(rows), device=rows.device)
        return head_loss(self.student[rows], Head(weight=self.weight), weights, targets, self.loss)[
            0
        ]

    def ours(self, budget: float) -> Tensor:
        """Score everything, then the loss at the first `budget` of a fixed random order."""
        self.score()
        count = max(1, round(budget * self.case.num_rows))
        return self.selected(self.order[:count].sort().values)

    def gkd(self) -> Tensor:
        """Mean reverse KL from full logits by TRL's older trainer."""
        from trl.experimental.gkd import GKDTrainer

        student = (self.student @ self.weight.T)[None]
        teacher = (self.teacher @ self.teacher_weight.T)[None]
        labels = torch.zeros(1, self.case.num_rows, dtype=torch.long)
        return GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, beta=1.0)

    def liger(self) -> Tensor:
        """Mean reverse KL by Liger's fused linear JSD."""
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False
        )
        return loss(self.student, self.weight, self.teacher, self.teacher_weight, self.targets)

    def peers(self) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
        """The peers that run here, and why the others do not."""
        peers: dict[str, Callable[[], Tensor]] = {"trl": self.trl}
        absent = {}
        elements = self.case.num_rows * self.case.vocab_size
        if elements > FULL_LOGITS_LIMIT:
            absent["gkd"] = f"full logits of {elements * 4 / 2**30:.1f} GiB, several times over"
        else:
            peers["gkd"] = self.gkd
        try:
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # noqa: F401

            peers["liger"] = self.liger
        except Exception as error:  # It imports Triton, which fails in many ways without a GPU.
            absent["liger"] = f"{type(error).__name__}: {error}"
        return peers, absent


def modes_of(work: Workload) -> dict[str, Callable[[], Tensor]]:
    """Name -> loss with a graph."""
    peers, _ = work.peers()
    return peers | {f"ours {b:g}": lambda b=b: work.ours(b) for b in BUDGETS}


def check(work: Workload) -> float:
    """Loss and gradients at budget 1 against TRL's on some positions; the largest relative error."""
    rows = work.order[:NUM_CHECKED]
    expected, found = work.trl(rows), work.selected(rows)
    errors = [abs(float(found / expected) - 1)]
    for ours, theirs in zip(
        torch.autograd.grad(found, work.leaves),
        torch.autograd.grad(expected, work.leaves),
        strict=True,
    ):
        errors.append(float((ours - theirs).norm() / theirs.norm()))
    for name, peer in work.peers()[0].items():
        if name in ("gkd", "liger"):
            errors.append(abs(float(peer().detach() / work.trl().detach()) - 1))
    if not max(errors) < TOLERANCE:
        raise SystemExit(f"FAILED: results differ by {max(errors):.1e}; no time is printed")
    return max(errors)


def peak_mib(case: Case, mode: str) -> float:
    """Peak memory above inputs and gradient buffers, in a process of its own, MiB."""
    return float(last_line("benchmarks.bench_head_loss", "--case", case.name, "--peak", mode))


def run_case(case: Case) -> dict:
    """Check, measure, print the table."""
    work = Workload(case)
    error = check(work)
    modes = modes_of(work)
    times = update_seconds(modes, work.leaves, repeats=case.repeats)
    # One process each; the tiny case leaves memory out.
    peaks = {name: math.nan if case.name == "tiny" else peak_mib(case, name) for name in modes}
    print(f"{case.name}: N = {case.num_rows:,}, V = {case.vocab_size:,}, D = {case.width}")
    print(
        f"{'mode':<10} {'p50 s':>8} {'min s':>8} {'max s':>8} {'of trl':>8} {'MiB':>9} {'of trl':>8}"
    )
    rows = []
    for name in modes:
        p50 = statistics.median(times[name])
        row = {
            "mode": name,
            "p50_s": p50,
            "min_s": min(times[name]),
            "max_s": max(times[name]),
            "time_ratio": p50 / statistics.median(times["trl"]),
            "peak_mib": peaks[name],
            "memory_ratio": peaks[name] / peaks["trl"],
        }
        rows.append(row)
        print(
            f"{name:<10} {p50:8.3f} {row['min_s']:8.3f} {row['max_s']:8.3f} {row['time_ratio']:8.3f} "
            f"{row['peak_mib']:9.1f} {row['memory_ratio']:8.3f}"
        )
    return {
        "case": asdict(case),
        "max_rel_err": error,
        "rows": rows,
        "absent": work.peers()[1],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES), action="append")
    parser.add_argument("--peak", metavar="MODE", help="print the peak memory of one mode, MiB")
    parser.add_argument("--tiny", action="store_true", help="a small case that finishes at once")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = ["tiny"] if settings.tiny else settings.case or ["head-heavy", "balanced"]
    if settings.peak:
        work = Workload(CASES[names[0]])
        print(update_peak_mib(modes_of(work)[settings.peak], work.leaves))
        return 0
    document = {
        "name": "bench_head_loss",
        "cases": [run_case(CASES[name]) for name in names],
    } | versions()
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
