"""Two ranks of `test_deepspeed.py` under ZeRO-3: a run, the same resumed in its middle, and its student.

Run as: python resume_worker.py MICRO_LAB_FOLDER OUTPUT_FOLDER
"""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.e2e.rank_worker import (
    deepspeed_settings,
    fork_ranks,
    open_deepspeed_to_cpu,
    weights_of,
)
from tests.e2e.shards_worker import make


def digests(trainer) -> dict[str, str]:
    return {
        name: hashlib.sha256(weight.numpy().tobytes()).hexdigest()
        for name, weight in weights_of(trainer.model).items()
    }


def main(lab: Path, out: Path, world: int, rank: int) -> None:
    """One process."""
    open_deepspeed_to_cpu()
    whole = make(lab, out / "run", world, **deepspeed_settings(3))
    whole.train()
    found = {"whole": digests(whole)}
    part = make(lab, out / "run", world, **deepspeed_settings(3))
    part.train(resume_from_checkpoint=str(out / "run" / "checkpoint-2"))
    found["resumed"] = digests(part)
    part.save_model(str(out / "model"))
    (out / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    lab, out = Path(sys.argv[1]), Path(sys.argv[2])
    fork_ranks(out, (2,), lambda world, rank: main(lab, out, world, rank))
