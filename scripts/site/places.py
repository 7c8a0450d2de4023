"""Where a file of the repository stands on the site, and its long guide as one page a subject."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing/contributing.md",
    "benchmarks/RESULTS.md": "results/benchmarks.md",
    "examples/README.md": "start/examples.md",
    "docs/tasks.md": "start/tasks.md",
    "docs/teachers.md": "guides/teachers.md",
    "docs/scaling.md": "guides/scaling.md",
    "docs/reliability.md": "guides/reliability.md",
    "docs/check.md": "guides/check.md",
    "docs/report.md": "guides/report.md",
    "docs/verl.md": "guides/verl.md",
    "docs/offline.md": "guides/offline.md",
    "docs/architecture.md": "contributing/architecture.md",
    "docs/math.md": "concepts/math.md",
    "docs/released-code.md": "concepts/released-code.md",
}
"""Files of the repository and their pages; other pages of docs/ keep their place below docs/."""
FOLDERS = {
    "docs/results": "results/index.md",
    "benchmarks/results": "results/benchmarks.md",
    "recipes": "reference/recipes.md",
    "examples": "start/examples.md",
}
"""Folders that pages link to, also by a folder or file within, and the pages that stand for them."""
NOTEBOOK = ("examples/diagnostic.ipynb", "start/notebook.md")
Parts = dict[str, tuple[str, tuple[str, ...]]]
SPLIT: dict[str, Parts] = {
    "docs/guide.md": {
        "start/from-trl.md": ("From a TRL script to this one", ()),
        "guides/models.md": ("Prompts and models", ("Prompts", "Adapters and processors")),
        "guides/selector.md": (
            "Choosing a selector and a budget",
            (
                "Budget",
                "Selectors",
                "How much, where, and with what weight",
                "Your own selector",
                "The released code's arithmetic",
            ),
        ),
        "guides/comparing.md": ("Comparing", ("Comparing",)),
        "guides/long-runs.md": ("Long runs", ("Long runs", "A cheaper step")),
        "guides/many-gpus.md": ("On many GPUs", ("On many GPUs",)),
        "guides/served.md": (
            "Other teachers",
            ("A teacher that sees more", "A teacher on another machine"),
        ),
        "guides/files.md": ("Report and files", ("Report", "Files of a run")),
    },
    "docs/start.md": {
        "start/install.md": ("Install", ("Install",)),
        "start/demo.md": ("Two-minute demo", ("Two-minute demo",)),
        "start/real-model.md": ("A real model", ("A real model",)),
        "start/own-pair.md": ("Your own pair", ("Your own pair",)),
    },
    "docs/concepts.md": {
        "concepts/teachability.md": ("Teachability", ("Teachability",)),
        "concepts/diagnostic.md": (
            "The fixed-context diagnostic",
            ("The fixed-context diagnostic",),
        ),
        "concepts/collapse.md": ("What collapses, and why", ("What collapses, and why",)),
    },
}
"""Long pages: the page, its title, and the sections of level two that stand on it. A section that is named
nowhere stays with the one before it."""


@dataclass(frozen=True)
class Piece:
    """A page of the site that is made from a file, or from a part of one."""

    source: str
    """The file it is made from, relative to the root."""
    page: str
    text: str
    anchors: frozenset[str]


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def without_code(text: str) -> str:
    """The text with code blocks and code spans left empty, line by line."""
    return re.sub(r"`[^`\n]*`", _blank, _fences_blank(text))


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def headings(text: str) -> list[tuple[int, str, int]]:
    """Level, title and position of every heading outside of code."""
    found = re.finditer(r"^(#+) (.+)$", _fences_blank(text), re.MULTILINE)
    return [(len(match[1]), match[2].strip(), match.start()) for match in found]


def _fences_blank(text: str) -> str:
    return re.sub(r"^(```.*?^```)", _blank, text, flags=re.MULTILINE | re.DOTALL)


def page_of(source: str) -> str:
    """The page that a Markdown file of the repository becomes; the first of its parts."""
    if source in SPLIT:
        return next(iter(SPLIT[source]))
    return PAGES.get(source, source.removeprefix("docs/"))


def shown_at(file: str) -> str:
    """The page and heading where the text of an example stands; "" for every other file."""
    if file == NOTEBOOK[0]:
        return NOTEBOOK[1]
    name = file.removeprefix("examples/")
    return (
        f"{PAGES['examples/README.md']}#{slug(name)}"
        if name != file and name.endswith(".py")
        else ""
    )


def pieces(source: str) -> list[Piece]:
    """The pages that a Markdown file becomes."""
    text = (ROOT / source).read_text(encoding="utf-8")
    if source not in SPLIT:
        return [Piece(source, page_of(source), text, _anchors(text))]
    parts = SPLIT[source]
    place = {title: page for page, (_, titles) in parts.items() for title in titles}
    current, bodies = next(iter(parts)), dict.fromkeys(parts, "")
    tops = [(title, start) for level, title, start in headings(text) if level == 2]
    ends = [*(start for _, start in tops), len(text)]
    for (title, start), end in zip([("", 0), *tops], ends, strict=True):
        current = place.get(title, current)
        bodies[current] += text[start:end]
    made = []
    for page, (title, _) in parts.items():
        # The page's title stands for the section of the same name, and for the file's own title.
        body = re.sub(rf"^##? {re.escape(title)}\n", "", bodies[page], flags=re.MULTILINE)
        body = re.sub(r"\A# .*\n", "", body)
        made.append(Piece(source, page, f"# {title}\n\n{body.strip()}\n", _anchors(bodies[page])))
    return made


def _anchors(text: str) -> frozenset[str]:
    return frozenset(slug(title) for _, title, _ in headings(text))
