"""The accelerator kit: `python -m benchmarks.accelerator [STAGE ...] [--minutes 9] [--toy]`.

Stages: kernels, head, update, pairs, medium. Each is a process of its own and ends within `--minutes`; what
it found is written at once to `benchmarks/results/accelerator-STAGE__GPU.json`. A stage that fails or runs
out of memory is marked there, and the next one runs. A stage that is done is skipped; `pairs` and `medium`
go on where they were, so run the command again until it says "done".

`--toy` runs every stage at a size for a CPU. No network is needed; docs/offline.md says how to install.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from scripts.arguments import Arguments

STAGES = ("kernels", "head", "update", "pairs", "medium")
RESUMABLE = ("pairs", "medium")
RESULTS = Path(__file__).parents[1] / "results"
LONGEST_ERROR = 2000
"""Characters kept of a failed stage's output."""


def gpu_name() -> str:
    """The card's name as part of a file name; "cpu" where there is none."""
    if not torch.cuda.is_available():
        return f"{platform.machine()}-cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def commit() -> str:
    """Short hash of the commit; `$TAOPD_COMMIT` where the sources are a copy without their history."""
    if given := os.environ.get("TAOPD_COMMIT"):
        return given
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    return done.stdout.strip() or "unknown"


def run_stage(name: str, *, minutes: float, toy: bool) -> dict[str, object]:
    """Run one stage in its own process; its last line is its result."""
    command = [sys.executable, "-u", "-m", f"benchmarks.accelerator.{name}"]
    command += ["--toy"] if toy else []
    command += ["--minutes", str(minutes)] if name in RESUMABLE else []
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    status = process.wait()
    seconds = round(time.monotonic() - started, 1)
    try:
        result = json.loads(lines[-1]) if status == 0 else None
    except (IndexError, json.JSONDecodeError):
        result = None
    if result is None:
        error = "".join(lines)[-LONGEST_ERROR:]
        fault = "out of memory" if "out of memory" in error.lower() else "failed"
        return {"status": fault, "error": error, "seconds": seconds}
    unfinished = isinstance(result, dict) and result.get("unfinished")
    return {"status": "unfinished" if unfinished else "done", "seconds": seconds, "result": result}


def main(argv: list[str] | None = None) -> int:
    """Run the stages that are not done; 1 if one failed."""
    parser = Arguments(description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--minutes", type=float, default=9.0, help="at most, per stage (9)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--again", action="store_true", help="also stages that are done")
    parser.add_argument("--toy", action="store_true", help="small sizes for a CPU, as in the tests")
    options = parser.parse_args(argv)
    for name in options.stages:
        if name not in STAGES:
            parser.error(f"no stage is called {name!r}; there are {', '.join(STAGES)}")
    if not torch.cuda.is_available() and not options.toy:
        print(
            "no GPU: PyTorch sees no CUDA device; --toy runs the stages on the CPU", file=sys.stderr
        )
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    statuses = {}
    for name in options.stages or STAGES:
        size = "-toy" if options.toy else ""  # beside the results, and never in their place
        path = options.output / f"accelerator-{name}{size}__{gpu_name()}.json"
        done = path.exists() and json.loads(path.read_text())["status"] == "done"
        if done and not options.again:
            print(f"== {name}: done before ({path})", flush=True)
            continue
        print(f"== {name}", flush=True)
        found = run_stage(name, minutes=options.minutes, toy=options.toy)
        about = {
            "stage": name,
            "command": f"python -m benchmarks.accelerator {name}{' --toy' if options.toy else ''}",
            "commit": commit(),
            "machine": gpu_name(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        }
        path.write_text(json.dumps(about | found, indent=1) + "\n")
        statuses[name] = found["status"]
        print(f"== {name}: {found['status']} in {found['seconds']} s; {path}", flush=True)
    return 1 if {"failed", "out of memory"} & set(statuses.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
