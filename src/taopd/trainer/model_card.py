"""The model card of a run, `README.md` in its folder: that of TRL, corrected.

TRL cites its own paper, and writes `None` for what it does not know: a base model that is a folder, and a hub
id where nothing is uploaded.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from taopd.runs.versions import installed_version
from taopd.trainer.settings.methods import running

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

_AUTHORS = (
    "Yuanyi Wang and Su Lu and Yanggan Gu and Pengkai Wang and Yifan Yang and Zhaoyi Yan and "
    "Congkai Xie and Jianmin Wu and Hongxia Yang"
)
_TITLE = "Not All Disagreement Is Learnable: Token Teachability in On-Policy Distillation"
PAPER = {
    "title": _TITLE,
    "id": "2605.26844",
    "citation": f"@article{{wang2026not,\n    title   = {{{{{_TITLE}}}}},\n    author  = {{{_AUTHORS}}},\n"
    "    year    = 2026,\n    journal = {arXiv preprint arXiv:2605.26844},\n}",
}
"""What the card cites, as TRL has it; the same as in CITATION.cff."""


def completed(card: str, args: "TeachabilityConfig", base: str) -> str:
    """TRL's card with what it leaves open, and with a sentence on which tokens trained.

    Args:
        base: name or path of the model that was trained; "" where it has none.
    """
    # TRL names hub ids alone, and writes None for a folder. Its name is enough: a path is private.
    name = Path(base).name
    named = f"`{name}`" if name else "a model without a name"
    card = card.replace("[None](https://huggingface.co/None)", named)
    card = card.replace('model="None"', 'model="path/to/the/saved/model"')
    line = next((row for row in card.splitlines() if "trained using [TRL]" in row), None)
    return card if line is None else card.replace(line, f"{line}\n{_trained_words(args)}")


def _trained_words(args: "TeachabilityConfig") -> str:
    """Which tokens trained and how, in a sentence for the model card."""
    with_taopd = f"taopd {installed_version('taopd')} trained"
    if running(args) == "full":
        return f"{with_taopd} every token; loss `{args.loss}`."
    share = f"{100.0 * args.budget:.3g} %"
    if args.budget_end is not None:
        share += f" to {100.0 * args.budget_end:.3g} %"
    return (
        f"{with_taopd} {share} of the tokens: `method: {args.method}`, `selector: {args.selector}`, loss "
        f"`{args.loss}`."
    )
