"""The page about the diagnostic on SmolLM2-135M, from what `scripts/diagnostic-real.sh` wrote.

python -m scripts.pages.diagnostic_real runs/diagnostic-real
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.arguments import Arguments, existing_folder
from taopd.report.generated_part import markdown_table
from taopd.runs.jsonl import write_text

PAIRS = {
    "student": "pair 1, a student that knows the form",
    "instruct": "pair 2, a student that does not",
}
"""Folder of `scripts/diagnostic-real.sh`, and what its student is."""
PAGE = Path("docs/results/smollm2-diagnostic.md")
FILES = Path("docs/results/diagnostic")
INTRODUCTION = (
    "Which disagreement between student and teacher is learned, and do D and C predict it? The "
    "fixed-context diagnostic asks this on the two pairs of [smollm2.md](smollm2.md).\n\n"
    "On each pair 150 completions of the student were frozen before training, and both models scored every "
    "token of them (K = 16). Then the student was trained for 24 steps on all tokens, once. The *gain* of a "
    "token is how far the KL to the teacher fell there, from the student before to the last checkpoint. "
    "Intervals are 95 % bootstraps over prompts. The claims are those of [diagnostic.md](diagnostic.md); "
    "[formulas](../math.md) defines them.\n\n"
    "Written by `python -m scripts.pages.diagnostic_real` from what `bash scripts/diagnostic-real.sh` leaves "
    "after `make real`."
)
KINDS = ("holds", "does not hold", "undecided here", "cannot be told")


def page(folder: Path) -> str:
    """The page in Markdown; verdicts and a picture of each pair are copied beside it."""
    parts = [
        "# What was learnable? The fixed-context diagnostic on SmolLM2-135M\n",
        INTRODUCTION + "\n",
    ]
    for name, words in PAIRS.items():
        parts += _where_it_loses(folder / name, words)
    for name, words in PAIRS.items():
        if (folder / name / "report" / "verdicts.json").exists():
            parts += [f"## {words[0].upper()}{words[1:]}\n", *_pair(folder / name, name)]
        else:
            parts.append(f"## {words[0].upper()}{words[1:]}\n\nNot run.\n")
    return "\n".join(parts)


def _where_it_loses(folder: Path, words: str) -> list[str]:
    """A sentence on the one-step test of a pair, and the claims that hold in no scale of the gain."""
    if not (folder / "one-step/summary.parquet").exists():
        return []
    summary = _chosen(pd.read_parquet(folder / "one-step/summary.parquet"))
    found = summary[summary["measure"] == "gain_reverse_fresh"].set_index("selector")
    gains, batches = found["mean"], int(summary["num_batches"].max())
    order = ", ".join(f"{name} {1000 * gain:.0f}" for name, gain in gains.sort_values().items())
    ours, chance = gains["teachability"], gains["random"]
    less, more = ("teachability", "random")[:: 1 if ours < chance else -1]
    verb = "teaches **less** than one" if ours < chance else "teaches more than one"
    verb += " on a random tenth"
    if found["high"][less] >= found["low"][more]:
        verb += f", but by less than its {batches} batches differ"
    verdicts = json.loads((folder / "report/verdicts.json").read_text())
    claims = {each["claim"] for each in verdicts}
    held = {each["claim"] for each in verdicts if each["verdict"] == "holds"}
    told = {each["claim"] for each in verdicts if each["verdict"] != "cannot be told"}
    if told:
        rest = f"{len(told)} can be told here, and {len(held)} hold by at least one measure of the gain"
    else:
        rest = "none can be told here"
    return [
        f"**{words[0].upper()}{words[1:]}.** One step on the tenth with the highest teachability {verb}. On "
        f"contexts of other prompts the reverse KL falls by, in 1e-3 nats: {order}. Of the {len(claims)} "
        f"claims {rest}.\n"
    ]


def _chosen(summary: pd.DataFrame) -> pd.DataFrame:
    return summary[(summary["optimizer"] == "adamw") & (summary["variant"] == "equal_norm")]


def _pair(folder: Path, name: str) -> list[str]:
    verdicts = json.loads((folder / "report/verdicts.json").read_text())
    copy = FILES / f"smollm2-{name}.json"
    write_text(copy, json.dumps(verdicts, indent=1) + "\n")
    parts = [
        _spread(folder),
        _verdicts(verdicts),
        f"Every verdict with its interval: [{copy.name}](diagnostic/{copy.name}).\n",
    ]
    picture = folder / "report/gain_vs_disagreement.png"
    if picture.exists():
        to = FILES / f"smollm2-{name}-gain_vs_disagreement.png"
        shutil.copyfile(picture, to)
        parts.append(f"![Gain against D, colored by C](diagnostic/{to.name})\n")
    summary = folder / "one-step/summary.parquet"
    if summary.exists():
        parts.append(_one_step(pd.read_parquet(summary)))
    return parts


def _spread(folder: Path) -> str:
    (tokens,) = (folder / "bank").glob("tokens*.parquet")
    table = pd.read_parquet(tokens)
    c, d = table["compatibility_k16"], table["disagreement_k16"]
    at = ", ".join(f"{c.quantile(q):.5f}" for q in (0.01, 0.05, 0.5))
    out = (d * (1 - c)).sum() / d.sum()
    return (
        f"{len(table):,} tokens were frozen. C has the quantiles {at} (1, 5 and 50 %). Where C is the same "
        "at nearly all tokens, claims about C cannot be told. D has a mean of "
        f"{d.mean():.3f} nats, and is above 0.05 at {100 * (d > 0.05).mean():.0f} % of the tokens. Its part "
        f"outside the student's top K, D (1 - C), is {100 * out:.1f} % of all D.\n"
    )


def _verdicts(verdicts: list[dict[str, Any]]) -> str:
    claims = dict.fromkeys(each["claim"] for each in verdicts)
    rows = []
    for claim in claims:
        counts = [
            sum(each["claim"] == claim and each["verdict"] == kind for each in verdicts)
            for kind in KINDS
        ]
        rows.append([claim, *(str(count or "") for count in counts)])
    head = (
        "Each claim is judged by four measures of the gain: in forward and in reverse KL, each in nats and "
        "as a share of the KL before training. The table counts the verdicts:\n\n"
    )
    return head + "\n".join(markdown_table(("claim", *KINDS), rows)) + "\n"


def _one_step(summary: pd.DataFrame) -> str:
    chosen = _chosen(summary)
    measures = {
        "gain_reverse_fresh": "reverse KL, fresh",
        "gain_forward_fresh": "forward KL, fresh",
        "spearman_reverse_batch": "Spearman",
    }
    rows = []
    for selector in chosen["selector"].unique():
        cells = []
        for measure in measures:
            found = chosen[(chosen["selector"] == selector) & (chosen["measure"] == measure)]
            if found.empty:
                cells.append("")
                continue
            one, scale = found.iloc[0], 1 if measure.startswith("spearman") else 1000
            numbers = [scale * one[key] for key in ("mean", "low", "high")]
            cells.append(
                f"{numbers[0]:.2f}" if scale == 1 else "{:.1f} [{:.1f}, {:.1f}]".format(*numbers)
            )
        rows.append([selector, *cells])
    batches = int(chosen["num_batches"].max())
    head = (
        "What one step teaches. For each selector one AdamW step is made from the same frozen batch, on 10 % "
        "of its tokens (`full`: on all). All updates are scaled to the same norm. The KL columns say how far "
        "the KL to the teacher falls on contexts of other prompts, in thousandths of a nat per token: the "
        f"mean of {batches} batches and their [2.5, 97.5] percentiles. Spearman is the rank correlation of a "
        "token's score before the step with its gain, within the batch.\n\n"
    )
    return head + "\n".join(markdown_table(("selector", *measures.values()), rows)) + "\n"


if __name__ == "__main__":
    parser = Arguments(description=__doc__)
    parser.add_argument("folder", type=existing_folder, help="of scripts/diagnostic-real.sh")
    write_text(PAGE, page(parser.parse_args().folder))
    print(PAGE)
