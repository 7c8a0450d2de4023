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
                "Written by `python -m benchmarks.accelerator.page` from `benchmarks/results/`.",
                "At the shapes of Qwen3-1.7B <- Qwen3-4B the loss of the heads follows the budget only "
                "after every position was scored, and scoring is most of it: at 5 % score and loss take "
                f"{heads['ours 0.05']['time_of_trl']:.2f} of the time of TRL's loss on everything. An exact "
                f"update at 5 % takes {updates['none']['time_of_trl']:.2f} of TRL's, and "
                f"{updates['one']['time_of_trl']:.2f} with the scoring. Gradient windows save memory "
                f"({updates['w0']['memory_of_trl']:.2f} and {updates['w8']['memory_of_trl']:.2f} of TRL's at "
                "windows 0 and 8) and **no time** here: at these sizes the two passes cost more than the "
                "backward they replace.",
                "## Scoring one model: V = 151,936, width 2,048, 8,192 positions, K = 16",
                about(kernels)
                + f" The tests marked `gpu` before it: {len(tests['failed'])} failed, exit status "
                f"{tests['status']}.",
                table(SCORING, rows),
                "The error is against float64, over log-probs, log-sum-exp and entropy.",
                "## Heads: score, loss, backward",
                about(head),
                times(head),
                f"Relative error of loss and gradient against float64: ours {errors['ours_loss']:.0e} and "
                f"{errors['ours_gradient']:.1e}, TRL's {errors['trl_loss']:.0e} and "
                f"{errors['trl_gradient']:.1e}.",
                "## Student update, 4 x 2,048 tokens",
                about(update),
                times(update),
                "`trl`: TRL's loss on all tokens; `full`: ours on all; the others train 5 %. `none`: without "
                "scoring; `one` and `two`: with it, one micro-batch and two; `w0`, `w8`, `w32`: gradient "
                "windows. Random weights: the cosines are not those of a trained model.",
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
