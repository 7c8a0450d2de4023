"""A look through a built site: nothing in it is fetched from elsewhere when it is read.

python -m scripts.site.offline site
"""

import re
import sys
from pathlib import Path

from scripts.arguments import Arguments, existing_folder

ADDRESS = r"[\"']?((?:https?:)?//[^\"' >)]+)"
FETCHED = (
    rf"<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*?(?:src|data)={ADDRESS}",
    r"<link\b(?=[^>]*rel=[\"']?(?:stylesheet|preload|preconnect|prefetch|icon|dns-prefetch))"
    rf"[^>]*?href={ADDRESS}",
)
IN_STYLES = rf"(?:url\(|@import ){ADDRESS}"


def fetched(folder: Path) -> list[str]:
    """Addresses outside the site that a browser would fetch by itself, with the file that names them."""
    found = []
    for path in sorted(folder.rglob("*")):
        patterns = {".html": (*FETCHED, IN_STYLES), ".css": (IN_STYLES,)}.get(path.suffix, ())
        text = path.read_text(encoding="utf-8") if patterns else ""
        found += [
            f"{path.relative_to(folder)}: {match[1]}"
            for pattern in patterns
            for match in re.finditer(pattern, text)
        ]
    return found


if __name__ == "__main__":
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("site", type=existing_folder, help="the built site")
    site = parser.parse_args().site
    if outside := fetched(site):
        sys.exit("fetched from elsewhere:\n" + "\n".join(outside))
    print(
        f"{site}/index.html: {len(list(site.rglob('*.html')))} pages, nothing fetched from elsewhere"
    )
