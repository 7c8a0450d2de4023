"""All pages of the site, written into a folder."""

import base64
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import yaml

from scripts.site import reference
from scripts.site.links import Links
from scripts.site.nav import navigation
from scripts.site.places import NOTEBOOK, PAGES, ROOT, SPLIT, Piece, page_of, pieces
from taopd.report.generated_part import markdown_table

STYLE = """/* Tables as wide as their text; long code scrolls within itself. */
.md-grid { max-width: 76rem; }
.md-typeset table:not([class]) { font-size: .68rem; }
.md-typeset table:not([class]) code { white-space: nowrap; }
"""


def sources() -> list[str]:
    """Markdown files of the repository that are on the site."""
    docs = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    beside = [name for name in PAGES if not name.startswith("docs/") and (ROOT / name).exists()]
    return [*beside, *docs]


def write_site(folder: Path) -> None:
    """Write every page, picture and file into `folder`/docs, and `folder`/mkdocs.yml; both are replaced."""
    target = folder / "docs"
    shutil.rmtree(target, ignore_errors=True)
    made = [piece for source in sources() for piece in pieces(source)]
    made = [
        _with_scripts(piece) if piece.source == "examples/README.md" else piece for piece in made
    ]
    made.append(_notebook(target))
    made += [_tests_page(), _results_page(made)]
    links = Links(made)
    for piece in made:
        _write(target / piece.page, links.rewrite(piece))
    for page, text in reference.pages():
        _write(target / page, text)
    for source, place in links.assets.items():
        _write(target / place, (ROOT / source).read_bytes())
    _write(target / "site.css", STYLE)
    titles = {
        path.relative_to(target).as_posix(): path.read_text(encoding="utf-8")
        .splitlines()[0]
        .strip("# ")
        for path in sorted(target.rglob("*.md"))
    }
    here = Path(__file__).parent
    settings = (here / "mkdocs.yml").read_text(encoding="utf-8")
    settings = settings.replace("EXTENSION", str(here / "griffe_examples.py"))
    listed = yaml.safe_dump({"nav": navigation(titles)}, sort_keys=False, allow_unicode=True)
    _write(folder / "mkdocs.yml", f"{settings}\n{listed}")


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _with_scripts(piece: Piece) -> Piece:
    """The page of examples with the scripts themselves."""
    scripts = [
        f"## {path.name}\n\n```python\n{path.read_text(encoding='utf-8').rstrip()}\n```"
        for path in sorted((ROOT / "examples").glob("*.py"))
    ]
    return replace(piece, text="\n\n".join([piece.text.rstrip(), *scripts]) + "\n")


def _notebook(target: Path) -> Piece:
    """The notebook as a page: its cells, and the outputs that are stored in it."""
    source, page = NOTEBOOK
    cells = json.loads((ROOT / source).read_text(encoding="utf-8"))["cells"]
    parts = []
    for number, cell in enumerate(cells):
        text = "".join(cell["source"]).strip()
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
                continue
            picture = f"start/notebook-{number}.png"
            _write(target / picture, base64.b64decode(output["data"]["image/png"]))
            parts.append(f'<img alt="Output of cell {number}" src="{Path(picture).name}">')
    return Piece(source, page, "\n\n".join(parts) + "\n", frozenset())


def _tests_page() -> Piece:
    """How to add something and which test guards what: two sections of the architecture page."""
    source = "docs/architecture.md"
    text = (ROOT / source).read_text(encoding="utf-8")
    wanted = ("How to add", "Which test guards what")
    sections = [part for part in text.split("\n## ")[1:] if part.startswith(wanted)]
    body = "\n\n".join(f"## {part.strip()}" for part in sections)
    return Piece(
        source, "contributing/tests.md", f"# Tests and how to add\n\n{body}\n", frozenset()
    )


def _results_page(made: list[Piece]) -> Piece:
    """A list of the pages of results, each with its first sentence."""
    rows = []
    for piece in made:
        if piece.source.startswith("docs/results/") and piece.source not in SPLIT:
            title = piece.text.splitlines()[0].lstrip("# ")
            name = Path(page_of(piece.source)).name
            rows.append((f"[{title}]({name})", _first_sentence(piece.text)))
    table = markdown_table(("page", "what it says first"), rows, texts=2)
    text = "\n".join(["# Results", "", *table]) + "\n"
    return Piece("docs/results/index.md", "results/index.md", text, frozenset())


def _first_sentence(text: str) -> str:
    """The first paragraph of prose, up to its first full stop, without links."""
    for paragraph in re.sub(r"```.*?```", "", text, flags=re.DOTALL).split("\n\n")[1:]:
        line = " ".join(paragraph.split())
        if line and line[0] not in "|!#<`" and not line.startswith("Written by"):
            return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line).split(". ")[0].rstrip(".") + "."
    return ""
