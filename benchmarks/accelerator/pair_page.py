"""The page about the SmolLM2 pairs on a GPU, and its picture, from the results of stage `pairs`."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.accelerator.saved import about, load, table
from scripts.pages.default_method import dips, standing
from taopd.experiments.study import by_problem, own_best
from taopd.experiments.study.statistics import accuracy_estimate

COLORS = {
    "full": "#777777",
    "published-10": "#0072B2",
    "reach-10": "#CC79A7",
    "random-10": "#D55E00",
}
"""The arms, in the order of the tables."""
PAIRS = (
    ("reach-10", "full"),
    ("reach-10", "published-10"),
    ("reach-10", "random-10"),
    ("published-10", "full"),
    ("published-10", "random-10"),
)
SHOWN = (20, 40, 60, 100, 140, 200)
"""Steps of the tables."""
SHARED_RATE = 5e-5
Rows = dict[str, list[dict[str, Any]]]
"""Arm -> its results, seeds ascending."""


def by_arm(rows: list[dict[str, Any]]) -> Rows:
    """The arms of a study, in the order of `COLORS`."""
    return {
        name: sorted((r for r in rows if r["name"] == name), key=lambda row: row["seed"])
        for name in COLORS
    }


def at(row: dict[str, Any], step: int) -> float:
    """Greedy accuracy at a step, %."""
    return 100 * dict(map(tuple, row["accuracy_curve"]))[step]


def accuracies(arms: Rows) -> str:
    """Means over seeds at the steps `SHOWN`, the seeds at the end, and sampled texts."""
    rows = []
    for name, group in arms.items():
        curve = [f"{mean(at(row, step) for row in group):.1f}" for step in SHOWN]
        end = ", ".join(f"{at(row, SHOWN[-1]):.0f}" for row in group)
        sampled = 100 * mean(row["accuracy_sampled"] for row in group)
        rows.append([name, *curve, end, f"{sampled:.1f}"])
    heads = ("arm", *(f"step {step}" for step in SHOWN), "seeds at the end", "sampled, end")
    return table(heads, rows)


def at_step(rows: list[dict[str, Any]], step: int) -> dict[int, dict[str, Any]]:
    """By seed, what `by_problem` reads of an arm, as it was at a step."""
    return {
        row["seed"]: {
            "name": row["name"],
            "seed": row["seed"],
            "right_greedy_curve": [(step, dict(row["right_greedy_curve"])[step])],
        }
        for row in rows
    }


def difference(one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> list[str]:
    """Points, interval over problems (their mean over common seeds), over training seeds, and each seed."""
    found = by_problem.difference(one, other)
    if found is None or found.low is None or found.high is None:
        return ["-"] * 4
    pairs = [(by_problem.right([one[s]]), by_problem.right([other[s]])) for s in one if s in other]
    gaps = [float((a - b).mean()) for a, b in pairs if a is not None and b is not None]
    over = accuracy_estimate(gaps, found.n, paired=True)
    seeds = "-"
    if over.low is not None and over.high is not None:
        seeds = f"[{100 * over.low:+.1f}, {100 * over.high:+.1f}]"
    each = ", ".join(f"{100 * gap:+.1f}" for gap in gaps)
    return [f"{100 * found.mean:+.1f}", f"± {50 * (found.high - found.low):.1f}", seeds, each]


def differences(arms: Rows, step: int) -> str:
    """`PAIRS` at a step."""
    rows = [
        [f"{a} - {b}", *difference(at_step(arms[a], step), at_step(arms[b], step))]
        for a, b in PAIRS
    ]
    heads = ("difference, points", "mean", "over problems", "over seeds, 95 %", "by seed")
    return table(heads, rows)


def lead(arms: Rows, one: str, other: str) -> str:
    """Points of one arm above another at the last step, with the interval over problems."""
    last = arms[one][0]["accuracy_curve"][-1][0]
    between = difference(at_step(arms[one], last), at_step(arms[other], last))
    mean_points, over_problems, *_ = between
    return f"{mean_points} {over_problems}"


def behaviour(arms: Rows) -> str:
    """Length, cut rollouts, entropy and disagreement in the first and last 20 steps."""
    keys = {
        "completions/clipped_ratio": "{:.2f}",
        "completions/mean_length": "{:.0f}",
        "entropy": "{:.2f}",
        "signal/disagreement_nats/mean": "{:.2f}",
        "guard/idle_drift_nats": "{:.3f}",
    }
    rows = []
    for name, group in arms.items():
        cells = [
            form.format(mean(row["logged"][key][which] for row in group))
            for key, form in keys.items()
            for which in (0, -1)
        ]
        peak = max(row["peak_mib"] for row in group)
        rows.append([name, *cells, f"{peak:,.0f}"])
    names = ("cut", "tokens", "entropy", "D", "drift")
    ends = [f"{name}, {end}" for name in names for end in ("first", "last")]
    return table(("arm", *ends, "peak, MiB"), rows)


def seeds_that_learn(arms: Rows) -> str:
    """For each arm, the first evaluated step of each seed at half of what full ends at; never: a dash."""
    goal = mean(at(row, SHOWN[-1]) for row in arms["full"]) / 2
    rows = []
    for name, group in arms.items():
        reached = []
        for row in group:
            steps = [step for step, share in row["accuracy_curve"] if 100 * share >= goal]
            reached.append(str(steps[0]) if steps else "-")
        rows.append([name, *reached])
    return table((f"first step at {goal:.0f} %", "seed 0", "seed 1", "seed 2"), rows)


def kept(arms: Rows) -> list[str]:
    """Three rollouts of the first step, which these arms share, as each keeps tokens of them."""
    names = ("published-10", "reach-10", "random-10")
    first = {name: arms[name][0]["first_rollouts"] for name in names}
    return [
        f"> {question}\n\n" + "\n".join(f"- {name}: {first[name][index][1]}" for name in names)
        for index, (question, _) in enumerate(first[names[0]])
    ]


def by_the_rule(pairs: dict[str, Rows]) -> str:
    """The candidates on the real pairs, judged by the rule of `docs/results/default.md`."""
    names = {"full": "full", "published-10": "published@0.1", "reach-10": "reach@0.1"}
    rows = []
    for title, arms in pairs.items():
        curves = {
            names[name]: {
                "greedy": [[share for _, share in row["accuracy_curve"]] for row in group]
            }
            for name, group in arms.items()
            if name in names
        }
        for name in ("reach@0.1", "published@0.1"):
            found = standing({"arms": curves}, name)
            assert found is not None
            cells = (
                f"{found.shortfall:.1f}",
                f"[{found.low:.1f}, {found.high:.1f}]",
                f"{found.collapsed} of {found.seeds}",
                f"{dips(curves[name]).max():.0f}",
                found.verdict,
            )
            rows.append([f"{title}, {name}", *cells])
    heads = ("pair, arm", "shortfall", "over seeds, 95 %", "collapsed", "deepest dip", "verdict")
    return table(heads, rows)


def rated(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[float]]:
    """The comparison of `taopd compare` at several rates, and the rates."""
    rates = sorted({row["learning_rate"] for row in rows})
    groups: dict[str, dict[int, Any]] = defaultdict(dict)
    for row in rows:
        groups[row["name"]][row["seed"]] = row
    controls = {
        own_best.at_rate(name, rates[0]): {
            other: own_best.at_rate(other, rates[0])
            for other in ("full", "random-10")
            if other != name
        }
        for name in COLORS
    }
    found = own_best.compare(
        groups, controls, rates=rates, shared_rate=SHARED_RATE, metric="greedy"
    )
    return found, rates


def rate_tables(found: dict[str, Any], rates: list[float]) -> list[str]:
    """Accuracy by arm and rate; differences at the shared rate and at each one's own best."""
    arms = {arm["name"]: arm for arm in found["arms"]}
    curves = []
    for name in COLORS:
        arm = arms[name]
        points = dict(map(tuple, arm["curve"]))
        cells = [f"{100 * points[rate]:.1f}" for rate in rates]
        cells += [f"{arm['best_rate']:g}", f"{arm['spread']['points']:.1f}", str(arm["num_seeds"])]
        curves.append([name, *cells])
    compared = []
    for row in found["comparisons"]:
        cells = []
        for basis in ("shared", "own_best"):
            bounds = row[basis]["over_problems"]
            cells += [
                f"{100 * row[basis]['difference']:+.1f}",
                f"[{100 * bounds['low']:+.1f}, {100 * bounds['high']:+.1f}]",
            ]
        compared.append([f"{row['arm']} - {row['reference']}", *cells, str(len(row["seeds"]))])
    of_rates = [f"{rate:g}" for rate in rates]
    at = f"at {SHARED_RATE:g}"
    return [
        table(("arm", *of_rates, "best at", "moves by", "seeds at all rates"), curves),
        "Differences in points, with intervals over problems that hold after choosing the best rate:",
        table(("difference", at, "95 %", "at own best", "95 %", "common seeds"), compared),
    ]


def introduction(one: Rows, two: Rows) -> list[str]:
    """What was asked, and what came out; the arms of pair 1 and of pair 2."""
    return [
        "Does a tenth of the tokens teach a real language model what all of them teach? With the "
        "default method it does on both pairs; with the paper's selector it ends below.",
        "**Where the paper's method loses.** Full distillation ends above the published selector on "
        f"both pairs ({lead(one, 'full', 'published-10')} and {lead(two, 'full', 'published-10')} "
        "points over problems; three seeds alone cannot tell them apart). On the second pair, whose "
        "student does not know the form of an answer, one of its three seeds never answers a problem "
        "right. A random tenth of the tokens never does there.",
        "**Where a tenth of the tokens is enough.** The default method, `reach`, is level with full "
        f"distillation on the first pair ({lead(one, 'reach-10', 'full')} points over problems). On "
        f"the second it is above it ({lead(two, 'reach-10', 'full')}; three seeds alone cannot tell "
        "them apart), and learns in a third of the steps.",
        "- Selection is not the only reason. The default has a forward KL for words that the student "
        "hardly says, and holds a random tenth of the other tokens. With a forward KL full "
        "distillation, too, learns the second pair in 40 steps "
        "([smollm2-forward.md](smollm2-forward.md), two CPU cores, one seed).\n"
        "- It depends on the learning rate more than any other arm. At 2e-4 it ends below full and "
        "published.\n"
        "- `reach` had an earlier form here ([what changed](reach_forms.md)). On the second pair "
        "this form has 29 % after 40 steps on two CPU cores, and a later one 45 "
        "([smollm2-order.md](smollm2-order.md), one seed). The present form has 34 there, and 41 "
        "after 200 steps ([smollm2-long.md](smollm2-long.md), three seeds).",
    ]


def write_pair(results: Path, page: Path) -> None:
    """`smollm2.md` and its picture."""
    document = load("pairs", results)
    studies, teacher = document["result"]["studies"], document["result"]["teacher"]
    one, two = by_arm(studies["pair1-long"]), by_arm(studies["pair2-long"])
    found, rates = rated(studies["pair1-rates"])
    titles = ("Pair 1: knows the form", "Pair 2: does not know the form")
    draw(
        dict(zip(titles, (one, two), strict=True)),
        found,
        teacher["accuracy"],
        page.with_suffix(".png"),
    )
    start = at(one["full"][0], 0)
    page.write_text(
        "\n\n".join(
            [
                "# SmolLM2-135M",
                *introduction(one, two),
                "Written by `python -m benchmarks.accelerator.page` from "
                "`benchmarks/results/accelerator-pairs__nvidia-h200.json`.",
                "![Accuracy over steps on both pairs, and over learning rates](smollm2.png)",
                "## The models",
                "Teacher: SmolLM2-135M-Instruct after 41 steps of SFT on two-step word problems "
                f"({100 * teacher['accuracy']:.1f} % ± {196 * teacher['standard_error']:.1f} right). Student "
                f"of pair 1: the same run after 8 steps ({start:.1f} %). Student of pair 2: the untouched "
                "instruct model (0 %). Training: 16 rollouts a step of at most 48 tokens, a constant "
                "learning rate of 5e-5, bfloat16 autocast. The tables have the greedy accuracy on 300 "
                "held-out problems in %, means over three training seeds. `taopd.experiments.smollm2` makes "
                "a pair on the machine that runs it. Another machine rounds otherwise and makes "
                "another pair.",
                about(document),
                "## Pair 1: a student that knows the form",
                accuracies(one),
                "Differences after 200 steps, taken problem by problem. *Over problems* is a 95 % interval "
                "of the problems, each with its mean over the seeds. *Over seeds* is a t interval of the "
                "three seeds' differences.",
                differences(one, 200),
                "After 60 steps:",
                differences(one, 60),
                "What the rollouts are like in the first and in the last 20 steps. *Cut* is the share of "
                "rollouts that reach 48 tokens without an end, *tokens* their mean length. *Entropy* is the "
                "student's, *D* the mean disagreement. *Drift* says how far unselected tokens moved away "
                "from the initial student without coming nearer to the teacher ([idle drift](../math.md)). "
                "These three are in nats. *Peak* is the peak memory on the card, evaluations included.",
                behaviour(one),
                "Three rollouts of the first step. The tokens that an arm selects are bold:",
                *kept(one),
                "## Pair 2: a student that does not know the form",
                accuracies(two),
                "When each seed first has half of the accuracy that full distillation ends with; a dash: "
                "never.",
                seeds_that_learn(two),
                "Differences after 200 steps:",
                differences(two, 200),
                "After 60 steps:",
                differences(two, 60),
                "The rollouts in the first and in the last 20 steps:",
                behaviour(two),
                "## Judged by the rule that chose the default",
                "[The rule](default.md): a method holds if its end is at most 1 point below the best that "
                "full or published has at any checkpoint, and if no seed collapsed. *Shortfall* is that "
                "distance in points. *Deepest dip* is the largest fall below a run's own best on the way.",
                by_the_rule({"pair 1": one, "pair 2": two}),
                "## Learning rates, pair 1",
                "Each arm was run for 24 steps at five rates, with three seeds (random-10 with two at 5e-5, "
                "1e-4 and 2e-4). The study is `recipes/studies/smollm2-rates.yaml`. The "
                "[guide](../guide.md#comparing) says how the intervals are made. Accuracy in %, *moves by* "
                "in points between the best and the worst rate:",
                *rate_tables(found, rates),
                "## Not run",
                "Budgets of 5 % and the other selectors were not run on a GPU. On two CPU cores they were: "
                "[smollm2-cpu.md](smollm2-cpu.md). The fixed-context diagnostic of both pairs is in "
                "[smollm2-diagnostic.md](smollm2-diagnostic.md).",
            ]
        )
        + "\n"
    )


def draw(pairs: dict[str, Rows], found: dict[str, Any], teacher: float, path: Path) -> None:
    """Accuracy against steps on both pairs, a line a seed; on pair 1 also against the learning rate."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for axes, (title, arms) in zip(panels, pairs.items(), strict=False):
        for name, rows in arms.items():
            for index, row in enumerate(rows):
                steps, shares = zip(*row["accuracy_curve"], strict=True)
                label = name if index == 0 else None
                values = [100 * share for share in shares]
                axes.plot(steps, values, color=COLORS[name], alpha=0.85, linewidth=1.3, label=label)
        axes.axhline(100 * teacher, color="black", linewidth=0.8, linestyle=":", label="teacher")
        axes.set(title=title, xlabel="step")
    for arm in found["arms"]:
        rates, shares = zip(*arm["curve"], strict=True)
        values = [100 * share for share in shares]
        panels[2].plot(rates, values, color=COLORS[arm["name"]], marker="o", markersize=4)
    panels[2].set(title="Pair 1, 24 steps", xlabel="learning rate", xscale="log")
    panels[0].set(ylabel="greedy accuracy, %", ylim=(-1, None))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, frameon=False, fontsize=9)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=140)
    plt.close(figure)
