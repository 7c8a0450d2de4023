"""Runs every benchmark of this folder: `python -m benchmarks [--tiny] [--save] [NAME ...]`.

`python -m benchmarks report` runs nothing: it writes RESULTS.md and its pictures from what was saved.

Each benchmark checks that results agree before it measures, prints a table, and ends with one line of JSON.
`--save` keeps that line, with commit, machine and time, under `benchmarks/results/`; it refuses a tree with
uncommitted changes, since a number without its code cannot be repeated.
"""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from scripts.arguments import Arguments

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
PAIR = Path(os.environ.get("TAOPD_PAIR") or FOLDER.parent / "runs" / "smollm2")
"""What `make real` made."""


def names() -> list[str]:
    """Benchmarks in this folder, without their `bench_` prefix."""
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def has_pair() -> bool:
    """Whether the models that bench_real measures are there."""
    return (PAIR / "pair.json").is_file()


def git(*arguments: str) -> str:
    """Output of a git command in this repository."""
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, cwd=FOLDER
    ).stdout.strip()


def run(name: str, *, tiny: bool) -> tuple[dict, list[str]]:
    """Run one benchmark in its own process; returns the document of its last line, and the others."""
    command = [sys.executable, "-m", f"benchmarks.bench_{name}", *(["--tiny"] if tiny else [])]
    # A thread that waits must not count as a thread that works: many figures are seconds of the process.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=FOLDER.parent, env=environment
    )
    assert process.stdout is not None
    last, table = "", []
    for line in process.stdout:
        last = line
        if not line.startswith("{"):
            print(line, end="", flush=True)
            table.append(line.rstrip())
    if process.wait() != 0:
        sys.exit(f"bench_{name} failed with status {process.returncode}")
    return json.loads(last), table


def main(argv: list[str] | None = None) -> None:
    """Run the named benchmarks, or all of them."""
    parser = Arguments(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*names(), "report", []], metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="small sizes, as in CI")
    parser.add_argument("--save", action="store_true", help="keep results; needs a clean tree")
    options = parser.parse_args(argv)
    if "report" in options.names:
        if len(options.names) > 1:
            parser.error("report: takes no benchmark beside it, as it shows all that was saved")
        from benchmarks.report import write_results

        write_results(RESULTS, FOLDER)
        return
    if options.save and options.tiny:
        parser.error("--save keeps results, and those of --tiny are none: leave one of them out")
    if options.save and git("status", "--porcelain"):
        parser.error("--save needs a tree without uncommitted changes")
    for name in options.names or names():
        print(f"== {name}")
        if name == "real" and not (options.names or options.tiny or has_pair()):
            print(f"left out: {PAIR} holds no pair of models; `make real` makes it")
            continue
        document, table = run(name, tiny=options.tiny)
        if options.save:
            RESULTS.mkdir(exist_ok=True)
            about = {
                "benchmark": name,
                "command": f"python -m benchmarks {name} --save",
                "commit": git("rev-parse", "--short", "HEAD"),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
            }
            path = RESULTS / f"{name}__{platform.machine()}-cpu.json"
            path.write_text(
                json.dumps(about | {"table": table, "result": document}, indent=1) + "\n"
            )
            print(f"saved {path.relative_to(FOLDER.parent)}")


if __name__ == "__main__":
    main()
