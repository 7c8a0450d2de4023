"""The page about two orders in which `method: reach` may select, on SmolLM2-135M.

    taopd compare recipes/studies/smollm2-order.yaml --workers 1
    python -m scripts.pages.two_orders runs/smollm2-order     # saves docs/results/smollm2-order.json
    python -m scripts.pages.two_orders                        # the page again from that file

Arms that have not finished are left out, and named.
"""

import json
from pathlib import Path
from typing import Any

from scripts.arguments import Arguments, existing_folder
from scripts.pages import forward_kl
from taopd.experiments.study.file import load_study_file
from taopd.report.generated_part import write_generated
from taopd.runs.jsonl import write_text

STUDY = Path("recipes/studies/smollm2-order.yaml")
SAVED = Path("docs/results/smollm2-order.json")
PAGE = SAVED.with_suffix(".md")


def generated(document: dict[str, Any]) -> str:
    """What follows from the numbers, in Markdown."""
    study = load_study_file(STUDY)
    arms = {arm["name"]: arm for arm in document["arms"]}
    wanted = [name_of(arm["name"], seed) for seed in study.seeds for arm in study.arms]
    order = [name for name in wanted if name in arms]
    missing = [name for name in wanted if name not in arms]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    about = (
        f"{study.config['max_steps']} steps of 16 rollouts, greedy accuracy on "
        f"{len(arms[order[0]]['right'])} problems, %. {document['device']}; {versions}; commit "
        f"{document['commit']}."
    )
    if missing:
        about += f" Not run: {', '.join(missing)}."
    return "\n".join(
        [
            about + "\n",
            f"![Accuracy over steps by arm]({PAGE.with_suffix('.png').name})\n",
            *forward_kl.table(arms, order),
            "",
            *forward_kl.differences(arms, order),
        ]
    )


def name_of(arm: str, seed: int) -> str:
    """An arm with its seed."""
    return f"{arm}, seed {seed}"


if __name__ == "__main__":
    parser = Arguments(description=__doc__)
    parser.add_argument("runs", type=existing_folder, nargs="*", help="folders of the study")
    if runs := parser.parse_args().runs:
        found = forward_kl.gathered(runs)
        for arm in found["arms"]:
            arm["name"] = name_of(arm["name"], arm["seed"])
        write_text(SAVED, json.dumps(found) + "\n")
    saved = json.loads(SAVED.read_text())
    forward_kl.draw(saved, PAGE.with_suffix(".png"))
    write_generated(PAGE, generated(saved))
    print(PAGE)
