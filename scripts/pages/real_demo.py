"""The page about `make real`: table, picture, paired differences, three rollouts with their kept tokens.

python -m scripts.pages.real_demo runs/real [runs/real-more] --note "..."

A second folder is that of recipes/studies/smollm2-cpu.yaml: more arms on the same models, seed and problems.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.arguments import Arguments, existing_folder
from taopd.experiments.study.statistics import Estimate, t_estimate
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


def page(run: Path, more: Path | None, note: str) -> str:
    """The page in Markdown."""
    results = json.loads((run / "results.json").read_text())
    environment = json.loads((run / "env.json").read_text())
    commits = [environment["git_commit"][:7]]
    if more is not None:
        _check_same(run, more)
        commits.append(json.loads((more / "env.json").read_text())["git_commit"][:7])
    arms = finished(run) | (finished(more) if more is not None else {})
    shutil.copyfile(run / "accuracy.png", PAGE.with_suffix(".png"))
    steps, seeds = results["question"]["amount"], len(results["seeds"])
    versions = environment["versions"]
    return "\n".join(
        [
            "# SmolLM2-135M on two CPU cores\n",
            f"Written by `python -m scripts.pages.real_demo runs/real{' runs/real-more' if more else ''}` "
            "after `make real`"
            f"{' and `taopd compare recipes/studies/smollm2-cpu.yaml --workers 1`' if more else ''}. "
            "The same models, longer and with three seeds, on a GPU: [smollm2.md](smollm2.md).\n",
            f"{steps} steps of 16 rollouts, {seeds} training seed, greedy accuracy on "
            f"{next(iter(arms.values()))['num_test_prompts']} held-out problems. "
            f"{environment['devices'][0]}; torch {versions['torch']}, transformers "
            f"{versions['transformers']}, TRL {versions['trl']}; commit "
            f"{' and '.join(commits)}. {note}\n",
            f"![Accuracy over steps]({PAGE.with_suffix('.png').name})\n",
            table(arms),
            differences(arms),
            "With one seed these intervals are over problems alone: they do not say what another training "
            "seed would give, which moves an arm by 6 to 8 points.\n",
            "## What was kept\n",
            f"Three rollouts of the last step of {SHOWN.rsplit('-', 1)[0]}; kept tokens in bold.\n",
            *rollouts(run / "arms" / SHOWN),
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


def _check_same(run: Path, more: Path) -> None:
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (run, more))
    names = ("student", "teacher", "prompts", "match", "config", "seeds", "num_test_prompts")
    different = [name for name in names if one[name] != other[name]]
    if different:
        raise SystemExit(f"{run} and {more} differ in {', '.join(different)}: no table of both")


def table(arms: dict[Path, dict[str, Any]]) -> str:
    """A row for each arm and seed: accuracy, kept tokens, cost."""
    rows = [
        "| arm | before, % | after, % | sampled, % | kept, % | train, s | CPU, s a step | memory, MiB |",
        "|---|" + "---:|" * 7,
    ]
    several = len({arm["seed"] for arm in arms.values()}) > 1
    for folder, arm in arms.items():
        name = f"{arm['name']}, seed {arm['seed']}" if several else arm["name"]
        logs = [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
        memory = max(line["perf/peak_memory_mib"] for line in logs)
        cpu = np.median([line["perf/cpu_s"] for line in logs if "perf/cpu_s" in line])
        rows.append(
            f"| {name} | {100 * arm['base_accuracy']:.0f} | {100 * arm['accuracy_greedy']:.0f} | "
            f"{100 * arm['accuracy_sampled']:.0f} | {100 * arm['kept_fraction']:.1f} | "
            f"{arm['train_seconds']:.0f} | {cpu:.0f} | {memory:,.0f} |"
        )
    return "\n".join(rows) + "\n"


def differences(arms: dict[Path, dict[str, Any]]) -> str:
    """A row for each pair of arms."""
    rows = ["| difference, paired by problem | points | 95 % over problems |", "|---|---:|---:|"]
    for (one, other), found in paired(arms).items():
        rows.append(
            f"| {one} - {other} | {found.mean:+.1f} | [{found.low:+.1f}, {found.high:+.1f}] |"
        )
    return "\n".join(rows) + "\n"


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
    lines = read_jsonl(folder / "rollouts.jsonl")
    last = max(line["step"] for line in lines)
    parts = []
    for line in [line for line in lines if line["step"] == last][:3]:
        prompt = line["prompt"].split("user\n")[-1].split("<|im_end|>")[0].strip()
        parts.append(f"> {prompt}\n>\n> {_completion(line)}\n")
    return parts


def _completion(line: dict[str, Any]) -> str:
    shown = []
    for token, kept in zip(line["tokens"], line["kept"], strict=True):
        text = token.replace("Ġ", " ").replace("Ċ", " ").replace("<|im_end|>", "&lt;end&gt;")
        text = text.replace("*", "\\*")
        shown.append(f"**{text.strip()}**" if kept and text.strip() else text)
    # Two kept tokens side by side would close and open the bold text at once.
    return "".join(shown).replace("****", "")


if __name__ == "__main__":
    parser = Arguments(description=__doc__)
    parser.add_argument("run", type=existing_folder)
    parser.add_argument("more", type=existing_folder, nargs="?")
    parser.add_argument("--note", default="", help="a sentence about the run, such as its time")
    options = parser.parse_args()
    write_text(PAGE, page(options.run, options.more, options.note))
    print(PAGE)
