"""The page about the choice of the default and its picture, from docs/results/default.json alone.

python -m scripts.pages.default_method docs/results/default.json

shortfall   best of full and published at its own best checkpoint, minus the arm at the end; per seed, points
interval    95 % t interval of the seeds' shortfalls (docs/math.md, Studies)
told        the interval lies on one side of 1 point; else the lab cannot tell
collapsed   100 (best checkpoint - end) > 20, of a seed
dip         the furthest that a seed was below its own best so far, points
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts import unseen_labs
from scripts.arguments import Arguments, existing_file
from scripts.default_method import ARMS, MAIN, PARTS, REACH
from taopd.experiments.lab import VARIANTS
from taopd.experiments.study.statistics import t_estimate
from taopd.report.figures.leaderboard import LOSS_NAMES
from taopd.report.figures.style import COLORS, MARKERS, plt
from taopd.report.generated_part import markdown_table, write_generated

ALLOWED, COLLAPSE, PROMPTS = 1.0, 20.0, 200
"""Points below the best that a default may be; points below its own best that count as a collapse."""
CANDIDATES = ("anchored@0.1", "reach@0.1", "reach@0.05", "raw C@0.1", "published@0.1")
RIVALS = ("full", "published@0.1")
VERDICTS = ("holds", "cannot tell", "loses")
PARTS_OF = {
    loss: [n for part in PARTS.values() if part[0] == loss for n in part[1]] for loss in LOSS_NAMES
}
"""Arms that a lab should have, by loss."""
Part = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How one arm stands in one lab."""

    shortfall: float
    low: float
    high: float
    collapsed: int
    seeds: int

    @property
    def verdict(self) -> str:
        """Whether the lab tells, and what."""
        if self.collapsed:
            return f"{self.collapsed} collapsed"
        if self.seeds < 2:  # nothing says how far another seed would be
            return "cannot tell"
        if self.high <= ALLOWED:
            return "holds"
        return "loses" if self.low > ALLOWED else "cannot tell"


def ends(arm: Part) -> np.ndarray:
    """Greedy accuracy at the last checkpoint, per seed, points."""
    return 100 * np.asarray([row[-1] for row in arm["greedy"]])


def own_best(arm: Part) -> np.ndarray:
    """At the checkpoint with the best mean over the seeds, per seed, points."""
    greedy = 100 * np.asarray(arm["greedy"])
    return greedy[:, int(greedy.mean(0).argmax())]


def dips(arm: Part, texts: str = "greedy") -> np.ndarray:
    """The furthest that accuracy was below its own best so far, per seed, points.

    Args:
        texts: "greedy" or "sampled".
    """
    curves = 100 * np.asarray(arm[texts])
    return (np.maximum.accumulate(curves, axis=1) - curves).max(1)


def standing(part: Part, name: str) -> Standing | None:
    """None where the arm or a rival was not measured."""
    arms = part["arms"]
    if name not in arms or any(rival not in arms for rival in RIVALS):
        return None
    best = max((own_best(arms[rival]) for rival in RIVALS), key=lambda values: values.mean())
    mine = ends(arms[name])
    # Seeds share prompts and random numbers: the difference is taken within a seed.
    seeds = min(len(best), len(mine))
    found = t_estimate(list(best[:seeds] - mine[:seeds]), resolution=100 * 2**0.5 / PROMPTS)
    greedy = 100 * np.asarray(arms[name]["greedy"])
    collapsed = int((greedy.max(1) - greedy[:, -1] > COLLAPSE).sum())
    low = found.mean if found.low is None else found.low
    high = found.mean if found.high is None else found.high
    return Standing(shortfall=found.mean, low=low, high=high, collapsed=collapsed, seeds=seeds)


def lab_name(part: Part) -> str:
    """A lab and its loss."""
    return part["variant"] + ("" if part["loss"] == "reverse_kl" else ", sampled")


def judged(parts: list[Part], name: str) -> list[tuple[str, Standing]]:
    """How a candidate stands in the labs that have it."""
    found = [(lab_name(part), standing(part, name)) for part in parts]
    return [(lab, each) for lab, each in found if each is not None]


def passes(known: list[tuple[str, Standing]]) -> bool:
    """Whether no lab is lost and no seed collapsed."""
    return not any(each.verdict == "loses" or each.collapsed for _, each in known)


def choice_table(parts: list[Part]) -> str:
    """Every candidate against the rule, in the labs that have it."""
    heads = ("candidate", "labs", *VERDICTS, "collapsed seeds", "worst shortfall", "passes")
    rows = []
    for name in CANDIDATES:
        known = judged(parts, name)
        if not known:
            continue
        verdicts = [each.verdict for _, each in known]
        lab, worst = max(known, key=lambda pair: pair[1].shortfall)
        counts = [
            len(known),
            *map(verdicts.count, VERDICTS),
            sum(each.collapsed for _, each in known),
        ]
        found = f"{worst.shortfall:.1f} ({lab})", "yes" if passes(known) else "no"
        rows.append([words(name), *map(str, counts), *found])
    return "\n".join(markdown_table(heads, rows, texts=(0, len(heads) - 1)))


def dip_table(parts: list[Part]) -> str:
    """How far accuracy falls on the way, by arm: mean over labs of the mean over seeds, and the worst seed.

    Over the labs that all these arms have: where nothing is learned, nothing can fall.
    """
    names = (*MAIN, *REACH)
    common = [part for part in parts if all(name in part["arms"] for name in names)]
    if not common:
        return "Deepest dip on the way: no lab has all arms."
    rows = []
    for name in names:
        cells = [words(name), str(len(common))]
        for texts in ("greedy", "sampled"):
            found = [dips(part["arms"][name], texts) for part in common]
            cells.append(f"{np.mean([each.mean() for each in found]):.0f}")
            cells.append(f"{max(each.max() for each in found):.0f}")
        rows.append(cells)
    table = markdown_table(("arm", "labs", "greedy, mean", "worst", "sampled, mean", "worst"), rows)
    return "\n".join(["Deepest dip on the way, points below the best so far:", "", *table])


def choice(parts: list[Part]) -> str:
    """What the rule chooses: of the candidates that miss no lab, over the labs that all of them have.

    With each loss that every variant was run with: one with the exact loss alone would leave the other out.
    """
    of_loss: dict[str, list[Part]] = {"reverse_kl": []}
    for part in parts:
        of_loss.setdefault(part["loss"], []).append(part)
    whole = [labs for labs in of_loss.values() if len(labs) >= len(VARIANTS)]
    complete = [
        name for name in CANDIDATES if all(len(judged(labs, name)) == len(labs) for labs in whole)
    ]
    if not complete or of_loss["reverse_kl"] not in whole:
        return "Labs are missing: this is no choice yet."
    common = [part for part in parts if all(standing(part, name) for name in complete)]
    known = {name: judged(common, name) for name in complete}
    text = f"The {len(common)} labs that {', '.join(map(words, complete))} all have decide: "
    if passing := [name for name in complete if passes(known[name])]:
        return f"{text}the default is one that passes: {', '.join(map(words, passing))}."
    worst = {name: max(each.shortfall for _, each in known[name]) for name in complete}
    best = min(worst, key=worst.__getitem__)
    others = ", ".join(f"{words(name)} {worst[name]:.1f}" for name in complete if name != best)
    return (
        f"{text}none passes. The smallest worst shortfall there has {words(best)}, "
        f"{worst[best]:.1f} points ({others})."
    )


def words(name: str) -> str:
    """An arm as the page calls it."""
    named = name.replace("@0.1", ", 10 %").replace("@0.05", ", 5 %")
    return named.replace("raw C", "anchored, raw C")


def points(values: np.ndarray) -> str:
    """Mean [smallest, largest] over the seeds."""
    low, high = values.min(), values.max()
    return f"{values.mean():.0f}" + (
        "" if round(low) == round(high) else f" [{low:.0f}, {high:.0f}]"
    )


def lab_table(part: Part) -> str:
    """Every arm of a lab."""
    curves = ("at 100", "its best", "dip", "end", "sampled, end")
    heads = ("arm", "selected", "seeds", *curves, "shortfall", "verdict")
    rows = []
    at_100 = part["steps"].index(100)
    for name in (each for each in ARMS if each in part["arms"]):
        arm, found = part["arms"][name], standing(part, name)
        cells = [
            words(name),
            f"{100 * arm['kept']:.1f} %",
            str(len(arm["greedy"])),
            points(100 * np.asarray([row[at_100] for row in arm["greedy"]])),
            points(own_best(arm)),
            points(dips(arm)),
            points(ends(arm)),
            points(100 * np.asarray([row[-1] for row in arm["sampled"]])),
            "" if found is None else f"{found.shortfall:.1f} [{found.low:.1f}, {found.high:.1f}]",
            "" if found is None or name not in CANDIDATES else found.verdict,
        ]
        rows.append(cells)
    return "\n".join(markdown_table(heads, rows, texts=(0, len(heads) - 1)))


def missing_words(parts: list[Part]) -> str:
    """What the page does not have, and what its numbers are not compared with, as a list."""
    absent = {
        name: [p for p in parts if name in PARTS_OF[p["loss"]] and name not in p["arms"]]
        for name in dict.fromkeys(name for part in parts for name in PARTS_OF[part["loss"]])
    }
    lines = [f"Not run: {where}." for where in in_labs(absent)]
    for loss, words_of in LOSS_NAMES.items():
        shown = {part["variant"] for part in parts if part["loss"] == loss}
        if labs := [variant for variant in VARIANTS if variant not in shown]:
            lines.append(f"No arm was run with the {words_of} in {', '.join(labs)}.")
    lines += [
        f"Seeds that a rival lacks are in the ends and in no shortfall: {where}."
        for where in in_labs({name: more_seeds(parts, name) for name in CANDIDATES})
    ]
    lines += [
        "Trained on a machine that rounds otherwise, and so not from the same models as full: "
        f"{where}."
        for where in in_labs(other_models(parts))
    ]
    return "\n".join(f"- {line}" for line in lines or ["Every arm was run in every lab."])


def in_labs(found: dict[str, list[Part]]) -> list[str]:
    """Arms and where they are found; those with the same labs stand together."""
    shared: dict[str, list[str]] = {}
    for name, labs in found.items():
        of_loss = {
            words_of: [part["variant"] for part in labs if part["loss"] == loss]
            for loss, words_of in LOSS_NAMES.items()
        }
        where = "; ".join(f"{', '.join(v)} ({loss})" for loss, v in of_loss.items() if v)
        if where:
            shared.setdefault(where, []).append(words(name))
    return [f"{'; '.join(names)}, in {where}" for where, names in shared.items()]


def more_seeds(parts: list[Part], name: str) -> list[Part]:
    """Labs in which a candidate has seeds that no shortfall counts, since its rivals lack them."""
    stands = [(part, standing(part, name)) for part in parts]
    return [p for p, found in stands if found and len(p["arms"][name]["greedy"]) > found.seeds]


def other_models(parts: list[Part]) -> dict[str, list[Part]]:
    """Labs in which an arm began at another accuracy than full did with the same seed: before a step only
    the models tell them apart."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        starts = {name: [curve[0] for curve in arm["greedy"]] for name, arm in part["arms"].items()}
        full = starts.pop("full", [])
        for name, values in starts.items():
            if any(own != other for own, other in zip(values, full, strict=False)):
                found.setdefault(name, []).append(part)
    return found


def draw_frontier(parts: list[Part], folder: Path) -> None:
    """Shortfall of every candidate by lab, a panel a loss; the worst labs of the chosen one last."""
    # A lab that no candidate can be judged in has no row.
    parts = [part for part in parts if any(standing(part, name) for name in CANDIDATES)]
    shown = [name for name in CANDIDATES if len(judged(parts, name)) > 1]
    # The chosen one: of those with most labs that with the smallest worst shortfall.
    known = {name: [each.shortfall for _, each in judged(parts, name)] for name in shown}
    leader = min(shown, key=lambda name: (-len(known[name]), max(known[name])))

    def of_leader(lab: str) -> float:
        found = [standing(part, leader) for part in parts if part["variant"] == lab]
        return max((each.shortfall for each in found if each is not None), default=-100.0)

    labs = sorted(sorted({part["variant"] for part in parts}), key=of_leader)
    figure, panels = plt.subplots(
        1, len(LOSS_NAMES), figsize=(9.6, 0.28 * len(labs) + 1.6), sharey=True, squeeze=False
    )
    for axes, (loss, words_of) in zip(panels[0], LOSS_NAMES.items(), strict=True):
        rows = [part for part in parts if part["loss"] == loss]
        for index, name in enumerate(shown):
            stands = [(labs.index(part["variant"]), standing(part, name)) for part in rows]
            found = [(row, each) for row, each in stands if each is not None]
            offset = 0.7 * ((index + 0.5) / len(shown) - 0.5)
            places = [row + offset for row, _ in found]
            look = {"color": COLORS[index], "marker": MARKERS[index], "linestyle": "none"}
            values = [each.shortfall for _, each in found]
            axes.plot(values, places, markersize=5, label=words(name), **look)
            lows, highs = ([getattr(e, end) for _, e in found] for end in ("low", "high"))
            axes.hlines(places, lows, highs, color=COLORS[index], linewidth=1, alpha=0.6)
        axes.axvline(ALLOWED, color="0.5", linewidth=0.8, linestyle="--")
        axes.set_title(words_of, loc="left", fontsize=10)
        axes.set_xscale("symlog", linthresh=2)
        axes.set_xlim(-130, 130)
        ticks = (-100, -10, -1, 0, 1, 10, 100)
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.93", linewidth=0.8)
        axes.set_axisbelow(True)
    panels[0][0].set_yticks(range(len(labs)), labs)
    panels[0][0].invert_yaxis()
    figure.supxlabel(
        "points below the best of full and published at their own best checkpoints (left is better)",
        fontsize=10,
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=len(shown), loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "frontier.png", dpi=110)
    plt.close(figure)


def generated(parts: list[Part]) -> str:
    """Choice, picture and tables."""
    blocks = ["## The candidates", choice_table(parts), choice(parts), missing_words(parts)]
    blocks.append(dip_table(parts))
    blocks.append("![Points below the best rival, by candidate and lab](default/frontier.png)")
    notes = {variant.name: " (no part in finding the form)" for variant in unseen_labs.NO_PART}
    for part in parts:
        name = f"{part['variant']}, {LOSS_NAMES[part['loss']]}{notes.get(part['variant'], '')}"
        blocks += [f"### {name}", lab_table(part)]
    return "\n\n".join(blocks)


def main() -> None:
    """Write picture and page next to the results; what stands outside of the markers is kept."""
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=existing_file, help="the .json of scripts.default_method")
    args = parser.parse_args()
    unseen_labs.register()
    parts = sorted(
        json.loads(args.results.read_text())["parts"],
        key=lambda part: (part["loss"] != "reverse_kl", part["variant"]),
    )
    draw_frontier(parts, args.results.parent / "default")
    write_generated(args.results.with_suffix(".md"), generated(parts))


if __name__ == "__main__":
    main()
