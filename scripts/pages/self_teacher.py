"""The page about a model as its own teacher, which reads more than the student.

    python -m scripts.smollm2_self --measure 60          # models, prompts, what the context helps
    taopd compare recipes/studies/smollm2-self-form.yaml
    python -m scripts.pages.self_teacher --form runs/smollm2-self-form   # adds to docs/results/self.json
    python -m scripts.pages.self_teacher                                 # the page again from that file

`--untouched` and `--system` take the folders of `smollm2-self.yaml` and `smollm2-system.yaml`. The KL that
the context makes is read from `check.json` in a study's folder, where it is there:

    taopd check recipes/smollm2-self.yaml --json > runs/smollm2-self/check.json

Arms that have not finished are left out. What the file holds of other studies, arms and seeds stays in it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.arguments import Arguments, existing_folder
from scripts.pages import smollm2_cpu
from scripts.pages.kinds_of_tokens import WORDS, added, by_kind, counts, texts
from taopd.experiments.study.statistics import Estimate
from taopd.report.generated_part import markdown_table, write_generated
from taopd.runs.jsonl import read_jsonl, write_text

SAVED = Path("docs/results/self.json")
FIRST, LAST = 3, 3
"""Steps at the begin and at the end of a run whose rollouts are counted."""
OWN, CONTROL, WHOLE = "published-10", "random-10", "full"
TITLES = {
    "form": "A student that knows the form, and the worked solution",
    "untouched": "The untouched model, and the worked solution",
    "system": "The untouched model, and a system prompt",
}
Saved = dict[str, Any]
Line = dict[str, Any]
Arms = Mapping[Any, dict[str, Any]]


def gathered(run: Path, saved: Saved | None) -> Saved:
    """What the page reads of a study's finished arms and measurements, added to what was saved before."""
    found = smollm2_cpu.gathered(run, saved, tokens_of)
    study = json.loads((run / "config.json").read_text())
    measured = {
        "helps": _read(Path(study["prompts"]).with_suffix(".json")),
        "check": _read(run / "check.json"),
    }
    before = saved or {}
    return found | {name: now or before.get(name) for name, now in measured.items()}


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def tokens_of(folder: Path, arm: dict[str, Any]) -> dict[str, Any]:
    """What the page keeps of an arm's rollouts: tokens by kind, how texts end, three of the last step."""
    lines = read_jsonl(folder / "rollouts.jsonl")
    steps = sorted({line["step"] for line in lines})
    begin, end = (
        [line for line in lines if line["step"] in some] for some in (steps[:FIRST], steps[-LAST:])
    )
    shows = arm["name"] == OWN and not arm["seed"]
    return {
        "learning_rate": arm["learning_rate"],
        "dtype": arm["dtype"],
        "kinds": {"begin": counts(begin), "all": counts(lines)},
        "texts": {"begin": _texts(begin), "end": _texts(end)},
        "rollouts": smollm2_cpu.shown(folder, step=-1) if shows else [],
    }


def _texts(lines: list[Line]) -> dict[str, int]:
    """Of some rollouts: their number, how many end, how many have an "Answer: N"."""
    return {
        "rollouts": len(lines),
        "end": sum(not line["truncated"] for line in lines),
        "answer": sum("Answer: " in "".join(texts(line)) for line in lines),
    }


def page(studies: Mapping[str, Saved]) -> str:
    """What the command writes of the page, in Markdown.

    Args:
        studies: a saved study for each of some names of `TITLES`.
    """
    blocks = [f"![Accuracy at the end by arm and seed, by study]({SAVED.with_suffix('.png').name})"]
    for name, title in TITLES.items():
        blocks += [f"## {title}", *(section(studies[name]) if name in studies else ["Not run."])]
    return "\n\n".join(block.rstrip("\n") for block in blocks)


def section(saved: Saved) -> list[str]:
    """One study: verdict, what the context helps, accuracy by arm, tokens by kind, rollouts."""
    arms = {(arm["name"], arm["seed"]): arm for arm in saved["arms"]}
    names = {name for name, _ in arms}
    if OWN not in names:
        return [f"Not run yet: {OWN} has not finished."]
    some = saved["arms"][0]
    rollouts = next((arm["rollouts"] for arm in saved["arms"] if arm["rollouts"]), [])
    return [
        verdict(arms),
        f"{smollm2_cpu.described(saved)} Learning rate {some['learning_rate']:g}, {some['dtype']}. The "
        f"answer is what `{saved['question']['match']}` finds in a completion.",
        _context(saved),
        smollm2_cpu.table(arms),
        smollm2_cpu.differences(arms),
        smollm2_cpu.INTERVALS,
        "### Which tokens does the context teach, and does teachability find them?",
        f"The first columns are about the rollouts of the first {FIRST} steps of all arms: each kind's share "
        "of the tokens, its mean D in nats and its mean C, and its share of all D. The columns *kept by* "
        "have the share of that kind which an arm selects over its whole run.",
        kinds_table(arms),
        found_words(arms),
        "### What the student writes",
        "Rollouts of the first and the last steps: the share that ends before the limit, and the share that "
        'says "Answer: N".',
        forms_table(arms),
        f"Three rollouts of the last step of {OWN}. The tokens that it selects are bold.",
        *(f"> {prompt}\n>\n> {text}" for prompt, text in rollouts),
    ]


def verdict(arms: Arms) -> str:
    """One sentence: how the published method does against random tokens and against all."""
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
    return " ".join(smollm2_cpu.points(estimate))


def _context(saved: Saved) -> str:
    """What the context helps in greedy answers, and how far it moves the teacher."""
    parts = []
    if helps := saved["helps"]:
        parts.append(
            f"Before training the student's greedy answers to {helps['problems']} test problems are right in "
            f"{100 * helps['accuracy']['without']:.0f} % without the context and in "
            f"{100 * helps['accuracy']['with']:.0f} % with it."
        )
    if saved["check"]:
        items = {item["item"]: item for item in saved["check"]["items"]}
        nats = items["teacher context"]["figures"]
        parts.append(
            f"On {nats['tokens']} tokens that the student sampled, KL(with its context || without) is "
            f"{nats['with_without_nats']:.2f} nats a token, the other way round "
            f"{nats['without_with_nats']:.2f} (`taopd check`)."
        )
    return " ".join(parts) or "What the context helps was not measured."


def kinds_table(arms: Arms) -> str:
    """A row for each kind of token: its share, D and C at the begin, the share that every arm keeps."""
    begin = by_kind(added(arm["kinds"]["begin"] for arm in arms.values()))
    kept = {
        name: by_kind(added(arm["kinds"]["all"] for arm in same))
        for name, same in smollm2_cpu.by_name(arms).items()
        if name != WHOLE
    }
    heads = ["token", "share, %", "D", "C", "of all D, %"]
    heads += [f"kept by {name}, %" for name in kept]
    rows = []
    for kind, found in begin.items():
        shares = [
            f"{100 * of_arm[kind]['kept']:.0f}" if kind in of_arm else ""
            for of_arm in kept.values()
        ]
        numbers = (
            f"{100 * found['share']:.1f}",
            f"{found['disagreement']:.2f}",
            f"{found['compatibility']:.2f}",
            f"{100 * found['share_of_disagreement']:.0f}",
        )
        rows.append([WORDS[kind], *numbers, *shares])
    return "\n".join(markdown_table(heads, rows)) + "\n"


def found_words(arms: Arms) -> str:
    """How much teachability keeps of the kind with the largest mean D at the begin."""
    begin = by_kind(added(arm["kinds"]["begin"] for arm in arms.values()))
    taught = max(begin, key=lambda kind: begin[kind]["disagreement"])
    own = smollm2_cpu.by_name(arms)[OWN]
    kept = by_kind(added(arm["kinds"]["all"] for arm in own))
    budget = float(np.mean([arm["kept_fraction"] for arm in own]))
    share = kept[taught]["kept"] if taught in kept else 0.0
    return (
        f"The context moves the teacher most at: {WORDS[taught]} ({begin[taught]['disagreement']:.2f} nats). "
        f"Teachability keeps {100 * share:.0f} % of these tokens, {share / budget:.1f} times as many as a "
        f"random choice of {100 * budget:.0f} % does."
    )


def forms_table(arms: Arms) -> str:
    """By arm: share of rollouts that end, and share with an "Answer: N", at the begin and at the end."""
    heads = ("arm", "ends, begin, %", "end, %", "says Answer: N, begin, %", "end, %")
    rows = []
    for name, same in smollm2_cpu.by_name(arms).items():
        shares = [
            100
            * sum(arm["texts"][steps][what] for arm in same)
            / sum(arm["texts"][steps]["rollouts"] for arm in same)
            for what in ("end", "answer")
            for steps in ("begin", "end")
        ]
        rows.append([name, *(f"{share:.0f}" for share in shares)])
    return "\n".join(markdown_table(heads, rows)) + "\n"


if __name__ == "__main__":
    parser = Arguments(description=__doc__)
    for name, title in TITLES.items():
        parser.add_argument(
            f"--{name}", type=existing_folder, help=f"folder of a study: {title.lower()}"
        )
    folders = {name: run for name, run in vars(parser.parse_args()).items() if run is not None}
    studies = json.loads(SAVED.read_text()) if SAVED.exists() else {}
    for name, run in folders.items():
        studies[name] = gathered(run, studies.get(name))
    if not any(saved["arms"] for saved in studies.values()):
        raise SystemExit("no arm has finished: name the folder of a study that has one")
    write_text(SAVED, json.dumps(studies) + "\n")
    smollm2_cpu.save_picture(
        {
            title: saved
            for name, title in TITLES.items()
            if (saved := studies.get(name, {})).get("arms")
        },
        SAVED.with_suffix(".png"),
    )
    write_generated(SAVED.with_suffix(".md"), page(studies))
    print(SAVED.with_suffix(".md"))
