"""Fuzz the readers and keep the counts.

    python -m scripts.fuzz.run                                   # every surface, docs/reliability/fuzz.json
    python -m scripts.fuzz.run --only study --inputs 20000 --show
    python -m scripts.fuzz.run --engine chance                   # without atheris (pip install atheris)

Engine `atheris`: coverage-guided (libFuzzer) over the whole package; `chance`: the same harnesses on random
bytes. An input counts as read, as refused (a `TaopdError`), or as a failure: any other exception, anything
touched outside the folder, half a file. Failures are grouped by exception and place, and one input of each
kept in `--found` as hexadecimal. Each surface runs in a process of its own.
"""

import argparse
import atexit
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from scripts.fuzz.fence import Escaped, fence
from scripts.fuzz.odd import Choices

INPUTS = {"config": 8_000, "study": 12_000, "bank": 8_000, "conformance": 15_000}
INPUTS |= {"run": 4_000, "teacher": 55_000}
PACKAGE = "taopd"


class Count:
    """One surface in this process: reads inputs, counts outcomes, keeps the first of every failure."""

    def __init__(self, name: str, root: Path, target: int, *, show: bool) -> None:
        from scripts.fuzz.surfaces import SURFACES

        self.name, self.target, self.root, self._show = name, target, root, show
        work = root / "work"
        work.mkdir()
        self._read = SURFACES[name](work)
        self.num_read = self.num_refused = 0
        self.failures: dict[str, list[Any]] = {}
        self._began = time.perf_counter()

    @property
    def total(self) -> int:
        """Inputs so far."""
        return self.num_read + self.num_refused + sum(found[0] for found in self.failures.values())

    def one(self, data: bytes) -> None:
        """Read one input."""
        from taopd.errors import TaopdError

        try:
            with fence(self.root):
                self._read(Choices(data))
            self.num_read += 1
        except TaopdError:
            self.num_refused += 1
        except (Exception, Escaped) as error:
            place = _place(error)
            if place not in self.failures:
                self.failures[place] = [0, data.hex()]
                if self._show:
                    print(f"--- {self.name}: {place}", data.hex(), flush=True)
                    traceback.print_exc()
            self.failures[place][0] += 1

    def result(self, engine: str) -> dict[str, Any]:
        """What is saved."""
        return {
            "surface": self.name,
            "engine": engine,
            "inputs": self.total,
            "read": self.num_read,
            "refused": self.num_refused,
            "failures": {place: found[0] for place, found in self.failures.items()},
            "examples": {place: found[1] for place, found in self.failures.items()},
            "seconds": round(time.perf_counter() - self._began, 1),
        }


def _place(error: BaseException) -> str:
    """Exception and innermost line of the package: what makes two failures one."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"/{PACKAGE}/" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
    text = f" {error}"[:160] if isinstance(error, (Escaped, AssertionError)) else ""
    return f"{type(error).__name__} in {where}{text}"


def run_surface(options: argparse.Namespace) -> None:
    """Fuzz one surface in this process and write its result."""
    warnings.simplefilter("ignore")
    root = Path(tempfile.mkdtemp(prefix=f"fuzz-{options.only}-"))
    os.environ["MPLCONFIGDIR"] = str(root / "matplotlib")
    if options.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=[PACKAGE]):
            count = Count(options.only, root, options.inputs, show=options.show)
    else:
        count = Count(options.only, root, options.inputs, show=options.show)

    def save() -> None:
        options.result.write_text(json.dumps(count.result(options.engine)))

    if options.engine == "chance":
        source = random.Random(options.seed)
        while count.total < options.inputs:
            count.one(source.randbytes(source.choice((8, 24, 64, 200))))
        save()
        return
    atexit.register(save)
    flags = [f"-atheris_runs={options.inputs}", "-max_len=256", "-len_control=0", "-timeout=120"]
    flags += [f"-seed={options.seed + 1}", "-print_final_stats=0", "-verbosity=0"]
    corpus = root / "corpus"
    corpus.mkdir()
    source = random.Random(options.seed)
    for index in range(64):
        (corpus / f"{index}").write_bytes(source.randbytes(64))
    atheris.Setup([sys.argv[0], *flags, str(corpus)], count.one)
    atheris.Fuzz()


def main() -> None:
    """Run the surfaces one after the other and save their counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=sorted(INPUTS))
    parser.add_argument("--inputs", type=int)
    parser.add_argument("--engine", choices=("atheris", "chance"), default="atheris")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print each new failure")
    parser.add_argument("--result", type=Path, help="(of one surface, for the parent)")
    parser.add_argument("--output", type=Path, default=Path("docs/reliability/fuzz.json"))
    options = parser.parse_args()
    if options.result is not None:
        run_surface(options)
        return
    results = []
    for name in [options.only] if options.only else INPUTS:
        result = Path(tempfile.mkdtemp(prefix="fuzz-")) / "result.json"
        command = [
            sys.executable,
            "-m",
            "scripts.fuzz.run",
            "--only",
            name,
            "--seed",
            str(options.seed),
        ]
        command += ["--inputs", str(options.inputs or INPUTS[name]), "--engine", options.engine]
        command += ["--result", str(result), *(["--show"] if options.show else [])]
        done = subprocess.run(command, env=os.environ | {"TMPDIR": str(result.parent)}, check=False)
        if not result.exists():
            sys.exit(f"{name}: the fuzzer ended with status {done.returncode} and left no counts")
        found = json.loads(result.read_text())
        found["failures"] = found["failures"]
        results.append(found)
        print(json.dumps({k: v for k, v in found.items() if k != "examples"}), flush=True)
    _save(options, results)
    sys.exit(int(any(found["failures"] for found in results)))


def _save(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    from taopd.records import write_json
    from taopd.runs import environment

    about = environment(seed=options.seed)
    document = {
        "command": "python -m scripts.fuzz.run",
        "inputs": sum(found["inputs"] for found in results),
        "failures": sum(sum(found["failures"].values()) for found in results),
        "surfaces": results,
        "env": {name: about[name] for name in ("versions", "git_commit", "git_dirty")},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, document)


if __name__ == "__main__":
    main()
