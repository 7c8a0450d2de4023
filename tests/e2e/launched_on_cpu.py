"""`taopd` under `accelerate launch` with an FSDP2 config, on CPUs. Arguments: those of `taopd`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from scripts.reliability.forked import on_cpus
from taopd.cli import main

if __name__ == "__main__":
    on_cpus()
    sys.exit(main(sys.argv[1:]))
