"""The page about the orders in which `method: reach` selected, on SmolLM2-135M.

    taopd compare recipes/studies/smollm2-order.yaml --workers 1
    python -m scripts.pages.two_orders runs/smollm2-order     # saves docs/results/smollm2-order.json
    python -m scripts.pages.two_orders                        # the page again from that file

Arms are shown as far as they have come, up to the last checkpoint that all have reached. Those that have not
come to their first one are left out, and named. An arm of a form that is gone is in its folder alone.
"""

import json
from pathlib import Path
from typing import Any

from scripts.pages import forward_kl
from taopd.experiments.study.file import load_study_file
from taopd.report.generated_part import write_generated

STUDY = Path("recipes/studies/smollm2-order.yaml")
SAVED = Path("docs/results/smollm2-order.json")
PAGE = SAVED.with_suffix(".md")


def generated(document: dict[str, Any]) -> str:
    """What follows from the numbers, in Markdown."""
    study = load_study_file(STUDY)
    arms = {arm["name"]: arm for arm in document["arms"]}
    wanted = [name_of(arm["name"], seed) for seed in study.seeds for arm in study.arms]
    # An arm of a rule that is gone cannot be run again, and is in no study.
    gone = [name for name in arms if name not in wanted]
    order = [name for name in wanted if name in arms] + gone
    reached = arms[order[0]]["accuracy_curve"][-1][0]
    settings = f"{reached} of {study.config['max_steps']} steps of 16 rollouts"
    return "\n".join(
        [
            forward_kl.about(document, wanted, settings),
            f"![Accuracy over steps by arm]({PAGE.with_suffix('.png').name})\n",
            *forward_kl.table(arms, order),
            "",
            *forward_kl.differences(arms, order),
        ]
    )


def gathered(runs: list[Path]) -> dict[str, Any]:
    """What the page shows of the arms of a study, which may lie in several folders."""
    arms = []
    for path in (found for run in runs for found in sorted(run.glob("arms/*/accuracy.jsonl"))):
        points = [json.loads(line) for line in path.read_text().splitlines()]
        about = json.loads((path.parent / "arm.json").read_text())
        if len(points) > 1:
            arms.append((name_of(about["name"], about["seed"]), points))
    common = min(len(points) for _, points in arms)
    rows = [
        {
            "name": name,
            "accuracy_curve": [(each["step"], each["accuracy_greedy"]) for each in points],
            "accuracy_sampled_curve": [(each["step"], each["accuracy_sampled"]) for each in points],
            "mean_tokens_greedy_curve": [
                (each["step"], each["mean_tokens_greedy"]) for each in points
            ],
            "right": points[-1]["right_greedy"],
        }
        for name, points in ((name, points[:common]) for name, points in arms)
    ]
    return forward_kl.made_with(runs[0]) | {"arms": rows}


def name_of(arm: str, seed: int) -> str:
    """An arm with its seed."""
    return f"{arm}, seed {seed}"


if __name__ == "__main__":
    write_generated(PAGE, generated(forward_kl.saved_document(SAVED, __doc__, gathered)))
    print(PAGE)
