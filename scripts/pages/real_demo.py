"""The page about `make real`: table, picture, paired differences, three rollouts with their kept tokens.

python -m scripts.pages.real_demo runs/real runs/real-more runs/real-seeds

The first folder is that of `make real`. The others hold more arms (recipes/studies/smollm2-cpu.yaml) and more
seeds (recipes/studies/smollm2-seeds.yaml) on the same models and problems.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from scripts.arguments import Arguments, existing_folder
from taopd.experiments.study.statistics import Estimate, t_estimate
from taopd.report.figures.style import COLORS
from taopd.runs.jsonl import read_jsonl, write_text

PAGE = Path("docs/results/smollm2-cpu.md")
PAIRS = (
    ("published-10", "random-10"),
    ("published-10", "full"),
    ("anchored-10", "published-10"),
    ("reach-10", "full"),
    ("reach-10", "published-10"),
    ("divergence-10", "published-10"),
    ("published-5", "random-5"),
    ("published-5", "published-10"),
    ("anchored-5", "published-5"),
)
"""Those whose arms have finished are on the page."""
SHOWN = "published-10-seed0"
"""The arm whose rollouts are shown."""


def page(runs: list[Path], note: str) -> str:
    """The page in Markdown; the picture is written beside it."""
    first = runs[0]
    arms: dict[Path, dict[str, Any]] = {}
    for run in runs:
        check_same(first, run)
        arms |= finished(run)
    results = json.loads((first / "results.json").read_text())
    environments = [json.loads((run / "env.json").read_text()) for run in runs]
    commits = dict.fromkeys(each["git_commit"][:7] for each in environments)
    versions = environments[0]["versions"]
    draw(arms, PAGE.with_suffix(".png"))
    return "\n".join(
        [
            "# SmolLM2-135M on two CPU cores\n",
            f"Written by `python -m scripts.pages.real_demo {' '.join(f'runs/{run.name}' for run in runs)}` "
            "after `make real` and `taopd compare STUDY --workers 1` for the studies `smollm2-cpu.yaml` and "
            "`smollm2-seeds.yaml` in `recipes/studies`. The same models, longer, on a GPU: "
            "[smollm2.md](smollm2.md).\n",
            f"{results['question']['amount']} steps of 16 rollouts, greedy accuracy on "
            f"{next(iter(arms.values()))['num_test_prompts']} held-out problems. "
            f"{environments[0]['devices'][0]}; torch {versions['torch']}, transformers "
            f"{versions['transformers']}, TRL {versions['trl']}; commits {', '.join(commits)}. {note}\n",
            f"![Accuracy at the end by arm and seed]({PAGE.with_suffix('.png').name})\n",
            table(arms),
            differences(arms),
            "An interval over problems holds for these training seeds; one over seeds is a t interval of the "
            "seeds' differences, and with three seeds it is wide.\n",
            "## What was kept\n",
            f"Three rollouts of the last step of {SHOWN.rsplit('-', 1)[0]}; kept tokens in bold.\n",
            *rollouts(first / "arms" / SHOWN),
        ]
    )


def finished(run: Path) -> dict[Path, dict[str, Any]]:
    """Results of the arms of a study that have finished, by folder."""
    return {
        # Arms were named default before they were named by their method.
        folder: json.loads((folder / "results.json").read_text().replace('"default-', '"anchored-'))
        for folder in sorted((run / "arms").iterdir())
        if (folder / "results.json").is_file()
    }


def check_same(one: Path, other: Path) -> None:
    """Refuse folders whose numbers do not belong in one table.

    Raises:
        SystemExit: names the settings in which they differ.
    """
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    names = ("student", "teacher", "prompts", "match", "config", "num_test_prompts")
    different = [name for name in names if configs[0][name] != configs[1][name]]
    if different:
        raise SystemExit(f"{one} and {other} differ in {', '.join(different)}: no table of both")


def by_name(arms: Mapping[Any, dict[str, Any]]) -> dict[str, list[tuple[Any, dict[str, Any]]]]:
    """The arms of each name, by seed."""
    found: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
    for folder, arm in sorted(arms.items(), key=lambda pair: pair[1]["seed"]):
        found.setdefault(arm["name"], []).append((folder, arm))
    return dict(sorted(found.items()))


def table(arms: dict[Path, dict[str, Any]]) -> str:
    """A row for each arm: accuracy as a mean and by seed, kept tokens, cost."""
    rows = [
        "| arm | before, % | after, % | by seed | sampled, % | kept, % | train, s | CPU, s/step | MiB |",
        "|---|---:|---:|---|" + "---:|" * 5,
    ]
    for name, seeds in by_name(arms).items():
        logs = [
            [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
            for folder, _ in seeds
        ]
        memory = max(line["perf/peak_memory_mib"] for own in logs for line in own)
        cpu = np.median(
            [line["perf/cpu_s"] for own in logs for line in own if "perf/cpu_s" in line]
        )

        def mean(key: str, seeds: list[Any] = seeds) -> float:
            return float(np.mean([arm[key] for _, arm in seeds]))

        each = ", ".join(f"{arm['seed']}: {100 * arm['accuracy_greedy']:.0f}" for _, arm in seeds)
        rows.append(
            f"| {name} | {100 * mean('base_accuracy'):.0f} | {100 * mean('accuracy_greedy'):.1f} | {each} | "
            f"{100 * mean('accuracy_sampled'):.1f} | {100 * mean('kept_fraction'):.1f} | "
            f"{mean('train_seconds'):.0f} | {cpu:.0f} | {memory:,.0f} |"
        )
    return "\n".join(rows) + "\n"


def differences(arms: dict[Path, dict[str, Any]]) -> str:
    """A row for each pair of arms."""
    rows = [
        "| difference, paired by problem | seeds | points | 95 % over problems | by seed | 95 % over seeds |",
        "|---|---:|---:|---|---|---|",
    ]
    for (one, other), found in paired(arms).items():
        ends = {
            name: {arm["seed"]: 100 * arm["accuracy_greedy"] for _, arm in by_name(arms)[name]}
            for name in (one, other)
        }
        gaps = [ends[one][seed] - ends[other][seed] for seed in ends[one] if seed in ends[other]]
        over = t_estimate(gaps)
        seeds = "" if over.low is None else f"[{over.low:+.1f}, {over.high:+.1f}]"
        rows.append(
            f"| {one} - {other} | {len(gaps)} | {found.mean:+.1f} | [{found.low:+.1f}, {found.high:+.1f}] | "
            f"{', '.join(f'{gap:+.0f}' for gap in gaps)} | {seeds} |"
        )
    return "\n".join(rows) + "\n"


def draw(arms: dict[Path, dict[str, Any]], path: Path) -> None:
    """A dot for every seed and a line at the mean of every arm."""
    groups = by_name(arms)
    order = sorted(groups, key=lambda n: np.mean([a["accuracy_greedy"] for _, a in groups[n]]))
    figure, axes = plt.subplots(figsize=(7.2, 0.45 * len(order) + 1.2))
    before = 100 * groups[order[0]][0][1]["base_accuracy"]
    axes.axvline(before, color="0.5", linestyle="--", linewidth=0.8)
    axes.text(before, -0.75, " the student before", color="0.35", fontsize=8, va="center")
    for row, name in enumerate(order):
        ends = [100 * arm["accuracy_greedy"] for _, arm in groups[name]]
        color = COLORS[row % len(COLORS)]
        axes.plot(ends, [row] * len(ends), "o", color=color, markersize=7, alpha=0.8)
        axes.plot([np.mean(ends)] * 2, [row - 0.3, row + 0.3], color=color, linewidth=2)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-1.1, len(order) - 0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel("greedy accuracy after 24 steps, %; a dot a seed, a line at the mean")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def paired(arms: Mapping[Any, dict[str, Any]]) -> dict[tuple[str, str], Estimate]:
    """Difference of greedy accuracy at the end for each pair, in points: a problem's, meaned over seeds."""
    right: dict[str, dict[int, NDArray[np.float64]]] = {}
    for arm in arms.values():
        last = arm["right_greedy_curve"][-1][1]
        right.setdefault(arm["name"], {})[arm["seed"]] = np.array([float(c) for c in last])
    found = {}
    for pair in PAIRS:
        # A study may be looked at while its later seeds still run.
        seeds = set.intersection(*(set(right.get(name, {})) for name in pair))
        if seeds:
            one, other = (np.mean([right[name][s] for s in seeds], axis=0) for name in pair)
            found[pair] = t_estimate(list(100.0 * (one - other)))
    return found


def rollouts(folder: Path) -> list[str]:
    """Three rollouts of the last step, kept tokens in bold."""
    return [f"> {prompt}\n>\n> {text}\n" for prompt, text in shown(folder, step=-1)]


def shown(folder: Path, *, step: int) -> list[tuple[str, str]]:
    """Question and completion of three rollouts of a logged step, by its index; kept tokens in bold."""
    lines = read_jsonl(folder / "rollouts.jsonl")
    chosen = sorted({line["step"] for line in lines})[step]
    parts = []
    for line in [line for line in lines if line["step"] == chosen][:3]:
        prompt = line["prompt"].split("user\n")[-1].split("<|im_end|>")[0].strip()
        parts.append((prompt, _completion(line)))
    return parts


def _completion(line: dict[str, Any]) -> str:
    words = []
    for token, kept in zip(line["tokens"], line["kept"], strict=True):
        text = token.replace("Ġ", " ").replace("Ċ", " ").replace("<|im_end|>", "&lt;end&gt;")
        text = text.replace("*", "\\*")
        words.append(f"**{text.strip()}**" if kept and text.strip() else text)
    # Two kept tokens side by side would close and open the bold text at once.
    return "".join(words).replace("****", "")


if __name__ == "__main__":
    parser = Arguments(description=__doc__)
    parser.add_argument("runs", type=existing_folder, nargs="+")
    parser.add_argument("--note", default="", help="a sentence about the run, such as its time")
    options = parser.parse_args()
    write_text(PAGE, page(options.runs, options.note))
    print(PAGE)
