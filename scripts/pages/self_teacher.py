"""The page about a model as its own teacher, from the folders of its studies alone.

    python -m scripts.smollm2_self --measure 60                                 # what the context helps
    taopd check recipes/smollm2-self.yaml --json > runs/smollm2-self-form/check.json   # and changes (KL)
    python -m scripts.pages.self_teacher runs/smollm2-self \\
        --form runs/smollm2-self-form --system runs/smollm2-system

Either of the first two may be missing: the page says so. Studies that still run are shown as far as they are.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.arguments import Arguments, existing_folder
from scripts.pages import smollm2_cpu
from scripts.pages.kinds_of_tokens import WORDS, by_kind, texts
from taopd.experiments.study.statistics import Estimate
from taopd.runs.jsonl import read_jsonl, write_text

PAGE = Path("docs/results/self.md")
BEGIN, END = 3, 3
"""Steps at the begin and at the end of a run whose rollouts are counted."""
OWN, CONTROL, WHOLE = "published-10", "random-10", "full"
TITLES = {
    "untouched": "The untouched model, and the worked solution",
    "form": "A student that knows the form, and the worked solution",
    "system": "The untouched model, and a system prompt",
}
Arms = dict[Path, dict[str, Any]]


def page(untouched: Path, others: Mapping[str, Path | None], note: str = "") -> str:
    """The page in Markdown.

    Args:
        untouched: the study of the untouched model; the page begins with its verdict.
        others: names of `TITLES`, each with its study's folder, or None.
    """
    runs = {"untouched": untouched} | {name: run for name, run in others.items() if run is not None}
    flags = "".join(f" --{name} {run}" for name, run in runs.items() if name != "untouched")
    parts = [
        "# SmolLM2-135M-Instruct as its own teacher\n",
        f"Written by `python -m scripts.pages.self_teacher {untouched}{flags}` after the studies in "
        f"`recipes/studies`. {note}".rstrip()
        + "\n",
        f"{verdict(finished(untouched))}\n",
        "The teacher is the student before training (`teacher: self`) and reads more than it: what is "
        "learned can come from the context alone.\n",
    ]
    for name, run in runs.items():
        parts += section(run, TITLES[name])
    return "\n".join(parts)


def section(run: Path, title: str) -> list[str]:
    """One study: what the context helps, accuracy by arm, tokens by kind, rollouts."""
    study = json.loads((run / "config.json").read_text())
    arms = finished(run)
    if OWN not in {arm["name"] for arm in arms.values()}:
        return [f"## {title}\n", f"Not run yet: {OWN} has not finished.\n"]
    versions = json.loads((run / "env.json").read_text())["versions"]
    some = next(iter(arms.values()))
    seeds = sorted({arm["seed"] for arm in arms.values()})
    shown = next(folder for folder, arm in arms.items() if arm["name"] == OWN)
    return [
        f"## {title}\n",
        f"{verdict(arms)}\n",
        f"{some['steps']} steps of {study['config']['per_device_train_batch_size']} rollouts, learning rate "
        f"{some['learning_rate']:g}, {some['dtype']}, {len(seeds)} of {len(study['seeds'])} training seeds, "
        f"{some['num_test_prompts']} held-out problems; torch {versions['torch']}, TRL {versions['trl']}. "
        f"Right is what `{study['match']}` finds.\n",
        f"{_context(run, study)}\n",
        smollm2_cpu.table(arms),
        smollm2_cpu.differences(arms),
        _over_seeds(seeds),
        "### Which tokens does the context teach, and does teachability find them?\n",
        f"D in nats and C of the rollouts of the first {BEGIN} steps, over all arms; then the share of each "
        "kind that an arm keeps over its own run.\n",
        kinds_table(arms),
        f"{found_words(arms)}\n",
        "### What the student writes\n",
        forms_table(arms),
        f"Three rollouts of the last step of {OWN}; kept tokens in bold.\n",
        *smollm2_cpu.rollouts(shown),
    ]


def finished(run: Path) -> Arms:
    """Results of the arms that have finished, by folder, in the order of the seeds."""
    return dict(sorted(smollm2_cpu.finished(run).items(), key=lambda item: item[1]["seed"]))


def verdict(arms: Arms) -> str:
    """One sentence, first on the page: how the method does against random tokens and against all."""
    found = smollm2_cpu.paired(arms)
    against_random, against_full = (found.get((OWN, other)) for other in (CONTROL, WHOLE))
    if against_random is None or against_full is None:
        return f"**Not finished.** {OWN}, {CONTROL} and {WHOLE} are compared when a seed of each is there."
    lost = [
        name
        for name, estimate in (("random tokens", against_random), ("all tokens", against_full))
        if _sign(estimate) < 0
    ]
    numbers = (
        f"against random tokens {_points(against_random)}, against all tokens "
        f"{_points(against_full)} points"
    )
    if lost:
        return f"**The method loses** to {' and to '.join(lost)} here: {numbers}."
    if _sign(against_random) > 0:
        return (
            f"A tenth of the tokens, chosen by teachability, wins over a random tenth: {numbers}."
        )
    most = max(arm["accuracy_greedy"] for arm in arms.values())
    return (
        f"**The method shows no gain over random tokens here**: {numbers}; the best arm solves "
        f"{100 * most:.0f} %."
    )


def _sign(estimate: Estimate) -> int:
    assert estimate.low is not None and estimate.high is not None
    return int(estimate.low > 0) - int(estimate.high < 0)


def _points(estimate: Estimate) -> str:
    return f"{estimate.mean:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}]"


def _over_seeds(seeds: list[int]) -> str:
    if len(seeds) == 1:
        return (
            "The intervals are over problems alone: they do not say what another training seed would "
            "give.\n"
        )
    return (
        "A problem's difference is its mean over the seeds that both arms have; the intervals are over "
        "problems.\n"
    )


def _context(run: Path, study: dict[str, Any]) -> str:
    """What the context helps in greedy answers, and how far it moves the teacher."""
    measured = Path(study["prompts"]).with_suffix(".json")
    parts = []
    if measured.exists():
        found = json.loads(measured.read_text())
        helps = found["accuracy"]
        parts.append(
            f"The student before training, greedily, on {found['problems']} test problems: right in "
            f"{100 * helps['without']:.0f} % without its context and in {100 * helps['with']:.0f} % with it."
        )
    else:
        parts.append(
            "No measurement of what the context helps lies beside the prompts "
            "(`scripts.smollm2_self --measure` writes one)."
        )
    if (run / "check.json").exists():
        items = {
            item["item"]: item for item in json.loads((run / "check.json").read_text())["items"]
        }
        nats = items["teacher context"]["figures"]
        parts.append(
            f"On {nats['tokens']} tokens that the student sampled, KL(with its context || without) is "
            f"{nats['with_without_nats']:.2f} nats a token, the other way round "
            f"{nats['without_with_nats']:.2f} (`taopd check`)."
        )
    else:
        parts.append("The teacher's KL with and without its context was not measured.")
    return " ".join(parts)


def lines_of(folders: Iterable[Path], *, steps: str = "all") -> list[dict[str, Any]]:
    """Rollouts of some arms: all of them, of the first `BEGIN` steps, or of the last `END`."""
    found = []
    for folder in folders:
        lines = read_jsonl(folder / "rollouts.jsonl")
        number = sorted({line["step"] for line in lines})
        wanted = {"all": number, "begin": number[:BEGIN], "end": number[-END:]}[steps]
        found += [line for line in lines if line["step"] in wanted]
    return found


def _folders(arms: Arms) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for folder, arm in arms.items():
        found.setdefault(arm["name"], []).append(folder)
    return found


def kinds_table(arms: Arms) -> str:
    """A row for each kind of token: its share, D and C at the begin, the share that every arm keeps."""
    folders = _folders(arms)
    choosers = [name for name in folders if name != WHOLE]
    begin = by_kind(lines_of(arms, steps="begin"))
    kept = {name: by_kind(lines_of(folders[name])) for name in choosers}
    rows = [
        "| token | share, % | D | C | of all D, % | "
        + " | ".join(f"kept by {name}, %" for name in choosers)
        + " |",
        "|---|" + "---:|" * (4 + len(choosers)),
    ]
    for kind, found in begin.items():
        shares = [
            f"{100 * kept[name][kind]['kept']:.0f}" if kind in kept[name] else ""
            for name in choosers
        ]
        rows.append(
            f"| {WORDS[kind]} | {100 * found['share']:.1f} | {found['disagreement']:.2f} | "
            f"{found['compatibility']:.2f} | {100 * found['share_of_disagreement']:.0f} | "
            + " | ".join(shares)
            + " |"
        )
    return "\n".join(rows) + "\n"


def found_words(arms: Arms) -> str:
    """How much teachability keeps of the kind with the largest mean D at the begin."""
    begin = by_kind(lines_of(arms, steps="begin"))
    taught = max(begin, key=lambda kind: begin[kind]["disagreement"])
    kept = by_kind(lines_of(_folders(arms)[OWN]))
    budget = float(np.mean([arm["kept_fraction"] for arm in arms.values() if arm["name"] == OWN]))
    share = kept[taught]["kept"] if taught in kept else 0.0
    return (
        f"The context moves the teacher most at: {WORDS[taught]} ({begin[taught]['disagreement']:.2f} nats). "
        f"Teachability keeps {100 * share:.0f} % of them, {share / budget:.1f} times what a random choice of "
        f"{100 * budget:.0f} % keeps."
    )


def forms_table(arms: Arms) -> str:
    """By arm: share of rollouts that end, and share with an "Answer: N", at the begin and at the end."""
    rows = ["| arm | ends, begin, % | end, % | says Answer: N, begin, % | end, % |"]
    rows.append("|---|" + "---:|" * 4)
    for name, folders in _folders(arms).items():
        seen = []
        for steps in ("begin", "end"):
            lines = lines_of(folders, steps=steps)
            said = ["".join(texts(line)) for line in lines]
            seen.append(
                (
                    np.mean([not line["truncated"] for line in lines]),
                    np.mean(["Answer: " in text for text in said]),
                )
            )
        (ends, says), (ends_after, says_after) = seen
        rows.append(
            f"| {name} | "
            + " | ".join(f"{100 * x:.0f}" for x in (ends, ends_after, says, says_after))
            + " |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    parser = Arguments(description=__doc__)
    parser.add_argument(
        "run", type=existing_folder, help="folder of recipes/studies/smollm2-self.yaml"
    )
    parser.add_argument(
        "--form", type=existing_folder, help="of recipes/studies/smollm2-self-form.yaml"
    )
    parser.add_argument(
        "--system", type=existing_folder, help="of recipes/studies/smollm2-system.yaml"
    )
    parser.add_argument("--note", default="", help="a sentence about the runs, such as their time")
    options = parser.parse_args()
    others = {"form": options.form, "system": options.system}
    write_text(PAGE, page(options.run, others, options.note))
    print(PAGE)
