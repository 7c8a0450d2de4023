"""`python -m taopd.cli`, for launchers: `accelerate launch -m taopd.cli train --config FILE`."""

import sys

from taopd.cli import main

sys.exit(main())
