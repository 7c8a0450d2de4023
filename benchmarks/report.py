"""RESULTS.md and its pictures, from the saved JSON files alone: `python -m benchmarks report`."""

import json
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from taopd.report.generated_part import markdown_table

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest saved document of each benchmark; those of the accelerator kit have a page of their own."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    found = [document for document in found if "benchmark" in document]
    return {each["benchmark"]: each for each in sorted(found, key=lambda each: str(each["utc"]))}


def head_loss(document: dict[str, Any], folder: Path) -> str:
    """Tables and picture of bench_head_loss."""
    cases = document["result"]["cases"]
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2))
    parts = []
    for case, color, marker in zip(cases, (BLUE, ORANGE, GREEN), "os^", strict=False):
        shape = case["case"]
        sizes = {"N": shape["num_rows"], "V": shape["vocab_size"], "D": shape["width"]}
        title = (
            f"{shape['name']}: {', '.join(f'{key} = {value:,}' for key, value in sizes.items())}"
        )
        heads = ("mode", "p50 s", "min to max", "of TRL's time", "extra MiB", "of TRL's memory")
        rows = [
            (
                row["mode"],
                f"{row['p50_s']:.2f}",
                f"{row['min_s']:.2f} to {row['max_s']:.2f}",
                f"{row['time_ratio']:.3f}",
                f"{row['peak_mib']:.0f}",
                f"{row['memory_ratio']:.3f}",
            )
            for row in case["rows"]
        ]
        lines = [f"### {title}", "", *markdown_table(heads, rows)]
        for name, reason in case["absent"].items():
            lines.append(f"\n`{name}` was not run: {reason}.")
        parts.append("\n".join(lines))
        ours = [row for row in case["rows"] if row["mode"].startswith("ours")]
        budgets = [100 * float(row["mode"].split()[1]) for row in ours]
        for axes, key in zip(panels, ("time_ratio", "memory_ratio"), strict=True):
            axes.plot(
                budgets, [row[key] for row in ours], color=color, marker=marker, label=shape["name"]
            )
    for axes, words in zip(panels, ("time", "extra memory"), strict=True):
        axes.set(
            xscale="log",
            xlabel="budget, %",
            ylabel=f"{words} over TRL's",
            ylim=(0, None),
        )
        axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    panels[0].legend(frameon=False)
    save(figure, folder / "head_loss.png")
    return "\n\n".join(["![Time and memory against the budget](results/head_loss.png)", *parts])


def sparse(document: dict[str, Any], folder: Path) -> str:
    """Table and picture of bench_sparse."""
    result = document["result"]
    heads = (
        *("mode", "share with gradient", "cosine", "p50 s"),
        *("of full's time", "of full's memory", "of TRL's time"),
    )
    rows = []
    for row in result["rows"]:
        cosine = f"{row['gradient_cosine']:.2f}" if "gradient_cosine" in row else "1 (exact)"
        keys = ("p50_s", "time_ratio", "memory_ratio", "time_of_trl")
        numbers = [f"{row[key]:.2f}" for key in keys]
        rows.append([row["mode"], f"{row['gradient_share']:.2f}", cosine, *numbers])
    figure, axes = plt.subplots(figsize=(4.6, 3.2))
    windows = [row for row in result["rows"] if "gradient_cosine" in row]
    axes.plot(
        [row["time_ratio"] for row in windows],
        [row["gradient_cosine"] for row in windows],
        "o-",
        color=BLUE,
    )
    for row in windows:
        axes.annotate(
            f"W = {row['mode'][1:]}",
            (row["time_ratio"], row["gradient_cosine"]),
            textcoords="offset points",
            xytext=(6, -10),
            size=8,
        )
    exact = next(row for row in result["rows"] if row["mode"] == "none")
    axes.plot(exact["time_ratio"], 1.0, "s", color=ORANGE)
    axes.annotate(
        "exact", (exact["time_ratio"], 1.0), textcoords="offset points", xytext=(6, -10), size=8
    )
    axes.set(
        xlabel="student update over full distillation's",
        ylabel="cosine with the exact gradient",
        ylim=(0, 1.05),
    )
    name = f"{document['benchmark']}.png"
    save(figure, folder / name)
    case = result["case"]
    shape = f"{case['prompt']} + {case['completion']} tokens, {case['layers']} layers of {case['hidden']}"
    table = markdown_table(heads, rows)
    return "\n".join(
        [f"{shape}; random weights.", "", *table, "", f"![Cosine against cost](results/{name})"]
    )


def window_lab(document: dict[str, Any], folder: Path) -> str:
    """Accuracy against seconds in the tiny lab."""
    rows = document["result"]["rows"]
    figure, axes = plt.subplots(figsize=(5.4, 3.4))
    heads = ("window", "ms a step", "greedy at the end", "sampled at the end")
    cells = []
    for row, color, style in zip(
        rows, (GREY, BLUE, ORANGE, GREEN), ("-", "--", "-.", ":"), strict=True
    ):
        seconds = [mean(values) for values in zip(*row["seconds"], strict=True)]
        accuracy = [100 * mean(values) for values in zip(*row["sampled"], strict=True)]
        axes.plot(
            seconds, accuracy, style, color=color, marker=".", label=f"window {row['window']}"
        )
        pace = median(1000 * run[-1] / row["steps"][-1] for run in row["seconds"])
        ends = [
            f"{100 * mean(run[-1] for run in row[name]):.1f} "
            f"[{100 * min(run[-1] for run in row[name]):.0f}, {100 * max(run[-1] for run in row[name]):.0f}]"
            for name in ("greedy", "sampled")
        ]
        cells.append([str(row["window"]), f"{pace:.0f}", *ends])
    axes.set(xlabel="seconds of training", ylabel="sampled accuracy, %")
    axes.legend(frameon=False)
    save(figure, folder / "window_lab.png")
    picture = "![Accuracy against seconds](results/window_lab.png)"
    return "\n".join([*markdown_table(heads, cells), "", picture])


def teacher(document: dict[str, Any], folder: Path) -> str:
    """Table of bench_teacher."""
    result = document["result"]
    rows = [(row["call"], f"{row['p50_s']:.2f}") for row in result["rows"]]
    ratios = (
        f"score over raw: {result['score_over_raw']:.2f}. step over student + score: "
        f"{result['step_over_sum']:.2f}."
    )
    return "\n".join(markdown_table(("call", "p50 s"), rows)) + f"\n\n{ratios}"


def anchor(document: dict[str, Any], folder: Path) -> str:
    """Table of bench_anchor."""
    kinds = {"reach": "reach, s", "remembered": "reach on a quarter, s"}
    heads = ["update", "published, s", "anchored, s", "ratio"]
    keys = ["published_s", "anchored_s", "ratio"]
    for kind, head in kinds.items():
        heads += [head, "ratio"]
        keys += [f"{kind}_s", f"{kind}_ratio"]
    rows = []
    for row in document["result"]["rows"]:
        values = [row.get(key) for key in keys]
        rows.append([row["update"], *("" if v is None else f"{v:.2f}" for v in values)])
    return "\n".join(markdown_table(heads, rows))


def real(document: dict[str, Any], folder: Path) -> str:
    """Table of bench_real."""
    result = document["result"]
    heads = (
        *("arm", "sample s", "score s", "select s", "update s", "step s"),
        *("update, of TRL's", "step, of TRL's", "update, of TRL's in autocast", "step, of that"),
        "peak MiB",
    )
    rows = []
    for row in result["rows"]:
        stages = (f"{row[f'{s}_s']:.2f}" for s in ("sample", "score", "select", "update", "step"))
        peers = [(stage, peer) for peer in ("trl", "autocast") for stage in ("update", "step")]
        ratios = (f"{row[f'{stage}_of_{peer}']:.2f}" for stage, peer in peers)
        rows.append([row["arm"], *stages, *ratios, f"{row['peak_mib']:.0f}"])
    cosine = next(r["cosine_with_exact"] for r in result["rows"] if "cosine_with_exact" in r)
    start = result["start_up"]
    words = (
        f"SmolLM2-135M, {result['rollouts']} rollouts of at most {result['max_new_tokens']} tokens "
        f"({result['completion_tokens']} in all), {result['dtype']}, {result['threads']} threads; medians of "
        f"{result['repeats']} steps, arms taking turns, in seconds of each arm's own process. update: a step "
        "without sampling and optimizer. TRL's trainer with `bf16=True` runs both backbones in float32: its "
        "call goes past the wrapper that holds the autocast. The second arm puts it inside. The gradient of "
        "all tokens differs from TRL's by "
        f"{result['gradient_error']:.1e} (cosine {result['gradient_cosine']:.4f}), the second "
        f"arm's by {result['autocast_error']:.1e} ({result['autocast_cosine']:.4f}); window 8 has a cosine "
        f"of {cosine:.2f} with the exact gradient at 5 %."
    )
    started = (
        f"`taopd train` writes its first line {start['first_line_s']:.1f} s after the command and ends "
        f"step 1 after {start['step_1_s']:.1f} s ({start['first_line_cpu_s']:.1f} s and "
        f"{start['step_1_cpu_s']:.1f} s of its process)."
    )
    return "\n".join([words, "", *markdown_table(heads, rows), "", started])


SECTIONS = {
    "real": ("A real language model: SmolLM2-135M against TRL", real),
    "teacher": ("A teacher behind a server against the server's own time", teacher),
    "anchor": ("Student update: anchors and reach against the published method", anchor),
    "head_loss": ("Heads: score, loss and backward at a budget", head_loss),
    "sparse": ("Student update: exact and through a gradient window", sparse),
    "sparse_long": ("The same at 8,192 tokens", sparse),
    "rooms": ("Before and after the move into rooms", None),
    "plan": ("`taopd plan` against measured steps", None),
    "window_lab": ("Gradient windows in the tiny lab: accuracy against seconds", window_lab),
}


def save(figure: Any, path: Path) -> None:
    """Write a picture and close it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def write_results(results: Path, folder: Path) -> None:
    """Write RESULTS.md next to the results."""
    documents = load(results)
    parts = [
        "# Benchmarks",
        "Written by `python -m benchmarks report` from `results/`. Each benchmark checks first that results "
        "agree, then measures in one run, alternating. Ratios carry over to other machines, times do not.",
    ]
    for name in [*SECTIONS, *sorted(set(documents) - set(SECTIONS))]:
        if name not in documents:
            continue
        document = documents[name]
        title, body = SECTIONS.get(name, (name, None))
        about = ", ".join(
            [f"`{document['command']}`", *(document[k] for k in ("commit", "machine", "utc"))]
        )
        parts += [f"## {title}", about]
        text = (
            body(document, results)
            if body
            else "\n".join(f"    {line}" for line in document.get("table", []))
        )
        parts.append(text or f"Numbers: [{name}](results/).")
    (folder / "RESULTS.md").write_text("\n\n".join(parts) + "\n")
    print(folder / "RESULTS.md")
