"""`taopd` under `accelerate launch` with an FSDP2 config, on CPUs: accelerate has FSDP2 for GPUs only.

Arguments: those of `taopd`. The one change is that several CPU processes call themselves GPU processes.
"""

import sys

import accelerate.state
from accelerate.utils import DistributedType

from taopd.cli import main

_make = accelerate.state.PartialState.__init__


def _as_if_on_gpus(self, *args, **kwargs):
    _make(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


accelerate.state.PartialState.__init__ = _as_if_on_gpus

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
