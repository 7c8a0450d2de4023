"""The shell lines of README and guides, run as printed, in order, in a fresh folder. `make test-docs`.

    python -m scripts.run_docs           # after `make demo`; --list: what would run, and why not the rest
    python -m scripts.run_docs --long --page docs/tasks.md

A line that cannot run here has its reason in `ELSEWHERE`; the last lines count them. The folder has the
repository's files by name and the runs of `make demo`; it is removed at the end.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.arguments import Arguments, existing_file

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("guide", "tasks", "concepts", "start", "check", "report", "teachers")
    ),
    *(f"docs/{name}.md" for name in ("scaling", "reliability", "offline", "verl")),
    "examples/README.md",
    "CONTRIBUTING.md",
)
PROGRAMS = ("taopd", "python", "accelerate", "make", "git", "pip", "vllm", "diff", "bash", "cat")
ELSEWHERE = {
    r"git clone": "this checkout is one",
    r"make ": "has targets of its own in CI",
    r"pip install": "changes the environment",
    r"vllm serve|python -m sglang": "serves a large model on a GPU",
    r".*teacher-server\.yaml": "needs the server of the lines before",
    r"accelerate launch": "needs the GPUs of its launch file",
    r".*\b(pair|config|STUDY)\.yaml": "a config of the reader's own",
    r".*\bruns/[xy]\b|.*\b[A-Z]{4,}\b(?!\.)": "names that stand for the reader's own",
    r"taopd demo": "is `make demo`, which ran before",
}
"""Beginnings of lines that this machine cannot run, or runs elsewhere, and why."""
LONG = {
    r"taopd compare \S+\.yaml(?!.*--list)": "27 runs and more",
    r"taopd leaderboard": "every selector on every lab",
}


class Line(NamedTuple):
    """A printed command; `reason` says why it is not run, or is empty."""

    page: str
    command: str
    reason: str


def printed(page: str) -> Iterator[str]:
    """The commands in a page's fences, continued lines joined, comments cut."""
    pieces = re.split(r"^```(\w*)\n", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    # After a fence's opening comes its language, then its lines; its end has no language.
    for language, block in list(zip(pieces[1::2], pieces[2::2], strict=True))[::2]:
        if language in ("", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.split(" ")[0] in PROGRAMS:
                    yield " ".join(re.sub(r"\s#\s.*", "", line).split())


def lines(pages: Sequence[str] = PAGES, *, long: bool = False) -> list[Line]:
    """Every printed command once, in order, with the reason why it is not run."""
    reasons = ELSEWHERE if long else ELSEWHERE | LONG
    found: dict[str, Line] = {}
    for page in pages:
        for command in printed(page):
            why = (text for start, text in reasons.items() if re.match(start, command))
            found.setdefault(command, Line(page, command, next(why, "")))
    return list(found.values())


def workplace(folder: Path) -> None:
    """Lay out a folder in which the commands find what a checkout has after `make demo`."""
    for name in ("recipes", "tests", "examples", "docs", "scripts", "README.md", "CITATION.cff"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "runs").mkdir()
    for made in ("demo", "smollm2"):
        if (ROOT / "runs" / made).exists():
            (folder / "runs" / made).symlink_to(ROOT / "runs" / made)


def run(chosen: Sequence[Line], folder: Path) -> int:
    """Run the lines one after the other; returns how many failed, and prints each with its seconds."""
    failed = 0
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    for line in chosen:
        if line.reason:
            print(f"{'not run':>8}  {line.command}  ({line.reason})", flush=True)
            continue
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", line.command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        # A diff that finds differences does what it is printed for.
        wrong = done.returncode != line.command.startswith("diff ")
        failed += wrong
        word = f"  FAILED with {done.returncode}, {line.page}" if wrong else ""
        print(f"{time.monotonic() - began:6.1f} s  {line.command}{word}", flush=True)
        if word:
            print("\n".join(done.stderr.splitlines()[-15:]), flush=True)
    return failed


def _page(name: str) -> str:
    existing_file(str(ROOT / name))
    return name


def main(argv: Sequence[str]) -> int:
    """List or run; the exit code is 1 if a line failed."""
    parser = Arguments(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--list", action="store_true", help="show, run nothing")
    parser.add_argument("--long", action="store_true", help="run also what takes an hour")
    parser.add_argument(
        "--page", nargs="+", type=_page, default=PAGES, help="pages, relative to the root"
    )
    options = parser.parse_args(argv)
    chosen = lines(options.page, long=options.long)
    if options.list:
        for line in chosen:
            print(
                f"{line.page}: {line.command}" + (f"  (not run: {line.reason})" * bool(line.reason))
            )
        return 0
    with tempfile.TemporaryDirectory(prefix="taopd-docs-") as folder:
        workplace(Path(folder))
        failed = run(chosen, Path(folder))
    print(summary(chosen, failed))
    return 1 if failed else 0


def summary(chosen: Sequence[Line], failed: int) -> str:
    """How many lines ran and failed, and how many did not run for which reason."""
    reasons = Counter(line.reason for line in chosen)
    ran = reasons.pop("", 0)
    rows = [f"{count:5}  {reason}" for reason, count in reasons.most_common()]
    head = f"{ran} lines ran, {failed} failed; {len(chosen) - ran} did not run here:"
    return "\n".join([head, *rows])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
