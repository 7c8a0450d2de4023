"""The pages that the browser tests open: `make_pages.py FOLDER [NAME ...]` writes NAME.html there."""

import sys
from pathlib import Path

import numpy as np

from taopd.report.page import write_report
from tests.browser import synthetic


def small(root: Path) -> list[Path]:
    """Two runs that begin with the same rollouts under two selectors, and a study."""
    first = [
        synthetic.rollout(np.random.default_rng(seed), 60 + seed, step=seed) for seed in range(8)
    ]
    for index, line in enumerate(first):
        line["truncated"] = index in (2, 5)
    second = [line | {"kept": [not kept for kept in line["kept"]]} for line in first[:3]]
    return [
        synthetic.write_run(root / "a", first),
        synthetic.write_run(root / "b", second, selector="random"),
        synthetic.write_study(root / "study"),
    ]


def hostile(root: Path) -> list[Path]:
    """A run whose every text tries to do harm."""
    name = "h<b>&'\"\u202e"
    return [synthetic.write_run(root / name, synthetic.hostile_lines(), selector="</script>")]


def large(root: Path, *, whole: bool = False) -> list[Path]:
    """200 rollouts of 512 tokens with top-16 of both models."""
    lines = [
        synthetic.rollout(np.random.default_rng(seed), 512, step=seed, whole=whole)
        for seed in range(200)
    ]
    return [synthetic.write_run(root / "large", lines)]


PAGES = {"small": small, "hostile": hostile, "large": large}


def main() -> None:
    """Make the named pages, all without a name."""
    folder = Path(sys.argv[1])
    for name in sys.argv[2:] or PAGES:
        sources = PAGES[name](folder / f"{name}-runs")
        write_report(sources, folder / f"{name}.html", match="exact")


if __name__ == "__main__":
    main()
