"""The page about long runs and its pictures, from docs/results/collapse.json alone.

    python -m scripts.pages.collapse docs/results/collapse.json

    collapsed   some checkpoint lies more than 20 points below the run's best so far, even if it comes back
    lost        the last checkpoint does
    fall        the first checkpoint of that descent that lies more than 5 points below the best so far
    stable      no checkpoint more than 5 points below the best so far
    trained     share of the tokens with a gradient: the budget, and for anchored arms 5 % of the rest

Runs between collapsed and stable are counted as neither. Warnings are those of the guard's rules, looked at
every 5 steps; accuracy every 20.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from scripts.arguments import Arguments, existing_file
from scripts.pages import collapse_pictures
from taopd.report.figures.leaderboard import LOSS_NAMES
from taopd.report.generated_part import markdown_table, write_generated

COLLAPSE, FALL = 20.0, 5.0
"""Points below the best so far."""
ANCHOR_FRACTION = 0.05
ORDER = ("dialect", "termination", "bilingual", "fallible", "reversal")

GUARD_WORDS = (
    "`collapse_guard` watches *idle drift*: KL(student || initial student) at unselected tokens. It "
    "counts drift only where the overlap with the teacher has not grown by 0.05. The limit is 0.1 nats, "
    "smoothed over looks that are 5 steps apart. The guard also watches entropy and length, with wide "
    "bounds; they were never the first sign of a collapse. It looks at what a collapse begins with, not "
    "at accuracy. In these runs drift alone was one sign, and the C of the selected tokens another. "
    "Today drift counts only in a student that is less sure than it was ([guard.md](guard.md)). Both "
    "losses, all seeds and both budgets together:"
)

Part = dict[str, Any]
Run = tuple[str, int | None, int | None]
"""State, step of the fall, step of the first warning."""


def parts_of(document: dict[str, Any], part: str) -> list[Part]:
    """One part a variant, in the order of the page; jobs of one variant are joined."""
    found: dict[str, Part] = {}
    for row in document["parts"]:
        if row["part"] == part:
            joined = found.setdefault(row["variant"], row | {"arms": {}})
            joined["arms"] |= row["arms"]
    return [found[variant] for variant in ORDER if variant in found]


def trained_share(name: str, arm: dict[str, Any]) -> float:
    """Share of the tokens that get a gradient."""
    if name == "full":
        return 1.0
    budget = float(arm["budget"])
    return budget + (ANCHOR_FRACTION * (1 - budget) if name.startswith("anchor") else 0.0)


def fell_at(steps: list[int], accuracies: list[float]) -> tuple[str, int | None]:
    """(collapsed, fell or stable; step of the fall)."""
    values = 100 * np.asarray(accuracies)
    below = np.maximum.accumulate(values) - values
    if not (below > FALL).any():
        return "stable", None
    if not (below > COLLAPSE).any():
        return "fell", None
    first = int(np.argmax(below > COLLAPSE))
    fine = np.flatnonzero(below[: first + 1] <= FALL)
    return "collapsed", steps[int(fine[-1]) + 1]


def _points(values: list[float], digits: int = 0) -> str:
    low, high = 100 * min(values), 100 * max(values)
    mean = f"{100 * sum(values) / len(values):.{digits}f}"
    return mean if round(low) == round(high) else f"{mean} [{low:.0f}, {high:.0f}]"


def _best(part: Part, names: list[str]) -> tuple[float, str, int]:
    """Highest mean over seeds at any checkpoint of these arms: (accuracy, arm, step)."""
    found = []
    for name in names:
        means = np.mean(part["arms"][name]["greedy"], axis=0)
        at = int(means.argmax())
        found.append((float(means[at]), name, part["steps"][at]))
    return max(found, key=lambda entry: entry[0])


def curves_table(part: Part) -> str:
    """Accuracy at 100 and at the end, and the deepest fall, of every arm."""
    steps = part["steps"]
    at_100 = steps.index(100)
    heads = (
        *("arm", "trained", "at 100", "its best"),
        *(f"at {steps[-1]:,}", f"sampled at {steps[-1]:,}", "deepest fall", "collapsed"),
    )
    rows = []
    for name, arm in part["arms"].items():
        greedy = np.asarray(arm["greedy"])
        below = 100 * (np.maximum.accumulate(greedy, axis=1) - greedy).max()
        ends = [row[-1] for row in arm["greedy"]]
        state = [fell_at(steps, row)[0] for row in arm["greedy"]]
        best, _, step = _best(part, [name])
        cells = [
            name.replace("@0.1", ", 10 %").replace("@0.05", ", 5 %"),
            f"{100 * trained_share(name, arm):.0f} %",
            _points([row[at_100] for row in arm["greedy"]]),
            f"{100 * best:.0f} ({step})",
            _points(ends),
            _points([row[-1] for row in arm["sampled"]]),
            f"{below:.0f}",
            f"{state.count('collapsed')} of {len(state)}",
        ]
        rows.append(cells)
    return "\n".join(markdown_table(heads, rows))


def targets_table(parts: list[Part]) -> str:
    """The default against its own best and against the best of full and C-only, variant by variant."""
    heads = (
        *("variant", "budget", "default's end", "below own best"),
        *("best of full, C-only", "difference", "holds"),
    )
    rows = []
    for part in parts:
        for budget in ("0.1", "0.05"):
            arm = part["arms"][f"anchored@{budget}"]
            end = 100 * float(np.mean([row[-1] for row in arm["greedy"]]))
            own = 100 * _best(part, [f"anchored@{budget}"])[0]
            rival, name, step = _best(part, ["full", f"C-only@{budget}"])
            gap = end - 100 * rival
            lost = sum(100 * (max(row) - row[-1]) > COLLAPSE for row in arm["greedy"])
            holds = own - end <= 3 and gap >= 0 and lost == 0
            words = "yes" if holds else (f"no: {lost} seeds lost" if lost else "no: below the best")
            best = f"{100 * rival:.1f} ({name.split('@')[0]}, step {step})"
            share = f"{100 * float(budget):.0f} %"
            ends = (f"{end:.1f}", f"{own - end:.1f}", best, f"{gap:+.1f}")
            rows.append([part["variant"], share, *ends, words])
    return "\n".join(markdown_table(heads, rows, texts=(0, 6)))


def guard_table(parts: list[Part]) -> str:
    """When the guard's rules warned, against the fall of the greedy accuracy."""
    heads = (
        *("variant", "arm", "collapsed", "warned before the fall", "later", "never"),
        *("stable", "of these warned"),
    )
    rows: dict[tuple[str, str], list[Run]] = {}
    for part in parts:
        for name, arm in part["arms"].items():
            runs = [
                (*fell_at(part["steps"], curve), min(warned.values(), default=None))
                for curve, warned in zip(arm["greedy"], arm["warned"], strict=True)
            ]
            rows.setdefault((part["variant"], name.split("@")[0]), []).extend(runs)
    rows["all", ""] = [run for runs in rows.values() for run in runs]
    cells = [[variant, name, *_warnings(runs)] for (variant, name), runs in rows.items()]
    return "\n".join(markdown_table(heads, cells, texts=(0, 1, 3)))


def _warnings(runs: list[Run]) -> list[str]:
    leads = [(fall, first) for state, fall, first in runs if state == "collapsed"]
    early = [fall - first for fall, first in leads if fall and first is not None and first < fall]
    never = sum(first is None for _, first in leads)
    stable = [first for state, _, first in runs if state == "stable"]
    lead = f", {min(early)} to {max(early)} steps" if early else ""
    return [
        str(len(leads)),
        f"{len(early)}{lead}",
        str(len(leads) - len(early) - never),
        str(never),
        str(len(stable)),
        str(sum(first is not None for first in stable)),
    ]


def causes_table(parts: list[Part]) -> str:
    """Every single change: accuracy at the end, drift and norm of the updates over the second half."""
    heads = ("change", *(part["variant"] for part in parts), "drift, nats", "step norm")
    rows = []
    for name in parts[0]["arms"]:
        cells = [_points([row[-1] for row in part["arms"][name]["greedy"]]) for part in parts]
        traces = [part["arms"][name]["trace"] for part in parts]
        for column in ("drift", "update_norm"):
            halves = [trace[column][len(trace[column]) // 2 :] for trace in traces]
            cells.append(
                " / ".join(f"{np.mean([x for x in half if x is not None]):.2g}" for half in halves)
            )
        rows.append([name, *cells])
    return "\n".join(markdown_table(heads, rows))


def generated(document: dict[str, Any]) -> str:
    """Tables and pictures, in the order of the page."""
    main, causes, sampled = (parts_of(document, part) for part in ("main", "causes", "sampled"))
    blocks = [
        "## Against the targets",
        targets_table(main),
        "![Accuracy against the share of trained tokens, at 100 and at 1,000 steps](collapse/frontier.png)",
        "## Single changes",
        "The columns of the labs have the greedy accuracy at step 400 in %: the "
        "mean and [smallest, largest] of three seeds. *Drift* is the KL to the initial student at unselected "
        "tokens. *Step norm* is the norm of the step that Adam proposes. Both are means over steps 200 to "
        "400, for " + " / ".join(part["variant"] for part in causes) + ".",
        causes_table(causes),
        "![What single changes do](collapse/causes.png)",
        "## The guard",
        GUARD_WORDS,
        guard_table(main + sampled),
        "## Every arm",
    ]
    for part in main + sampled:
        blocks += [f"### {part['variant']}, {LOSS_NAMES[part['loss']]}", curves_table(part)]
    return "\n\n".join(blocks)


def write_page(document: dict[str, Any], path: Path) -> None:
    """Write pictures and page; what stands outside of the two markers is kept as it was."""
    folder = path.parent / "collapse"
    collapse_pictures.draw_curves(parts_of(document, "main"), folder)
    collapse_pictures.draw_mechanism(parts_of(document, "causes")[0], folder)
    collapse_pictures.draw_causes(parts_of(document, "causes"), folder)
    collapse_pictures.draw_frontier(parts_of(document, "main"), folder, trained_share)
    title = "Long runs: what collapses, and what holds"
    write_generated(path, generated(document), title=title)


def main() -> None:
    """Write the page next to the results."""
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=existing_file, help="the .json of scripts.collapse")
    args = parser.parse_args()
    write_page(json.loads(args.results.read_text()), args.results.with_suffix(".md"))


if __name__ == "__main__":
    main()
