"""The page about full, published and random with a forward KL, beside the default, on SmolLM2-135M.

    taopd compare recipes/studies/smollm2-forward.yaml --workers 1
    python -m scripts.pages.forward_kl runs/smollm2-forward     # saves docs/results/smollm2-forward.json
    python -m scripts.pages.forward_kl                          # the page again from that file

Arms that have not finished are left out, and named.
"""

import json
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

from scripts.arguments import Arguments, existing_folder
from scripts.pages import smollm2_cpu
from taopd.experiments.study import by_problem
from taopd.experiments.study.file import load_study_file
from taopd.report.figures.style import COLORS, MARKERS, plt
from taopd.report.generated_part import markdown_table
from taopd.runs.jsonl import write_text

STUDY = Path("recipes/studies/smollm2-forward.yaml")
SAVED = Path("docs/results/smollm2-forward.json")
PAGE = SAVED.with_suffix(".md")
KEPT = ("name", "seed", "accuracy_curve", "accuracy_sampled_curve", "mean_tokens_greedy_curve")
LEAD = (
    "What teaches a student that does not know the form of an answer: the selection of tokens, or the loss? "
    "**The loss comes first, then the selection.** With the reverse KL full distillation learns nothing in "
    "40 steps. With the forward KL it learns, and so does a random tenth of the tokens. The default method "
    "trains on a tenth too. It ends above the random tenth, and cannot be told from full distillation with "
    "the forward KL. After 20 steps it is behind both."
)
ARMS = (
    "The student is that of pair 2 of [smollm2.md](smollm2.md); the models were made on this machine. `full` "
    "trains on every token with the reverse KL, `full-forward` with the forward KL. `random-10-forward` "
    "trains on a random tenth of the tokens with the forward KL. `reach-10` is the default at 10 %. The "
    "default had an earlier form in this run: its KL penalty to the initial student faded within 20 steps, "
    "which takes 100 now. What else changed since: [reach_forms.md](reach_forms.md)."
)
ACCURACIES = (
    "Greedy accuracy by step in %. The last two columns are about the end of the run: the accuracy of "
    "sampled answers in %, and the mean length of a greedy answer in tokens."
)
DIFFERENCES = (
    "Differences of the greedy accuracy at the end, in points. All arms answer the same problems, so the "
    "differences are taken problem by problem. The intervals are about these training runs. They do not say "
    "what another training seed would give."
)


def gathered(runs: list[Path]) -> dict[str, Any]:
    """What the page shows of the finished arms of a study, which may lie in several folders."""
    arms = []
    for path in (found for run in runs for found in sorted(run.glob("arms/*/results.json"))):
        row = json.loads(path.read_text())
        arms.append({key: row[key] for key in KEPT} | {"right": row["right_greedy_curve"][-1][1]})
    return smollm2_cpu.made_with(runs[0]) | {"arms": arms}


def page(document: dict[str, Any]) -> str:
    """The page in Markdown."""
    study = load_study_file(STUDY)
    arms = {arm["name"]: arm for arm in document["arms"]}
    wanted = [arm["name"] for arm in study.arms]
    order = [name for name in wanted if name in arms]
    return "\n".join(
        [
            "# Selection or loss? SmolLM2-135M with a forward KL\n",
            LEAD + "\n",
            f"Written by `python -m scripts.pages.forward_kl` from `{SAVED}`, after `taopd compare {STUDY} "
            "--workers 1`.\n",
            ARMS + "\n",
            about(
                document,
                wanted,
                f"{study.config['max_steps']} steps of 16 rollouts, one seed",
                len(document["arms"][0]["right"]),
            ),
            f"![Accuracy over steps by arm]({PAGE.with_suffix('.png').name})\n",
            ACCURACIES + "\n",
            *table(arms, order),
            "",
            DIFFERENCES + "\n",
            *differences(arms, order),
            "",
        ]
    )


def about(document: dict[str, Any], wanted: list[str], settings: str, problems: int) -> str:
    """Settings, problems, machine, versions, and which of the wanted arms were not run."""
    names = [arm["name"] for arm in document["arms"]]
    missing = [name for name in wanted if name not in names]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return (
        f"{settings}, greedy accuracy on {problems} problems, %. "
        f"{document['device']}; {versions}; commit {document['commit']}."
        f"{' Not run: ' + ', '.join(missing) + '.' if missing else ''}\n"
    )


def table(arms: dict[str, Any], order: list[str]) -> list[str]:
    """A row for each arm; a cell that it has not come to is empty."""
    steps = sorted({step for name in order for step, _ in arms[name]["accuracy_curve"]})
    heads = ["arm", *(f"step {step}" for step in steps), "sampled, end", "tokens, end"]
    rows = []
    for name in order:
        arm = arms[name]
        known = {step: f"{100 * share:.3g}" for step, share in arm["accuracy_curve"]}
        shares = [known.get(step, "") for step in steps]
        sampled = 100 * arm["accuracy_sampled_curve"][-1][1]
        length = arm["mean_tokens_greedy_curve"][-1][1]
        rows.append([name, *shares, f"{sampled:.3g}", f"{length:.0f}"])
    return markdown_table(heads, rows)


def differences(arms: dict[str, Any], order: list[str]) -> list[str]:
    """The table of all pairs of arms."""
    return difference_table(
        (one, other, arms[one]["right"], arms[other]["right"])
        for one, other in combinations(order, 2)
    )


def difference_table(pairs: Iterable[tuple[str, str, str, str]]) -> list[str]:
    """A row for each pair of arms that do not agree on every problem: their names, and their answers."""
    rows = []
    for one, other, mine, theirs in pairs:
        if mine != theirs:
            first, second = ({0: {"right_greedy_curve": [(0, each)]}} for each in (mine, theirs))
            found = by_problem.difference(first, second)
            assert found is not None
            rows.append([f"{one} - {other}", *smollm2_cpu.points(found)])
    heads = ("difference, paired by problem", "points", "95 % over problems")
    return markdown_table(heads, rows, texts=(0, 2))


def draw(document: dict[str, Any], path: Path) -> None:
    """Greedy accuracy against steps: a thin line a seed, and of an arm with several seeds their mean."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    arms: dict[str, dict[str, dict[int, float]]] = {}
    for arm in sorted(document["arms"], key=lambda a: -a["accuracy_curve"][-1][1]):
        name, _, seed = arm["name"].partition(", seed ")
        curve = {step: 100 * share for step, share in arm["accuracy_curve"]}
        arms.setdefault(name, {})[seed] = curve
    for index, (name, curves) in enumerate(arms.items()):
        color = COLORS[index]
        if len(curves) > 1:
            for curve in curves.values():
                axes.plot(*zip(*curve.items(), strict=True), color=color, lw=0.8, alpha=0.45)
        # The mean of other seeds would jump where one of them ends.
        steps = sorted(set.intersection(*map(set, curves.values())))
        means = [sum(curve[step] for curve in curves.values()) / len(curves) for step in steps]
        words = f", mean of {len(curves)} seeds" if len(curves) > 1 else ""
        axes.plot(steps, means, color=color, marker=MARKERS[index], lw=2, label=f"{name}{words}")
    axes.set(xlabel="step", ylabel="greedy accuracy, %", ylim=(-1, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def saved_document(
    path: Path, runs: list[Path], gather: Callable[[list[Path]], dict[str, Any]]
) -> dict[str, Any]:
    """What the file holds, gathered anew from the folders where there are any; its picture is drawn."""
    if runs:
        write_text(path, json.dumps(gather(runs)) + "\n")
    document = json.loads(path.read_text())
    draw(document, path.with_suffix(".png"))
    return document


def main() -> None:
    """Gather, draw and write the page."""
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=existing_folder, nargs="*", help="folders of the study")
    write_text(PAGE, page(saved_document(SAVED, parser.parse_args().runs, gathered)))
    print(PAGE)


if __name__ == "__main__":
    main()
