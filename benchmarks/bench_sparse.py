"""bench_sparse: a student update through a gradient window against the update of full distillation.

Measures one update on given sequences of equal lengths: all student forwards, the reverse KL against given
teacher states, and the backward, no gradient checkpointing, one thread.
  trl    TRL's update: forward, `_chunked_divergence_loss` on every completion position, backward
  full   the same full distillation through `head_loss`
  none   the exact gradient of the selected positions: forward, loss there, backward
  one    `none` with the scoring of every position and the selection, as in a step of one micro-batch,
         where the scoring pass is the training forward
  two    the same as in a step of several micro-batches: scoring and training forwards
  w0 ... a gradient window: prefix pass and sparse pass
Share of positions that carry gradient and the gradient's cosine against `none` stand beside every time. Not
measured: sampling, the teacher's backbone, the optimizer. The selection of `one` and `two` is timed, and its
outcome replaced by the positions that all modes train. The backbone is a Qwen3 with random weights, so the
cosines are those of an untrained model; the times do not depend on the weights.

Compute-bound. Expected from counts alone (2 units per token forward, 4 backward):
(b (2 + 6 s) + 0.05 h) / (6 b + h), b and h the backbone's and the head's share.

Each memory figure is the peak of a process of its own above the model and its gradient buffers.

Run: python -m benchmarks.bench_sparse [--case CASE | --tiny]
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from benchmarks.measuring import last_line, update_peak_mib, update_seconds, versions
from scripts.arguments import Arguments
from taopd.kernels import Head
from taopd.losses import Targets, head_loss, resolve_loss
from taopd.models.gradient_window import (
    capture_prefix,
    compare_gradients,
    gradient_positions,
    gradients_of,
    sparse_states,
)
from taopd.selectors import select
from taopd.signals import exact_signals, signal_table


@dataclass(frozen=True)
class Case:
    """A shape. Head and backbone stand as in Qwen3-1.7B: intermediate 3 D, half as many key heads, and,
    where no vocabulary is given, one that makes the head 0.18 of the matmul weights."""

    name: str
    hidden: int
    layers: int
    heads: int
    batch: int
    prompt: int
    completion: int
    repeats: int
    vocab: int = 0
    teacher_hidden: int = 0
    """Width of the teacher's states; default the student's."""


CASES = {
    "tiny": Case("tiny", 32, 2, 2, 2, 8, 56, 2),
    "balanced": Case("balanced", 256, 8, 4, 1, 128, 1920, 5),
    "wide": Case("wide", 512, 6, 8, 1, 128, 1920, 2),
    "long": Case("long", 256, 8, 4, 1, 128, 8064, 2),
}
WINDOWS = (0, 4, 8, 32)
BUDGET, STAY = 0.05, 0.3
"""Share selected, and the chance that the token after a selected one is selected too."""
HEAD_SHARE = 0.18
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3


class Workload:
    """Model, sequences, selected positions and teacher states of a case, from fixed seeds."""

    def __init__(self, case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        d, kv = case.hidden, case.heads // 2
        head_dim = d // case.heads
        per_layer = 2 * d * d + 2 * d * kv * head_dim + 9 * d * d
        vocab = case.vocab or round(HEAD_SHARE / (1 - HEAD_SHARE) * case.layers * per_layer / d)
        config = Qwen3Config(
            vocab_size=vocab,
            hidden_size=d,
            intermediate_size=3 * d,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            num_key_value_heads=kv,
            head_dim=head_dim,
            max_position_embeddings=case.prompt + case.completion,
            tie_word_embeddings=False,
        )
        self.case, self.vocab = case, vocab
        with torch.device(device):
            self.model = Qwen3ForCausalLM(config).to(dtype).train()
        length = case.prompt + case.completion
        self.ids = torch.randint(0, vocab, (case.batch, length)).to(device)
        self.mask = torch.ones_like(self.ids)
        self.wanted = torch.zeros_like(self.ids, dtype=torch.bool)
        self.wanted[:, case.prompt - 1 : -1] = _clustered(case.batch, case.completion).to(device)
        self.every = torch.zeros_like(self.wanted)
        self.every[:, case.prompt - 1 : -1] = True
        width = case.teacher_hidden or d
        like = {"device": device, "dtype": dtype}
        self.teacher = torch.randn(case.batch, length, width).to(**like)
        self.teacher_head = Head(weight=(torch.randn(vocab, width) / width**0.5).to(**like))
        self.loss = resolve_loss("reverse_kl")

    def loss_at(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Mean reverse KL at `positions`, hidden states in their order."""
        targets = Targets(
            token_ids=self.ids.roll(-1, 1)[positions],
            teacher_hidden=self.teacher[positions],
            teacher_head=self.teacher_head,
        )
        weights = torch.full((len(hidden),), 1.0 / len(hidden), device=hidden.device)
        head = Head(weight=self.model.lm_head.weight)
        return head_loss(hidden, head, weights, targets, self.loss)[0]

    def full_at(self, positions: Tensor) -> Tensor:
        """Loss of a full forward at `positions`."""
        hidden = self.model.model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
        return self.loss_at(hidden[positions], positions)

    def trl(self) -> Tensor:
        """TRL's loss of full distillation, its forward included."""
        hidden = self.model.model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
        first = self.case.prompt - 1
        return _chunked_divergence_loss(
            hidden[:, first:-1],
            self.teacher[:, first:-1],
            self.model.lm_head.weight,
            self.teacher_head.weight,
            torch.ones(hidden[:, first:-1].shape[:2], device=hidden.device),
            1.0,
        )[0]

    @torch.no_grad()
    def score_and_select(self, hidden: Tensor) -> None:
        """Signals of every completion position, and a selection from them."""
        rows, columns = self.every.nonzero(as_tuple=True)
        signals = exact_signals(
            hidden[self.every],
            Head(weight=self.model.lm_head.weight.detach()),
            self.teacher[self.every],
            self.teacher_head,
            self.ids.roll(-1, 1)[self.every],
            k=16,
        )
        valid = torch.ones_like(rows, dtype=torch.bool)
        table = signal_table(signals, completion=rows, position=columns, valid=valid)
        select(table, selector="teachability", budget=BUDGET)

    def step(self, *, forwards: int) -> Tensor:
        """Loss at the selected positions, scoring and selection included."""
        inputs = {"input_ids": self.ids, "attention_mask": self.mask}
        if forwards == 2:
            with torch.no_grad():
                self.score_and_select(self.model.model(**inputs).last_hidden_state)
            return self.full_at(self.wanted)
        hidden = self.model.model(**inputs).last_hidden_state
        self.score_and_select(hidden.detach())
        return self.loss_at(hidden[self.wanted], self.wanted)

    def window(self, window: int) -> Tensor:
        """Loss through a gradient window at the selected positions, prefix pass included."""
        states = sparse_states(self.model, self.ids, self.mask, self.wanted, window=window)
        return self.loss_at(states.hidden, self.wanted)

    def modes(self) -> dict[str, Callable[[], Tensor]]:
        """Name -> loss with a graph."""
        return {
            "trl": self.trl,
            "full": lambda: self.full_at(self.every),
            "none": lambda: self.full_at(self.wanted),
            "one": lambda: self.step(forwards=1),
            "two": lambda: self.step(forwards=2),
            **{f"w{w}": lambda w=w: self.window(w) for w in WINDOWS},
        }

    def share(self, mode: str) -> float:
        """Share of positions that carry gradient."""
        if not mode.startswith("w"):
            return 1.0
        active = gradient_positions(self.wanted, self.mask.bool(), int(mode[1:]))
        last = self.wanted.nonzero()[:, 1].max()
        return float(active.sum() / self.mask[:, : last + 1].sum())


def _clustered(rows: int, columns: int) -> Tensor:
    """A stationary two-state chain: selected with rate BUDGET, in runs of 1 / (1 - STAY) on average."""
    enter = BUDGET * (1 - STAY) / (1 - BUDGET)
    draws, state = torch.rand(rows, columns), torch.zeros(rows, dtype=torch.bool)
    chosen = []
    for column in range(columns):
        state = draws[:, column] < torch.where(state, STAY, enter)
        chosen.append(state)
    return torch.stack(chosen, 1)


def check(
    work: Workload,
    loss_tolerance: float = LOSS_TOLERANCE,
    gradient_tolerance: float = GRADIENT_TOLERANCE,
) -> float:
    """Loss at every window against the full forward, gradient at the widest; the largest error."""
    length = work.ids.shape[1]
    expected = work.full_at(work.wanted).item()
    errors = [abs(work.window(w).item() - expected) / expected for w in WINDOWS]
    exact = gradients_of(work.full_at(work.wanted), work.model)
    fidelity = compare_gradients(exact, gradients_of(work.window(length), work.model))
    errors.append(abs(work.step(forwards=1).item() - expected) / expected)
    errors.append(abs(work.trl().item() / work.full_at(work.every).item() - 1))
    gradient = max(abs(fidelity.cosine - 1), abs(fidelity.norm_ratio - 1))
    if max(errors) > loss_tolerance or not gradient < gradient_tolerance:
        raise SystemExit(
            f"FAILED: loss differs by {max(errors):.1e}, gradient by {gradient:.1e}; no time is printed"
        )
    return max(*errors, gradient)


def split(work: Workload, window: int) -> dict[str, float]:
    """Seconds of the parts of one windowed update: medians."""
    parts: dict[str, list[float]] = {}
    for _ in range(work.case.repeats):
        clock = [time.perf_counter()]
        prefix = capture_prefix(work.model, work.ids, work.mask)
        clock.append(time.perf_counter())
        states = sparse_states(
            work.model, work.ids, work.mask, work.wanted, window=window, prefix=prefix
        )
        clock.append(time.perf_counter())
        loss = work.loss_at(states.hidden, work.wanted)
        clock.append(time.perf_counter())
        loss.backward()
        clock.append(time.perf_counter())
        names = ("prefix_s", "sparse_forward_s", "head_loss_s", "backward_s")
        for name, begin, end in zip(names, clock, clock[1:], strict=False):
            parts.setdefault(name, []).append(end - begin)
    return {name: statistics.median(values) for name, values in parts.items()}


def peak_mib(case: Case, mode: str) -> float:
    """Peak memory of one update above model and gradients, in a process of its own, MiB."""
    return float(last_line("benchmarks.bench_sparse", "--case", case.name, "--peak", mode))


def main(arguments: list[str] | None = None) -> int:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES), default="balanced")
    parser.add_argument("--peak", metavar="MODE", help="print the peak memory of one update, MiB")
    parser.add_argument("--tiny", action="store_true", help="a small case that finishes at once")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    case = CASES["tiny" if settings.tiny else settings.case]
    work = Workload(case)
    if settings.peak:
        print(update_peak_mib(work.modes()[settings.peak], work.model.parameters()))
        return 0
    error = check(work)
    modes = work.modes()
    times = update_seconds(modes, work.model.parameters(), repeats=case.repeats)
    # One process each; the tiny case leaves memory out.
    peaks = {name: math.nan if case.name == "tiny" else peak_mib(case, name) for name in modes}
    rows = []
    print(
        f"{'mode':<6} {'share':>6} {'cosine':>7} {'p50 s':>8} {'min s':>8} {'of full':>8} {'MiB':>8} "
        f"{'of full':>8} {'t of trl':>9}"
    )
    for name, loss in modes.items():
        row = {
            "mode": name,
            "gradient_share": work.share(name),
            "p50_s": statistics.median(times[name]),
            "min_s": min(times[name]),
            "max_s": max(times[name]),
            "time_ratio": statistics.median(times[name]) / statistics.median(times["full"]),
            "peak_mib": peaks[name],
            "memory_ratio": peaks[name] / peaks["full"],
            "time_of_trl": statistics.median(times[name]) / statistics.median(times["trl"]),
            "memory_of_trl": peaks[name] / peaks["trl"],
        }
        if name.startswith("w"):
            exact = gradients_of(modes["none"](), work.model)
            fidelity = compare_gradients(exact, gradients_of(loss(), work.model))
            row |= {"gradient_cosine": fidelity.cosine, "gradient_norm_ratio": fidelity.norm_ratio}
            row |= split(work, int(name[1:]))
        rows.append(row)
        print(
            f"{name:<6} {row['gradient_share']:6.3f} {row.get('gradient_cosine', 1.0):7.3f} "
            f"{row['p50_s']:8.3f} {row['min_s']:8.3f} {row['time_ratio']:8.3f} {row['peak_mib']:8.1f} "
            f"{row['memory_ratio']:8.3f} {row['time_of_trl']:9.3f}"
        )
    document = {
        "name": "bench_sparse",
        "case": asdict(case) | {"vocab": work.vocab},
        "budget": BUDGET,
        "kept": float(work.wanted.sum() / work.every.sum()),
        "max_rel_err": error,
        "rows": rows,
    } | versions()
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
