"""The sources of the documentation site, in a folder: `python -m scripts.site build`."""

from pathlib import Path

from scripts.arguments import Arguments
from scripts.site.build import write_site

if __name__ == "__main__":
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the site's sources")
    write_site(parser.parse_args().folder)
