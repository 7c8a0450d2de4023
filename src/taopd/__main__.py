"""`python -m taopd`, for launchers: `accelerate launch -m taopd train --config FILE`."""

import sys

from taopd.cli import main

sys.exit(main())
