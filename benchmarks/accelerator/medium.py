"""Stage 5: the medium lab of `scripts/medium_lab.py`, as far as the time goes."""

import json
import time
from pathlib import Path

from scripts import medium_lab
from scripts.arguments import Arguments


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--root", type=Path, default=Path("runs/medium"))
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    sizes = medium_lab.SIZES[options.toy]
    options.root.mkdir(parents=True, exist_ok=True)
    if not (options.root / "prompts.parquet").exists():
        medium_lab.make_data(options.root, sizes)
    for role in ("teacher", "student"):
        if not (options.root / role).exists():
            medium_lab.pretrain(options.root, role, sizes, deadline)
    ready = all((options.root / role).exists() for role in ("teacher", "student"))
    if ready:
        medium_lab.run_arms(options.root, sizes, deadline)
    rows = [json.loads(p.read_text()) for p in sorted(options.root.glob("arms/*/results.json"))]
    expected = sizes["seeds"] * len(medium_lab.ARMS)
    print(json.dumps({"unfinished": len(rows) < expected, "arms": rows}))


if __name__ == "__main__":
    main()
