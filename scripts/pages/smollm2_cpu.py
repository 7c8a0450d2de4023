"""The pages about selectors and methods on SmolLM2-135M, 24 steps on two cores; tables other pages share.

    taopd compare recipes/studies/smollm2-cpu.yaml --workers 1
    python -m scripts.pages.smollm2_cpu runs/smollm2-cpu     # adds to docs/results/smollm2-cpu.json
    python -m scripts.pages.smollm2_cpu                      # the page again from that file
    python -m scripts.pages.smollm2_cpu runs/smollm2-methods --study smollm2-methods

Arms that have not finished are left out, and named. What the file holds of other arms and seeds stays in it.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from scripts.arguments import Arguments, existing_folder
from taopd.experiments.study import by_problem
from taopd.experiments.study.file import load_study_file
from taopd.experiments.study.statistics import Estimate, t_estimate
from taopd.report.figures.style import COLORS, plt
from taopd.report.generated_part import markdown_table, write_generated
from taopd.runs.jsonl import read_jsonl, write_text

INTERVALS = (
    "An interval over problems is about these training runs. One over seeds is a t interval of the seeds' "
    "differences: it is about other training runs too."
)
STUDIES = ("smollm2-cpu", "smollm2-methods")
"""In recipes/studies; the page of each has its name."""
PAIRS = (
    ("published-10", "random-10"),
    ("published-10", "full"),
    ("reach-10", "full"),
    ("reach-10", "published-10"),
    ("reach-10", "random-10"),
    ("divergence-10", "published-10"),
    ("tip-10", "published-10"),
    ("entropy-10", "random-10"),
    ("compatible-10", "random-10"),
    ("compatible-10", "published-10"),
    ("reach-5", "full"),
    ("reach-5", "reach-10"),
    ("reach-5", "random-5"),
    ("published-5", "random-5"),
    ("published-5", "published-10"),
    ("anchored-10", "full"),
    ("anchored-10", "published-10"),
    ("raw-c-10", "anchored-10"),
    ("reach-10", "anchored-10"),
)
"""Those whose arms have finished are on the page."""
SHOWN = ("reach-10", "published-10", "entropy-10", "compatible-10")
"""The arms whose rollouts are shown."""
QUESTION = ("config", "match", "num_test_prompts")
"""Settings of a study that all arms on the page share; paths may differ from machine to machine."""
KEPT = (
    *("name", "seed", "base_accuracy", "accuracy_greedy", "accuracy_sampled", "kept_fraction"),
    *("train_seconds", "cpu_s", "peak_memory_mib"),
)


def file_of(study: str) -> Path:
    """Where the settings of a study stand."""
    return Path("recipes/studies") / f"{study}.yaml"


def gathered(
    run: Path,
    saved: Mapping[str, Any] | None,
    more: Callable[[Path, dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """What a page reads of a study's finished arms, added to what was saved before.

    Args:
        more: what the page keeps of an arm beyond `KEPT`, from its folder and its results.

    Raises:
        SystemExit: the study asked something else, or is of other models; names the difference.
    """
    study = json.loads((run / "config.json").read_text())
    question = {name: study[name] for name in QUESTION}
    saved = saved or {"question": question, "arms": []}
    different = [name for name in QUESTION if saved["question"][name] != question[name]]
    if different:
        raise SystemExit(
            f"{run} and the saved file differ in {', '.join(different)}: no table of both"
        )
    made = made_with(run)
    arms = {(arm["name"], arm["seed"]): arm for arm in saved["arms"]}
    starts = {arm["base_accuracy"] for arm in saved["arms"]}
    for folder, arm in finished(run).items():
        if starts and arm["base_accuracy"] not in starts:
            raise SystemExit(
                f"{folder} began at an accuracy of {arm['base_accuracy']}, the saved arms at "
                f"{', '.join(map(str, sorted(starts)))}: they are of other models, and no table has both"
            )
        arms[arm["name"], arm["seed"]] = {name: arm[name] for name in KEPT} | {
            "right_greedy_curve": arm["right_greedy_curve"][-1:],
            "commit": made["commit"],
            **more(folder, arm),
        }
    return {
        "question": question,
        "device": made["device"],
        "versions": made["versions"],
        "arms": list(arms.values()),
    }


def made_with(run: Path) -> dict[str, Any]:
    """Commit, machine and versions of a study's folder."""
    environment = json.loads((run / "env.json").read_text())
    versions = {name: environment["versions"][name] for name in ("torch", "transformers", "trl")}
    return {
        "commit": (environment["git_commit"] or "unknown")[:7],
        "device": environment["devices"][0],
        "versions": versions,
    }


def kept_of(folder: Path, arm: dict[str, Any]) -> dict[str, Any]:
    """Three rollouts of the first seed of the arms that are shown."""
    chosen = arm["name"] in SHOWN and not arm["seed"]
    return {"rollouts": shown(folder, step=-1) if chosen else []}


def described(saved: Mapping[str, Any]) -> str:
    """Steps, problems, machine, versions and commits, as one paragraph."""
    question = saved["question"]
    versions = ", ".join(f"{name} {version}" for name, version in saved["versions"].items())
    commits = ", ".join(dict.fromkeys(arm["commit"] for arm in saved["arms"]))
    return (
        f"{question['config']['max_steps']} steps of {question['config']['per_device_train_batch_size']} "
        f"rollouts, greedy accuracy on {question['num_test_prompts']} held-out problems. "
        f"{saved['device']}; {versions}; commit {commits}."
    )


def page(saved: dict[str, Any], study: str) -> str:
    """What the command writes of the page of a study, in Markdown."""
    arms = {(arm["name"], arm["seed"]): arm for arm in saved["arms"]}
    names = dict.fromkeys(arm["name"] for arm in saved["arms"])
    asked = load_study_file(file_of(study)).arms
    missing = [arm["name"] for arm in asked if arm["name"] not in names]
    blocks = [
        described(saved) + (f" Not run: {', '.join(missing)}." if missing else ""),
        f"![Accuracy at the end by arm and seed]({study}.png)",
        table(arms),
        differences(arms),
        INTERVALS,
        "## What was kept",
        "Three rollouts of the last step. The tokens that an arm selects are bold.",
    ]
    for name in SHOWN:
        if rows := arms.get((name, 0), {}).get("rollouts"):
            blocks += [f"{name}:", *(f"> {prompt}\n>\n> {text}" for prompt, text in rows)]
    return "\n\n".join(block.rstrip("\n") for block in blocks)


def finished(run: Path) -> dict[Path, dict[str, Any]]:
    """Results of the arms of a study that have finished, with their cost, by folder."""
    found = {}
    for path in sorted(run.glob("arms/*/results.json")):
        log = [line for line in read_jsonl(path.parent / "metrics.jsonl") if "loss" in line]
        found[path.parent] = json.loads(path.read_text()) | {
            "cpu_s": float(np.median([line["perf/cpu_s"] for line in log if "perf/cpu_s" in line])),
            "peak_memory_mib": max(line["perf/peak_memory_mib"] for line in log),
        }
    return found


def by_name(arms: Mapping[Any, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The arms of each name, by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in sorted(arms.values(), key=lambda arm: arm["seed"]):
        found.setdefault(arm["name"], []).append(arm)
    return dict(sorted(found.items()))


def table(arms: Mapping[Any, dict[str, Any]]) -> str:
    """A row for each arm: accuracy as a mean and by seed, kept tokens, cost."""
    heads = (
        *("arm", "before, %", "after, %", "by seed", "sampled, %", "kept, %"),
        *("train, s", "CPU, s/step", "MiB"),
    )
    rows = []
    for name, seeds in by_name(arms).items():

        def mean(key: str, seeds: list[Any] = seeds) -> float:
            return float(np.mean([arm[key] for arm in seeds]))

        each = ", ".join(f"{arm['seed']}: {100 * arm['accuracy_greedy']:.0f}" for arm in seeds)
        cells = (
            f"{100 * mean('base_accuracy'):.0f}",
            f"{100 * mean('accuracy_greedy'):.1f}",
            each,
            f"{100 * mean('accuracy_sampled'):.1f}",
            f"{100 * mean('kept_fraction'):.1f}",
            f"{mean('train_seconds'):.0f}",
            f"{mean('cpu_s'):.0f}",
            f"{max(arm['peak_memory_mib'] for arm in seeds):,.0f}",
        )
        rows.append([name, *cells])
    return "\n".join(markdown_table(heads, rows, texts=(0, 3))) + "\n"


def differences(arms: Mapping[Any, dict[str, Any]]) -> str:
    """A row for each pair of arms."""
    heads = (
        *("difference, paired by problem", "seeds", "points"),
        *("95 % over problems", "by seed", "95 % over seeds"),
    )
    rows = []
    for (one, other), found in paired(arms).items():
        ends = {
            name: {arm["seed"]: 100 * arm["accuracy_greedy"] for arm in by_name(arms)[name]}
            for name in (one, other)
        }
        gaps = [ends[one][seed] - ends[other][seed] for seed in ends[one] if seed in ends[other]]
        # Seeds that agree to the problem are not certain to agree: an accuracy moves in steps of 1 / N.
        over = t_estimate(gaps, resolution=100 * math.sqrt(2) / found.n)
        seeds = "" if over.low is None else f"[{over.low:+.1f}, {over.high:+.1f}]"
        each = ", ".join(f"{gap:+.0f}" for gap in gaps)
        rows.append([f"{one} - {other}", str(len(gaps)), *points(found), each, seeds])
    return "\n".join(markdown_table(heads, rows, texts=(0, 3, 4, 5))) + "\n"


def draw(arms: Mapping[Any, dict[str, Any]], axes: Axes) -> None:
    """A dot for every seed and a line at the mean of every arm."""
    groups = by_name(arms)
    order = sorted(groups, key=lambda n: np.mean([a["accuracy_greedy"] for a in groups[n]]))
    before = 100 * groups[order[0]][0]["base_accuracy"]
    axes.axvline(before, color="0.5", linestyle="--", linewidth=0.8)
    axes.text(before, -0.75, " the student before", color="0.35", fontsize=8, va="center")
    for row, name in enumerate(order):
        ends = [100 * arm["accuracy_greedy"] for arm in groups[name]]
        color = COLORS[sorted(groups).index(name) % len(COLORS)]
        axes.plot(ends, [row] * len(ends), "o", color=color, markersize=7, alpha=0.8)
        axes.plot([np.mean(ends)] * 2, [row - 0.3, row + 0.3], color=color, linewidth=2)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-1.1, len(order) - 0.4)
    axes.set_xlim(0, max(10, axes.get_xlim()[1]))
    axes.set_xlabel("greedy accuracy after 24 steps, %; a dot a seed, a line at the mean")
    axes.spines[["top", "right"]].set_visible(False)


def save_picture(studies: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """The saved arms of one or more studies, one below the other, each under its title."""
    by_seed = {
        title: {(arm["name"], arm["seed"]): arm for arm in saved["arms"]}
        for title, saved in studies.items()
    }
    heights = [0.45 * len(by_name(arms)) + 1.2 for arms in by_seed.values()]
    figure, every = plt.subplots(
        len(heights), figsize=(7.2, sum(heights)), height_ratios=heights, squeeze=False
    )
    for (title, arms), axes in zip(by_seed.items(), every[:, 0], strict=True):
        draw(arms, axes)
        axes.set_title(title, fontsize=10, loc="left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def paired(arms: Mapping[Any, dict[str, Any]]) -> dict[tuple[str, str], Estimate]:
    """Difference of greedy accuracy at the end for each pair whose arms share a seed, over problems."""
    groups = {name: {arm["seed"]: arm for arm in group} for name, group in by_name(arms).items()}
    found = {
        (one, other): by_problem.difference(groups.get(one, {}), groups.get(other, {}))
        for one, other in PAIRS
    }
    return {pair: estimate for pair, estimate in found.items() if estimate is not None}


def points(found: Estimate) -> tuple[str, str]:
    """Difference and interval in points; the interval of several problems exists."""
    assert found.low is not None and found.high is not None
    return f"{100 * found.mean:+.1f}", f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


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
    parser.add_argument("run", type=existing_folder, nargs="?", help="folder of the study")
    parser.add_argument("--study", choices=STUDIES, default=STUDIES[0])
    args = parser.parse_args()
    file = Path("docs/results") / f"{args.study}.json"
    document = json.loads(file.read_text()) if file.exists() else None
    if args.run is not None:
        document = gathered(args.run, document, kept_of)
        write_text(file, json.dumps(document) + "\n")
    if document is None:
        raise SystemExit(f"{file} is not there: name the folder of the study")
    save_picture({"": document}, file.with_suffix(".png"))
    write_generated(file.with_suffix(".md"), page(document, args.study))
    print(file.with_suffix(".md"))
