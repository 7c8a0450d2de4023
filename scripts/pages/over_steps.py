"""The pages about accuracy over steps on SmolLM2-135M: the orders of the default, and a run of 200 steps.

    taopd compare recipes/studies/smollm2-order.yaml --workers 1
    python -m scripts.pages.over_steps runs/smollm2-order     # saves docs/results/smollm2-order.json
    python -m scripts.pages.over_steps                        # the page again from that file
    python -m scripts.pages.over_steps runs/smollm2-long --study smollm2-long

Arms are shown as far as they have come. Two arms of one seed, and two seeds of one arm, are compared at the
last checkpoint that both have reached. Arms that have not come to their first one are left out, and named.
Arms of the file that lie in no folder stay in it.
"""

import json
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from scripts.arguments import Arguments, existing_folder
from scripts.pages import forward_kl, smollm2_cpu
from taopd.experiments.study.file import load_study_file
from taopd.report.generated_part import write_generated
from taopd.runs.jsonl import read_jsonl

STUDIES = ("smollm2-order", "smollm2-long", "smollm2-long-pair1")
"""In recipes/studies; the page of each has its name."""
CURVES = (
    ("accuracy_curve", "accuracy_greedy"),
    ("accuracy_sampled_curve", "accuracy_sampled"),
    ("mean_tokens_greedy_curve", "mean_tokens_greedy"),
    ("right_curve", "right_greedy"),
)
"""What the file holds of every checkpoint of an arm, and its name in `accuracy.jsonl`."""


def generated(document: dict[str, Any], name: str) -> str:
    """What follows from the numbers, in Markdown."""
    study = load_study_file(Path(f"recipes/studies/{name}.yaml"))
    arms = {arm["name"]: arm for arm in document["arms"]}
    wanted = [name_of(arm["name"], seed) for seed in study.seeds for arm in study.arms]
    # An arm of a rule that is gone cannot be run again, and is in no study.
    gone = [each for each in arms if each not in wanted]
    order = [each for each in wanted if each in arms] + gone
    reached = max(arm["accuracy_curve"][-1][0] for arm in document["arms"])
    settings = f"{reached} of {study.config['max_steps']} steps of 16 rollouts"
    _, right = document["arms"][0]["right_curve"][0]
    lines = [
        forward_kl.about(document, wanted, settings, len(right)),
        f"![Accuracy over steps by arm]({name}.png)\n",
        *forward_kl.table(arms, order),
        *differences(arms, order),
    ]
    return "\n".join(lines)


def differences(arms: dict[str, Any], order: list[str]) -> list[str]:
    """Pairs of one seed or of one arm (see `name_of`), in a table for each last checkpoint of a pair."""
    tables: dict[int, list[tuple[str, str, str, str]]] = {}
    for one, other in combinations(order, 2):
        mine, theirs = (dict(arms[name]["right_curve"]) for name in (one, other))
        both = mine.keys() & theirs.keys()
        if both and set(one.split(", ")) & set(other.split(", ")):
            step = max(both)
            tables.setdefault(step, []).append((one, other, mine[step], theirs[step]))
    return [
        line
        for step, pairs in sorted(tables.items(), reverse=True)
        for line in ("", f"After {step} steps:", "", *forward_kl.difference_table(pairs))
    ]


def gathered(runs: list[Path], saved: Path | None = None) -> dict[str, Any]:
    """What the page shows of the arms of a study, which may lie in several folders.

    Args:
        saved: the page's file; an arm of it that is in no folder stays.
    """
    known = json.loads(saved.read_text()) if saved and saved.exists() else {"arms": []}
    arms = []
    for path in (found for run in runs for found in sorted(run.glob("arms/*/accuracy.jsonl"))):
        points = read_jsonl(path)
        about = json.loads((path.parent / "arm.json").read_text())
        if len(points) > 1:
            curves = {name: [(point["step"], point[of]) for point in points] for name, of in CURVES}
            arms.append({"name": name_of(about["name"], about["seed"])} | curves)
    names = {arm["name"] for arm in arms}
    kept = [arm for arm in known["arms"] if arm["name"] not in names]
    head = known if kept else smollm2_cpu.made_with(runs[0])
    return head | {"arms": kept + arms}


def name_of(arm: str, seed: int) -> str:
    """An arm with its seed."""
    return f"{arm}, seed {seed}"


def main() -> None:
    """Gather, draw and write the page of a study."""
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=existing_folder, nargs="*", help="folders of the study")
    parser.add_argument("--study", choices=STUDIES, default=STUDIES[0])
    args = parser.parse_args()
    saved = Path(f"docs/results/{args.study}.json")
    document = forward_kl.saved_document(saved, args.runs, partial(gathered, saved=saved))
    write_generated(saved.with_suffix(".md"), generated(document, args.study))
    print(saved.with_suffix(".md"))


if __name__ == "__main__":
    main()
