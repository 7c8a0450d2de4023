"""Pages from the kit's saved results: `python -m benchmarks.accelerator.page`.

Writes `docs/results/accelerator.md` (kernels, head, update) here, `docs/results/smollm2.md` and its picture
in `pair_page`.
"""

from pathlib import Path
from typing import Any

from benchmarks.accelerator.pair_page import write_pair
from benchmarks.accelerator.saved import about, load, table
from scripts.arguments import Arguments

RESULTS = Path(__file__).parents[1] / "results"
PAGES = Path(__file__).parents[2] / "docs" / "results"
SCORING = (
    *("implementation", "dtype", "p50 ms", "extra MiB"),
    *("of a matmul's speed", "largest error, nats"),
)
"""Heads of the table of stage `kernels`."""


def times(document: dict[str, Any]) -> str:
    """Modes of the head or update stage."""
    rows = []
    for row in document["result"]["rows"]:
        cosine = row.get("gradient_cosine")
        cells = [
            row["mode"],
            f"{row['p50_ms']:.1f}",
            f"{row['min_ms']:.1f} to {row['max_ms']:.1f}",
            f"{row['time_of_trl']:.2f}",
            f"{row['peak_mib']:,.0f}",
            f"{row['memory_of_trl']:.2f}",
            "" if cosine is None else f"{cosine:.2f}",
        ]
        rows.append(cells)
    heads = (
        "mode",
        "p50 ms",
        "min to max",
        "of TRL's time",
        "extra MiB",
        "of TRL's memory",
        "cosine",
    )
    return table(heads, rows)


def write_speed(results: Path, page: Path) -> None:
    """`accelerator.md`."""
    kernels, head, update = (load(stage, results) for stage in ("kernels", "head", "update"))
    heads, updates = (
        {row["mode"]: row for row in stage["result"]["rows"]} for stage in (head, update)
    )
    tests = kernels["result"]["tests"]
    rows = [
        (
            row["impl"],
            row["dtype"],
            f"{row['p50_ms']:.1f}",
            f"{row['peak_mib']:,.0f}",
            f"{100 * row['of_matmul_limit']:.0f} %",
            f"{max(row['max_error'].values()):.1e}",
        )
        for row in kernels["result"]["rows"]
    ]
    errors = head["result"]["errors"]
    page.write_text(
        "\n\n".join(
            [
                "# On a GPU",
                "Does training on 5 % of the tokens save time on a GPU? Hardly, because every token has to "
                "be scored first. The shapes are those of Qwen3-1.7B with the teacher Qwen3-4B.",
                "- **Output heads.** Scoring all positions with both models, and the loss at 5 % of them, "
                f"takes {heads['ours 0.05']['time_of_trl']:.2f} of the time of TRL's loss at all positions. "
                "Scoring is most of it.\n"
                f"- **Exact update.** At 5 % it takes {updates['none']['time_of_trl']:.2f} of TRL's time, "
                f"{updates['one']['time_of_trl']:.2f} with the scoring, and "
                f"{updates['two']['time_of_trl']:.2f} with it in two micro-batches.\n"
                "- **Gradient windows** save memory, and **no time**. With windows 0 and 8 an update takes "
                f"{updates['w0']['memory_of_trl']:.2f} and {updates['w8']['memory_of_trl']:.2f} of TRL's "
                "memory. At these sizes the two passes cost more than the backward they replace.",
                "Written by `python -m benchmarks.accelerator.page` from `benchmarks/results/`. In the "
                "tables p50 is the median. Extra MiB is the peak memory of a call above what was in use "
                "before it. The cosine is that of the gradient with the exact one.",
                "## Scoring all positions with one model",
                "8,192 positions, hidden states of width 2,048, a vocabulary of 151,936, top 16.",
                about(kernels)
                + f" Before it the tests marked `gpu` were run: {len(tests['failed'])} failed, exit status "
                f"{tests['status']}.",
                table(SCORING, rows),
                "The speed is a share of that of a plain matrix product of the same data type. The error is "
                "the largest one of log-probs, log-sum-exp and entropy against float64.",
                "## Output heads: scoring, loss and backward",
                about(head),
                times(head),
                "`trl` is TRL's loss at all positions. `ours 0.05` scores all positions and has the loss at "
                "5 % of them. `score` only scores. `triton` and `chunked` name the kernel that scores. "
                "Without a name taopd chooses it.",
                "Relative errors against float64, with all positions: the loss "
                f"{errors['ours_loss']:.0e}, the gradient {errors['ours_gradient']:.1e}; TRL's "
                f"{errors['trl_loss']:.0e} and {errors['trl_gradient']:.1e}.",
                "## One update of the student on 4 x 2,048 tokens",
                about(update),
                times(update),
                "`trl` is TRL's loss on all tokens, `full` ours on all tokens. The others train 5 % of the "
                "tokens. `none` does not score. `one` and `two` do, in one micro-batch and in two. `w0`, "
                "`w8` and `w32` have gradient windows of 0, 8 and 32 tokens. The weights are random, so a "
                "trained model has other cosines.",
            ]
        )
        + "\n"
    )


def main() -> None:
    """Write all pages."""
    PAGES.mkdir(parents=True, exist_ok=True)
    for write, name in ((write_speed, "accelerator.md"), (write_pair, "smollm2.md")):
        write(RESULTS, PAGES / name)
        print(PAGES / name)


if __name__ == "__main__":
    Arguments(description=__doc__).parse_args()
    main()
