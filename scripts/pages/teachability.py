"""The picture of the concept page: D, C and what is kept, token by token, on two completions.

    python -m scripts.pages.teachability docs/concepts/tokens.json docs/concepts/teachability.png

The file holds, for each completion: tokens, D (nats), C, which of them the selector keeps, and both models'
lists (log-probs) at one token. They are entries of `rollouts.jsonl`, of the first step of `make real` and of
recipes/tiny.yaml. In the former a tenth of the logged tokens counts as kept, those with the largest D~ C~.
"""

import json
import math
from pathlib import Path
from typing import Any

from scripts.arguments import Arguments, existing_file
from taopd.report.figures.style import COLORS, plt

HIGH, LOW = COLORS[0], COLORS[1]
SHOWN = {"Ġ": "␣", "<|im_end|>": "end", "<eos>": "end"}


def draw(completions: list[dict[str, Any]], path: Path) -> None:
    """One row a completion: bars of D on the left, the two lists at one token on the right."""
    figure, rows = plt.subplots(
        len(completions),
        2,
        figsize=(10.5, 2.9 * len(completions)),
        gridspec_kw={"width_ratios": (3.2, 1)},
        layout="constrained",
        squeeze=False,
    )
    for (bars, lists), completion in zip(rows, completions, strict=True):
        _bars(bars, completion)
        _lists(lists, completion)
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=HIGH),
        plt.Rectangle((0, 0), 1, 1, facecolor=LOW, hatch="//", edgecolor="white"),
        plt.Line2D([], [], marker="^", color="black", linestyle="none"),
    ]
    words = ["C above 0.5: within the student's reach", "C below 0.5: out of reach", "trains"]
    figure.legend(handles, words, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _bars(axes: Any, completion: dict[str, Any]) -> None:
    values, places = completion["disagreement"], range(len(completion["tokens"]))
    top = 1.25 * max(values)
    for place, value, compatible, kept in zip(
        places, values, completion["compatibility"], completion["kept"], strict=True
    ):
        reach = compatible > 0.5
        look = {"color": HIGH} if reach else {"facecolor": LOW, "hatch": "//", "edgecolor": "white"}
        axes.bar(place, max(value, top / 150), width=0.8, **look)
        if kept:
            axes.plot(place, value + top / 12, marker="^", color="black")
    labels = [SHOWN.get(token, token.replace("Ġ", "")) for token in completion["tokens"]]
    axes.set_xticks(list(places), labels, fontsize=8, rotation=45 if len(labels) > 12 else 0)
    axes.set(ylim=(0, top), ylabel="D, nats")
    axes.set_title(completion["title"], loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _lists(axes: Any, completion: dict[str, Any]) -> None:
    """Both models' probabilities of the words that either has at the top, at one token."""
    student, teacher = (dict(completion[model]) for model in ("student", "teacher"))
    names = sorted(
        student | teacher, key=lambda name: -max(_chance(student, name), _chance(teacher, name))
    )
    for index, (model, values) in enumerate({"student": student, "teacher": teacher}.items()):
        places = [row + 0.4 * index - 0.2 for row in range(len(names))]
        shades = {"color": ("#BBBBBB", "#333333")[index], "label": model}
        axes.barh(places, [_chance(values, name) for name in names], height=0.38, **shades)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(max(4.5, len(names) - 0.5), -0.5)  # bars of one height in all rows
    axes.set_xlim(0, 1.05)
    axes.set_xlabel("probability", fontsize=8)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    number, word = completion["at"] + 1, completion["tokens"][completion["at"]]
    share = completion["compatibility"][completion["at"]]
    axes.set_title(
        f"both lists at token {number}, '{word}': C = {share:.0%}", loc="left", fontsize=9
    )
    axes.spines[["top", "right"]].set_visible(False)


def _chance(values: dict[str, float], name: str) -> float:
    return math.exp(values[name]) if name in values else 0.0


if __name__ == "__main__":
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=existing_file, help="tokens and their signals, .json")
    parser.add_argument("target", type=Path, help="the picture, .png")
    options = parser.parse_args()
    draw(json.loads(options.source.read_text(encoding="utf-8")), options.target)
