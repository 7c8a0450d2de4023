"""The page about the collapse guard: what a limit costs in false alarms and in steps of notice.

    python -m scripts.pages.guard --gather runs/guard    # scripts/guard_runs.py's runs into one file, and:
    python -m scripts.pages.guard                        # the page and its picture from that file

    collapsed, fall, stable   as on the page about long runs (scripts/pages/collapse.py)
    in time     the first warning comes before the checkpoint at which the fall shows
    false       a stable run that was warned of
    notice      steps from the warning to the fall

A rule is a set of limits; it warns where one of its numbers, smoothed as the guard smooths, passes its limit.
The limit of a rule is chosen on one part of the labs, so that the larger of the two error rates is smallest
there, and counted on the other: the labs on which the guard before was found, and all others.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.arguments import Arguments, existing_folder, what_is_missing
from scripts.lab_results import write_rows
from scripts.pages import guard_real
from scripts.pages.collapse import fell_at
from taopd.report.figures.style import plt
from taopd.report.generated_part import markdown_table, write_generated
from taopd.trainer.watches.collapse_detector import DRIFT_LIMIT, MEMORY, OF_FIRST, CollapseWatch

FINISHED = "*__*.json"
"""Files of `scripts.guard_runs`."""
SIGNALS = ("excess", "idle_drift", "teachable", "entropy", "length")
"""What the file keeps of every look."""
FOUND_ON = ("accent", "bilingual", "dialect", "fallible", "reversal", "termination")
"""Labs whose runs the guard before was found on, those of `method: reach` left out."""
LIMITS = [round(float(limit), 4) for limit in np.geomspace(0.02, 2.0, 41)]
RULES: dict[str, tuple[str, str]] = {
    "idle drift": ("idle_drift", ""),
    "idle drift, D C and entropy rise": ("idle_drift", "rises"),
    "idle drift, less sure than at first": ("idle_drift", "above first"),
    "stray drift": ("excess", ""),
    "stray drift, less sure than at first": ("excess", "above first"),
}
"""The number that the limit is for, and what else must be: D C above its smallest value and entropy 0.04 nats
above its own (an earlier guard), or entropy above its first value by `OF_FIRST`."""


BEFORE = {
    "the guard before": "idle drift, D C and entropy rise",
    "the first guard": "idle drift",
}


class Count(NamedTuple):
    """What a rule did on some runs."""

    in_time: int
    late: int
    missed: int
    false: int
    stable: int
    notice: list[int]

    @property
    def collapsed(self) -> int:
        return self.in_time + self.late + self.missed

    @property
    def false_rate(self) -> float:
        return self.false / max(1, self.stable)

    @property
    def late_rate(self) -> float:
        return (self.late + self.missed) / max(1, self.collapsed)


def smoothed(values: list[float]) -> np.ndarray:
    """The guard's moving average, corrected for its start."""
    total = weight = 0.0
    found = []
    for value in values:
        total, weight = MEMORY * total + (1 - MEMORY) * value, MEMORY * weight + 1 - MEMORY
        found.append(total / weight)
    return np.asarray(found)


def first_warning(run: dict[str, Any], rule: str, limit: float) -> int | None:
    """Step of a rule's first warning."""
    number, gate = RULES[rule]
    passed = smoothed(run["looks"][number]) > limit
    entropy = smoothed(run["looks"]["entropy"])
    if gate == "rises":
        teachable = smoothed(run["looks"]["teachable"])
        passed &= teachable > np.minimum.accumulate(teachable)
        passed &= entropy > np.minimum.accumulate(entropy) + 0.04
    elif gate:
        passed &= entropy > OF_FIRST * entropy[0]
    return int(np.argmax(passed)) * run["look_every"] if passed.any() else None


def guards_warning(run: dict[str, Any]) -> int | None:
    """Step of the first warning of `CollapseWatch`, all of its numbers together."""
    watch = CollapseWatch()
    names = ("idle_drift", "entropy", "length")
    for look in range(len(run["looks"]["entropy"])):
        values = {name: run["looks"][name][look] for name in names}
        if watch.update(look * run["look_every"], values):
            return look * run["look_every"]
    return None


def count(runs: list[dict[str, Any]], warned: list[int | None]) -> Count:
    """Warnings against what became of the runs."""
    in_time = late = missed = false = stable = 0
    notice = []
    for run, first in zip(runs, warned, strict=True):
        steps = [run["exam_every"] * place for place in range(len(run["greedy"]))]
        state, fall = fell_at(steps, run["greedy"])
        if state == "stable":
            stable += 1
            false += first is not None
        elif state == "collapsed" and fall is not None:
            missed += first is None
            late += first is not None and first >= fall
            if first is not None and first < fall:
                in_time += 1
                notice.append(fall - first)
    return Count(in_time, late, missed, false, stable, notice)


def counts(runs: list[dict[str, Any]], rule: str, limit: float) -> Count:
    """`count` of a rule at a limit."""
    return count(runs, [first_warning(run, rule, limit) for run in runs])


def guards_count(runs: list[dict[str, Any]]) -> Count:
    """`count` of the guard itself."""
    return count(runs, [guards_warning(run) for run in runs])


def best_limit(runs: list[dict[str, Any]], rule: str) -> float:
    """The limit with the smallest larger error rate; the largest of equals."""

    def cost(limit: float) -> tuple[float, float]:
        found = counts(runs, rule, limit)
        return max(found.false_rate, found.late_rate), -limit

    return min(LIMITS, key=cost)


HEADS = (
    *("in time", "late or missed", "warned of stable", "false alarms"),
    "notice, steps (median, range)",
)


def cells(found: Count) -> list[str]:
    """A row's numbers."""
    notice = "-"
    if found.notice:
        median, low, high = np.median(found.notice), min(found.notice), max(found.notice)
        notice = f"{median:.0f} ({low} to {high})"
    rates = [f"{100 * rate:.0f} %" for rate in (found.late_rate, found.false_rate)]
    in_time, false = (f"{found.in_time} of {found.collapsed}", f"{found.false} of {found.stable}")
    return [in_time, rates[0], false, rates[1], notice]


def parts_of(runs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs like those that the guard before was found on, and all others."""
    old, others = [], []
    for run in runs:
        known = run["variant"] in FOUND_ON and run["arm"] != "reach"
        (old if known else others).append(run)
    return old, others


def tables(runs: list[dict[str, Any]]) -> str:
    """The guard on both parts of the runs; rules with limits from the other part."""
    rows = []
    old, others = parts_of(runs)
    for words, own in (("all", runs), ("runs of the guard before", old), ("others", others)):
        name = f"**the guard**, {words} ({len(own)})"
        rows.append([name, str(DRIFT_LIMIT), *cells(guards_count(own))])
    for words, rule in BEFORE.items():
        rows.append([words, str(DRIFT_LIMIT), *cells(counts(runs, rule, DRIFT_LIMIT))])
    for rule in RULES:
        limits = [best_limit(part, rule) for part in (old, others)]
        # Each part is judged by the limit that the other one chose.
        warned = [
            first_warning(run, rule, limit)
            for part, limit in zip((old, others), reversed(limits), strict=True)
            for run in part
        ]
        chosen = " / ".join(f"{limit:.2g}" for limit in limits)
        rows.append([rule, chosen, *cells(count([*old, *others], warned))])
    return "\n".join(markdown_table(("rule", "limit", *HEADS), rows, texts=2))


def grouped(runs: list[dict[str, Any]], name: str) -> str:
    """The guard by "arm" or "variant" of the runs."""
    rows = []
    for value in sorted({run[name] for run in runs}):
        own = [run for run in runs if run[name] == value]
        rows.append([value, *cells(guards_count(own))])
    return "\n".join(markdown_table(("lab" if name == "variant" else name, *HEADS), rows))


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """False alarms against what was late, and against the notice, over all limits."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for rule in RULES:
        found = [counts(runs, rule, limit) for limit in LIMITS]
        false = [100 * each.false_rate for each in found]
        left.plot(false, [100 * each.late_rate for each in found], ".-", label=rule)
        right.plot(false, [np.median(each.notice) if each.notice else 0 for each in found], ".-")
    now = guards_count(runs)
    left.plot(100 * now.false_rate, 100 * now.late_rate, "kx", label="the guard")
    right.plot(100 * now.false_rate, np.median(now.notice), "kx")
    left.axvline(5, color="0.7", lw=0.8)
    left.axhline(5, color="0.7", lw=0.8)
    left.set(xlabel="false alarms, % of stable runs", ylabel="late or missed, % of collapses")
    right.set(xlabel="false alarms, % of stable runs", ylabel="median notice, steps")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def gather(folder: Path) -> list[dict[str, Any]]:
    """The runs of all finished jobs, with `SIGNALS` alone."""
    found = []
    for path in sorted(folder.glob(FINISHED)):
        document = json.loads(path.read_text())
        about = {name: value for name, value in document.items() if name != "runs"}
        for run in document["runs"]:
            looks = {name: [round(v, 4) for v in run["looks"][name]] for name in SIGNALS}
            found.append(about | run | {"looks": looks})
    return found


def main() -> None:
    """Gather, or make the page."""
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--gather", type=existing_folder, help="runs of scripts.guard_runs")
    parser.add_argument("--data", type=Path, default=Path("docs/results/guard.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/guard.md"))
    args = parser.parse_args()
    if args.gather:
        if missing := what_is_missing(args.gather, FINISHED):
            parser.error(f"argument --gather: {missing}")
        write_rows(args.data, {}, "runs", gather(args.gather))
    runs = json.loads(args.data.read_text())["runs"]
    draw(runs, args.page.with_suffix(".png"))
    parts = [
        f"How often each rule warns in time, and how often without need, over {len(runs)} runs. *In time*: "
        "collapses that it warned of before the fall. *Late or missed*: all other collapses, in %. *Warned "
        "of stable*: runs that stayed stable and were warned of. *False alarms*: their share in %.",
        tables(runs),
        f"![False alarms against late warnings and notice]({args.page.stem}.png)",
        "The guard's own rule by arm:",
        grouped(runs, "arm"),
        "And by lab:",
        grouped(runs, "variant"),
        "Real runs: SmolLM2-135M for 200 steps, looked at every 5 (`scripts.pages.guard_real`). None of them "
        f"collapsed. Of so many seeds the rules of idle drift, at {DRIFT_LIMIT} nats, would have warned:",
        guard_real.table(
            json.loads(guard_real.SAVED.read_text())["runs"],
            {
                rule: partial(first_warning, rule=rule, limit=DRIFT_LIMIT)
                for rule in RULES
                if RULES[rule][0] == "idle_drift"
            },
        ),
    ]
    write_generated(args.page, "\n\n".join(parts))


if __name__ == "__main__":
    main()
