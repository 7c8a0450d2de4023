"""Links of a repository's page, rewritten for the site."""

import os
import posixpath
import re
from collections.abc import Iterable

from scripts.site.places import FOLDERS, ROOT, Piece, page_of, shown_at, without_code

LINK = re.compile(r"(?<=\]\()([^)\s#]*)(#[\w-]+)?(?=\))")
OUTSIDE = re.compile(r"^(?:[a-z]+:|//)")


class Links:
    """Rewrites links; remembers which files of the repository must be copied.

    Args:
        pieces: all pages that are made from files.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = list(pieces)
        self.assets: dict[str, str] = {}
        """Files of the repository that pages show or link to, and where the site has them."""

    def rewrite(self, piece: Piece) -> str:
        """The piece's text with every link to a file or heading pointing into the site."""
        prose, text = without_code(piece.text), piece.text
        for match in reversed(list(LINK.finditer(prose))):
            if OUTSIDE.match(match[0]):
                continue
            target = self._target(piece, match[1], (match[2] or "")[1:])
            text = text[: match.start()] + target + text[match.end() :]
        return text

    def _target(self, piece: Piece, path: str, anchor: str) -> str:
        folder = posixpath.dirname(piece.source)
        file = posixpath.normpath(posixpath.join(folder, path)) if path else piece.source
        page, _, heading = (shown_at(file) or self._page(file, anchor)).partition("#")
        anchor = heading or anchor
        if page == piece.page:
            return f"#{anchor}" if anchor else posixpath.basename(page)
        base = posixpath.dirname(piece.page) or "."
        return posixpath.relpath(page, base) + (f"#{anchor}" if anchor else "")

    def _page(self, file: str, anchor: str) -> str:
        made = [piece for piece in self._pieces if piece.source == file]
        for piece in made if anchor else ():
            if anchor in piece.anchors:
                return piece.page
        if made:
            return page_of(file)
        for folder, page in FOLDERS.items():
            if file == folder or (file.startswith(f"{folder}/") and folder == "recipes"):
                return page
        if not os.path.isfile(ROOT / file):
            raise FileNotFoundError(
                f"no page of the site stands for {file}: see scripts/site/places.py"
            )
        return self.assets.setdefault(file, _copy_of(file))


def _copy_of(file: str) -> str:
    """Where a copy of a file stands: beside its page if it is one of docs/, else below files/."""
    inside = file.startswith("docs/")
    # A source file would be run or rendered by nobody: as text a browser shows it.
    return file.removeprefix("docs/") if inside else f"files/{file.replace('.py', '.py.txt')}"
