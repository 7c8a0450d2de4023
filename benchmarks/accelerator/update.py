"""Stage 3: one student update of Qwen3-1.7B on 8,192 tokens, exact and through windows, against TRL's.

The modes are those of `benchmarks/bench_sparse.py`; here with the true shape, random weights, bfloat16 and
the width of Qwen3-4B's states for the teacher. No gradient checkpointing.
"""

import json
from dataclasses import asdict

import torch

from benchmarks.accelerator.measure import DEVICE, limits, measured, toy_is_asked
from benchmarks.bench_sparse import Case, Workload, check
from taopd.models.gradient_window import compare_gradients, gradients_of

CASE = Case("qwen3-1.7b", 2048, 28, 16, 4, 128, 1920, 5, vocab=151_936, teacher_hidden=2560)
TOY = Case("toy", 32, 2, 2, 2, 8, 56, 2, vocab=997, teacher_hidden=48)
TOLERANCES = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (2e-2, 5e-2)}
"""Of loss and gradient (1 - cosine, norm ratio - 1), windows against the full forward."""
WINDOWS = ("w0", "w8", "w32")


def main() -> None:
    toy = toy_is_asked(__doc__)
    case = TOY if toy else CASE
    dtype = torch.float32 if toy else torch.bfloat16
    work = Workload(case, DEVICE, dtype)
    document = {"case": asdict(case), "limits": limits(dtype), "rows": []}
    try:
        document["max_error"] = check(work, *TOLERANCES[dtype])
    except SystemExit as error:
        document["check"] = str(error)
        print(error, flush=True)
    modes = {name: call for name, call in work.modes().items() if name[0] != "w" or name in WINDOWS}
    leaves = list(work.model.parameters())
    found = measured(modes, leaves, repeats=case.repeats)
    parameters = sum(p.numel() for p in leaves) - work.vocab * case.hidden
    for name, row in found.items():
        row |= {"mode": name, "gradient_share": work.share(name)}
        if "p50_ms" in row:
            row["time_of_trl"] = row["p50_ms"] / found["trl"]["p50_ms"]
            row["memory_of_trl"] = row["peak_mib"] / found["trl"]["peak_mib"]
        if name == "trl" and "p50_ms" in row:
            # Of the backbone, the head's share left out: 6 per parameter and token, attention not counted.
            counted = 6 * parameters * work.ids.numel()
            row["backbone_tflops"] = counted / row["p50_ms"] / 1e9
        if name in WINDOWS:
            for leaf in leaves:
                leaf.grad = None
            exact = gradients_of(modes["none"](), work.model)
            fidelity = compare_gradients(exact, gradients_of(modes[name](), work.model))
            row |= {"gradient_cosine": fidelity.cosine, "gradient_norm": fidelity.norm_ratio}
        document["rows"].append(row)
        print(json.dumps(row), flush=True)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
