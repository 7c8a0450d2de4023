"""The sources of the documentation site, in a folder: `python -m scripts.site build`."""

import sys
from pathlib import Path

from scripts.site.build import write_site

if __name__ == "__main__":
    write_site(Path(sys.argv[1]))
