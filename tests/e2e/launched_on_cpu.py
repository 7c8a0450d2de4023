"""`taopd` under `accelerate launch` with an FSDP2 config, on CPUs. Arguments: those of `taopd`."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from scripts.reliability.forked import leave, on_cpus
from taopd.cli import main

if __name__ == "__main__":
    on_cpus()
    if code := main(sys.argv[1:]):
        sys.exit(code)
    assert not torch.distributed.is_initialized(), "the processes are still connected"
    leave()
