"""The pages about accuracy over steps on SmolLM2-135M: the orders of the default, and a run of 200 steps.

    taopd compare recipes/studies/smollm2-order.yaml --workers 1
    python -m scripts.pages.over_steps runs/smollm2-order     # saves docs/results/smollm2-order.json
    python -m scripts.pages.over_steps                        # the page again from that file
    python -m scripts.pages.over_steps runs/smollm2-long --study smollm2-long

Arms are shown as far as they have come, and compared at the last checkpoint that all have reached. Those that
have not come to their first one are left out, and named. Arms of the file that lie in no folder stay in it.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from scripts.arguments import Arguments, existing_folder
from scripts.pages import forward_kl, smollm2_cpu
from taopd.errors import ConfigError
from taopd.experiments.study.file import load_study_file
from taopd.report.generated_part import write_generated

STUDIES = ("smollm2-order", "smollm2-long", "smollm2-long-pair1")
"""In recipes/studies; the page of each has its name."""


def generated(document: dict[str, Any], name: str) -> str:
    """What follows from the numbers, in Markdown."""
    study = load_study_file(Path(f"recipes/studies/{name}.yaml"))
    arms = {arm["name"]: arm for arm in document["arms"]}
    wanted = [name_of(arm["name"], seed) for seed in study.seeds for arm in study.arms]
    # An arm of a rule that is gone cannot be run again, and is in no study.
    gone = [each for each in arms if each not in wanted]
    order = [each for each in wanted if each in arms] + gone
    reached = [arm["accuracy_curve"][-1][0] for arm in document["arms"]]
    settings = f"{max(reached)} of {study.config['max_steps']} steps of 16 rollouts"
    lines = [
        forward_kl.about(document, wanted, settings),
        f"![Accuracy over steps by arm]({name}.png)\n",
        *forward_kl.table(arms, order),
    ]
    if len(order) > 1:
        lines += ["", f"After {min(reached)} steps:", "", *forward_kl.differences(arms, order)]
    return "\n".join(lines)


def gathered(runs: list[Path], saved: Path | None = None) -> dict[str, Any]:
    """What the page shows of the arms of a study, which may lie in several folders.

    Args:
        saved: the page's file; an arm of it that is in no folder stays.

    Raises:
        ConfigError: if what the file holds of such an arm is of another checkpoint than what is compared now.
    """
    known = json.loads(saved.read_text()) if saved and saved.exists() else {"arms": []}
    arms = []
    for path in (found for run in runs for found in sorted(run.glob("arms/*/accuracy.jsonl"))):
        points = [json.loads(line) for line in path.read_text().splitlines()]
        about = json.loads((path.parent / "arm.json").read_text())
        if len(points) > 1:
            arms.append((name_of(about["name"], about["seed"]), points))
    names = {name for name, _ in arms}
    kept = [arm for arm in known["arms"] if arm["name"] not in names]
    # What is compared are the answers at the last checkpoint that all have reached.
    reached = [len(points) for _, points in arms] + [len(arm["accuracy_curve"]) for arm in kept]
    common = min(reached)
    if kept and common != min(len(arm["accuracy_curve"]) for arm in known["arms"]):
        raise ConfigError(
            f"{saved}: the answers of {kept[0]['name']} are of another checkpoint than the one that all arms "
            "have reached now. Give its folder too."
        )
    rows = [
        {
            "name": name,
            "accuracy_curve": [(each["step"], each["accuracy_greedy"]) for each in points],
            "accuracy_sampled_curve": [(each["step"], each["accuracy_sampled"]) for each in points],
            "mean_tokens_greedy_curve": [
                (each["step"], each["mean_tokens_greedy"]) for each in points
            ],
            "right": points[common - 1]["right_greedy"],
        }
        for name, points in arms
    ]
    head = known if kept else smollm2_cpu.made_with(runs[0])
    return head | {"arms": kept + rows}


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
