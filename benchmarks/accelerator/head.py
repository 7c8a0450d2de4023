"""Stage 2: score and loss of the heads of Qwen3-1.7B <- Qwen3-4B at a budget, against TRL's fused loss.

What is measured is described in `benchmarks/bench_head_loss.py`; here in bfloat16, with random weights, on
8,192 positions. Expected from counts, in matmuls per position, [V, 2048] and [V, 2560]: TRL two forward, the
same two again in the backward, and two of the student's for its gradients; ours two to score, and TRL's at
the selected positions.
"""

import json

import torch

from benchmarks.accelerator.measure import DEVICE, limits, measured, toy_is_asked
from benchmarks.bench_head_loss import Case, Workload

CASE = Case("qwen3-1.7b-from-4b", 8192, 151_936, 2048, 5, teacher_width=2560)
TOY = Case("toy", 128, 997, 32, 2, teacher_width=48)
BUDGETS = (0.01, 0.05, 0.1, 1.0)
NUM_CHECKED = 64


def check(work: Workload) -> dict[str, float]:
    """Relative errors of loss and student gradient at budget 1, ours and TRL's, against float64."""
    rows = work.order[:NUM_CHECKED]
    student = work.student[rows].double() @ work.weight.double().T
    teacher = work.teacher[rows].double() @ work.teacher_weight.double().T
    ours, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    truth = (ours.exp() * (ours - theirs)).sum(-1).mean()
    exact = torch.autograd.grad(truth, work.student)[0][rows]
    errors = {}
    for name, loss in (("ours", work.selected), ("trl", work.trl)):
        value = loss(rows)
        gradient = torch.autograd.grad(value, work.student)[0][rows].double()
        errors[f"{name}_loss"] = abs(float(value.detach() / truth.detach()) - 1)
        errors[f"{name}_gradient"] = float((gradient - exact).norm() / exact.norm())
    return errors


def floating_point_operations(case: Case, budget: float | None) -> float:
    """Of a mode: TRL's with `budget` None. Matmuls only."""
    units = 2 * case.num_rows * case.vocab_size
    score = units * (case.width + case.teacher_width)
    loss = 2 * score + units * 2 * case.width
    return loss if budget is None else score + budget * loss


def main() -> None:
    toy = toy_is_asked(__doc__)
    case = TOY if toy else CASE
    dtype = torch.float32 if toy else torch.bfloat16
    work = Workload(case, DEVICE, dtype)
    document = {"case": case.name, "errors": check(work), "limits": limits(dtype), "rows": []}
    print(json.dumps(document), flush=True)
    modes = {"trl": work.trl} | {f"ours {b:g}": lambda b=b: work.ours(b) for b in BUDGETS}
    found = measured(modes, work.leaves, repeats=case.repeats)
    chunked = Workload(case, DEVICE, dtype, impl="chunked")
    if DEVICE == "cuda":
        fused = Workload(case, DEVICE, dtype, impl="triton")
        found |= measured(
            {"ours 0.05 triton": lambda: fused.ours(0.05)}, fused.leaves, repeats=case.repeats
        )
        found |= measured({"score triton": fused.score}, repeats=case.repeats, backward=False)
        del fused
    found |= measured({"score chunked": chunked.score}, repeats=case.repeats, backward=False)
    for name, row in found.items():
        row["mode"] = name
        if "p50_ms" in row:
            words = name.split()
            counted = floating_point_operations(
                case, None if name == "trl" else 0.0 if words[0] == "score" else float(words[1])
            )
            row["tflops"] = counted / row["p50_ms"] / 1e9
            row["of_matmul_limit"] = row["tflops"] / document["limits"]["matmul_tflops"]
            row["time_of_trl"] = row["p50_ms"] / found["trl"]["p50_ms"]
            row["memory_of_trl"] = row["peak_mib"] / found["trl"]["peak_mib"]
        document["rows"].append(row)
        print(json.dumps(row), flush=True)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
