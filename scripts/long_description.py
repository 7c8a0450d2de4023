"""The long description of the package: README.md without what leads nowhere outside the repository.

A link to a file becomes its text and the file's path, a picture its description. Run by the build, as
hatchling's metadata hook, so that a wheel never shows a dead link.
"""

import re
from pathlib import Path
from typing import Any

try:
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ImportError:  # Without the build tool, as in the tests.
    MetadataHookInterface = object

PICTURE = r"!\[([^]]*)\]\((?!https?:)[^)]*\)"
LINK = r"\[([^]]*)\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)"


def portable(text: str) -> str:
    """Markdown without relative links and pictures.

    Example:
        >>> portable("see [math](docs/math.md#loss) and ![curves](a.png)")
        'see math (docs/math.md) and (picture: curves)'
    """
    text = re.sub(PICTURE, r"(picture: \1)", text)

    def plain(found: re.Match[str]) -> str:
        words, path = found[1], found[2]
        bare = not path or Path(path).name == words
        return words if bare else f"{words} ({path})"

    return re.sub(LINK, plain, text)


class CustomMetadataHook(MetadataHookInterface):  # type: ignore[misc]
    """Fills in `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the table `project`."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": portable(text)}
