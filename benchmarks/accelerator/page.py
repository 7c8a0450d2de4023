"""Pages from the kit's saved results: `python -m benchmarks.accelerator.page`.

Writes `docs/results/accelerator.md` (kernels, head, update), `docs/results/smollm2.md` and its picture.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from scripts.arguments import Arguments
from taopd.experiments.study.statistics import t_estimate

RESULTS = Path(__file__).parents[1] / "results"
PAGES = Path(__file__).parents[2] / "docs" / "results"
COLORS = {
    "full": "#777777",
    "published": "#0072B2",
    "anchored": "#009E73",
    "reach": "#CC79A7",
    "random": "#D55E00",
}
PAIRS = (("published-10", "random-10"), ("published-10", "full"), ("anchored-10", "published-10"))
Z95 = 1.96


def load(stage: str, results: Path) -> dict[str, Any]:
    """The newest saved document of a stage, of a GPU."""
    paths = [p for p in results.glob(f"accelerator-{stage}__*.json") if "cpu" not in p.name]
    newest = max(paths, key=lambda p: json.loads(p.read_text())["utc"])
    # Arms were named default-10 before they were named by their method.
    return json.loads(newest.read_text().replace('"default-10"', '"anchored-10"'))


def about(document: dict[str, Any]) -> str:
    """Command, commit, machine and time of a result, and its note."""
    note = f" {document['note']}" if "note" in document else ""
    return (
        f"`{document['command']}`, commit {document['commit']}, {document['machine']}, "
        f"{document['utc']}.{note}"
    )


def table(header: str, rows: list[str]) -> str:
    """A markdown table; numbers to the right."""
    columns = header.count("|") + 1
    return "\n".join(
        [f"| {header} |", "|---|" + "---:|" * (columns - 1), *(f"| {r} |" for r in rows)]
    )


def times(document: dict[str, Any]) -> str:
    """Modes of the head or update stage, before and after what was changed for this card."""
    before = {row["mode"]: row["p50_ms"] for row in document.get("before", {}).get("rows", [])}
    rows = []
    for row in document["result"]["rows"]:
        cosine, old = row.get("gradient_cosine"), before.get(row["mode"])
        cells = [
            row["mode"],
            f"{row['p50_ms']:.1f}",
            f"{row['min_ms']:.1f} to {row['max_ms']:.1f}",
            f"{row['time_of_trl']:.2f}",
            f"{row['peak_mib']:,.0f}",
            f"{row['memory_of_trl']:.2f}",
            "" if cosine is None else f"{cosine:.2f}",
            "" if old is None else f"{old:.1f}",
        ]
        rows.append(" | ".join(cells))
    header = (
        "mode | p50 ms | min to max | of TRL's time | extra MiB | of TRL's memory | cosine | before"
    )
    return table(header, rows)


def write_speed(results: Path, page: Path) -> None:
    """`accelerator.md`."""
    kernels, head, update = (load(stage, results) for stage in ("kernels", "head", "update"))
    rows = [
        f"{row['impl']} | {row['dtype']} | {row['p50_ms']:.1f} | {row['peak_mib']:,.0f} | "
        f"{100 * row['of_matmul_limit']:.0f} % | {max(row['max_error'].values()):.1e}"
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
                "0.76 of the time of TRL's loss on everything. An exact update at 5 % takes 0.84 of TRL's; "
                "with the scoring it is level with it. Gradient windows save memory (0.18 to 0.39 of TRL's "
                "at windows 0 and 8) and **no time** here: at these sizes the two passes cost more than the "
                "backward they replace.",
                "## Scoring one model: V = 151,936, width 2,048, 8,192 positions, K = 16",
                about(kernels),
                table(
                    "implementation | dtype | p50 ms | extra MiB | of a matmul's speed | largest error, nats",
                    rows,
                ),
                "The error is against float64, over log-probs, log-sum-exp and entropy.",
                "## Heads: score, loss, backward",
                about(head),
                times(head),
                f"Relative error of loss and gradient against float64: ours {errors['ours_loss']:.0e} and "
                f"{errors['ours_gradient']:.1e}, TRL's {errors['trl_loss']:.0e} and "
                f"{errors['trl_gradient']:.1e}. `before` is commit {head['before']['commit']}: "
                f"{head['before']['note']}.",
                "## Student update, 4 x 2,048 tokens",
                about(update),
                times(update),
                "`one` and `two` include scoring and selection. Random weights: the cosines are not those of "
                "a trained model. `before` as above.",
            ]
        )
        + "\n"
    )


def right(rows: list[dict[str, Any]], step: int) -> np.ndarray:
    """[seed, problem] of 0 and 1 at a step, seeds ascending."""
    rows = sorted(rows, key=lambda row: row["seed"])
    return np.array([[int(c) for c in dict(row["right_greedy_curve"])[step]] for row in rows])


def difference(a: np.ndarray, b: np.ndarray) -> str:
    """Points, interval over problems (their mean over seeds), and interval over training seeds."""
    per_problem = 100 * (a.mean(0) - b.mean(0))
    half = Z95 * stdev(per_problem) / math.sqrt(len(per_problem))
    seeds = 100 * (a.mean(1) - b.mean(1))
    over = t_estimate(list(seeds))
    return (
        f"{per_problem.mean():+.1f} | ± {half:.1f} | [{over.low:+.1f}, {over.high:+.1f}] | "
        f"{', '.join(f'{s:+.1f}' for s in seeds)}"
    )


def write_pair(results: Path, page: Path) -> None:
    """`smollm2.md` and its picture."""
    document = load("pairs", results)
    result = document["result"]
    by_name = defaultdict(list)
    for row in result["studies"]["pair1-core"]:
        by_name[row["name"]].append(row)
    steps = [step for step, _ in next(iter(by_name.values()))[0]["accuracy_curve"]]
    rows = []
    for name, group in by_name.items():
        curves = [[100 * dict(map(tuple, r["accuracy_curve"]))[s] for r in group] for s in steps]
        end = ", ".join(f"{value:.0f}" for value in curves[-1])
        sampled = 100 * mean(r["accuracy_sampled"] for r in group)
        rows.append(
            f"{name} | {' | '.join(f'{mean(c):.1f}' for c in curves)} | {end} | {sampled:.1f}"
        )
    teacher = result["teacher"]
    last = {name: right(group, steps[-1]) for name, group in by_name.items()}
    differences = [f"{a} - {b} | {difference(last[a], last[b])}" for a, b in PAIRS]
    stopped = result["stopped"]["pair2-core"]
    lengths = []
    groups = defaultdict(list)
    for arm in stopped["arms"]:
        groups[arm["name"]].append(arm)
    for name, group in groups.items():
        ends = []
        for key in ("completions/clipped_ratio", "signal/compatibility/mean", "entropy"):
            for at in (slice(0, 5), slice(45, 50)):
                ends.append(mean(mean(arm["curve"][key][at]) for arm in group))
        lengths.append(
            f"{name} | {100 * ends[0]:.0f} % | {100 * ends[1]:.0f} % | {ends[2]:.2f} | {ends[3]:.2f} | "
            f"{ends[4]:.2f} | {ends[5]:.2f}"
        )
    draw(by_name, groups, steps, 100 * teacher["accuracy"], page.with_suffix(".png"))
    heads = " | ".join(f"step {s}, %" for s in steps)
    page.write_text(
        "\n\n".join(
            [
                "# SmolLM2-135M",
                "Written by `python -m benchmarks.accelerator.page` from "
                "`benchmarks/results/accelerator-pairs__nvidia-h200.json`.",
                "**Where the method loses.** On the first pair a tenth of the tokens, chosen by "
                "teachability, teaches much more than a random tenth and less than all of them. On the "
                "second pair, whose student does not know the form of an answer, the published selector "
                "is the worst arm: it never learns to end a text, which a random tenth of the tokens does.",
                "![Accuracy on pair 1, truncated texts on pair 2](smollm2.png)",
                "## The models",
                "Teacher: SmolLM2-135M-Instruct after 41 steps of SFT on two-step word problems. Student of "
                "pair 1: the same run after 8 steps. Student of pair 2: the untouched instruct model. 16 "
                "rollouts a step, learning rate 5e-5 constant, bfloat16 autocast, at most 48 tokens, exact "
                "reverse KL; greedy accuracy on 300 held-out problems. The pair is made by "
                "`taopd.experiments.smollm2` on the machine that runs it; another machine rounds otherwise "
                "and makes another pair.",
                about(document),
                "## Pair 1: a student that knows the form",
                f"Teacher: {100 * teacher['accuracy']:.1f} % ± {196 * teacher['standard_error']:.1f}. Means "
                "over three training seeds.",
                table(f"arm | {heads} | seeds at the end | sampled, end", rows),
                "Paired differences at the end, points: the interval over problems takes the mean over seeds "
                "of each problem; that over seeds is Student's t with three.",
                table(
                    "difference | points | 95 % over problems | 95 % over seeds | by seed",
                    differences,
                ),
                "What holds: teachability against random, in every seed and by both intervals. What does "
                "not: that it replaces full distillation at these 60 steps. Default and published "
                "cannot be told apart.",
                "## Pair 2: a student that does not know the form",
                f"Not finished: {stopped['note']}. No arm answers a problem right after 40 steps. What can "
                "be seen is whether the student learns to end its text: share of rollouts cut at 48 tokens, "
                "mean C and the student's entropy (nats), steps 1 to 5 and 46 to 50, means of three seeds.",
                table(
                    "arm | cut, begin | cut, end | C, begin | C, end | entropy, begin | entropy, end",
                    lengths,
                ),
                "## Not run yet",
                "Budgets of 5 %, the other selectors, several learning rates, 200 steps, and pair 2 to its "
                "end. The fixed-context diagnostic on these pairs: [smollm2-diagnostic.md]"
                "(smollm2-diagnostic.md).",
            ]
        )
        + "\n"
    )


def draw(by_name: Any, groups: Any, steps: list[int], teacher: float, path: Path) -> None:
    """Accuracy against steps on pair 1, share of cut rollouts on pair 2; a line a seed."""
    figure, (left, other) = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, rows in by_name.items():
        color = COLORS[name.split("-")[0]]
        for index, row in enumerate(rows):
            points = dict(map(tuple, row["accuracy_curve"]))
            left.plot(
                steps,
                [100 * points[s] for s in steps],
                color=color,
                alpha=0.8,
                label=name if index == 0 else None,
            )
    left.axhline(teacher, color="black", linewidth=0.8, linestyle=":", label="teacher")
    left.set(title="Pair 1", xlabel="step", ylabel="greedy accuracy, %", ylim=(0, None))
    figure.legend(loc="lower center", ncol=5, frameon=False, fontsize=8)
    for name, arms in groups.items():
        length = min(len(arm["curve"]["completions/clipped_ratio"]) for arm in arms)
        share = np.array([arm["curve"]["completions/clipped_ratio"][:length] for arm in arms])
        smooth = np.apply_along_axis(
            lambda row: np.convolve(row, np.ones(5) / 5, mode="valid"), 1, 100 * share
        )
        for row in smooth:
            other.plot(
                range(5, length + 1), row, color=COLORS[name.split("-")[0]], alpha=0.8, linewidth=1
            )
    other.set(title="Pair 2", xlabel="step", ylabel="rollouts cut at 48 tokens, %", ylim=(0, 102))
    for axes in (left, other):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main() -> None:
    """Write all pages."""
    PAGES.mkdir(parents=True, exist_ok=True)
    for write, name in ((write_speed, "accelerator.md"), (write_pair, "smollm2.md")):
        write(RESULTS, PAGES / name)
        print(PAGES / name)


if __name__ == "__main__":
    Arguments(description=__doc__).parse_args()
    main()
