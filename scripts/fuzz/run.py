"""Fuzz the readers and keep the counts.

    python -m scripts.fuzz.run                                   # every surface, docs/reliability/fuzz.json
    python -m scripts.fuzz.run --only study --engine atheris --inputs 20000 --show

Engine `atheris` (pip install atheris): coverage-guided (libFuzzer) over the whole package; `hypothesis`: the
same harnesses on what hypothesis draws. An input counts as read, as refused (a `TaopdError`), or as a
failure: any other exception, anything touched outside the folder, half a file. Failures are grouped by
exception and place, with one input of each as hexadecimal.

Each surface runs in a process of its own, which writes its counts down every thousand inputs; what has ended
stands in the output file at once. A run that is killed loses no more than that.
"""

import argparse
import atexit
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.arguments import Arguments
from scripts.fuzz.fence import Escaped, fence
from scripts.fuzz.odd import Choices
from taopd.cli import positive

INPUTS = {
    "atheris": {"config": 20_000, "study": 20_000, "bank": 15_000, "conformance": 20_000}
    | {"run": 5_000, "teacher": 30_000},
    "hypothesis": {"config": 2_000, "study": 2_000, "bank": 2_000, "conformance": 2_000}
    | {"run": 1_000, "teacher": 5_000},
}
SURFACES = sorted(INPUTS["atheris"])
SAVE_EVERY = 1000
PACKAGE = "taopd"


class Count:
    """One surface in this process: reads inputs, counts outcomes, keeps the first of every failure."""

    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        from scripts.fuzz.surfaces import SURFACES

        self.name, self.root, self._options = options.only, root, options
        work = root / "work"
        work.mkdir()
        self._read = SURFACES[self.name](work)
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
                if self._options.show:
                    print(f"--- {self.name}: {place}", data.hex(), flush=True)
                    traceback.print_exc()
            self.failures[place][0] += 1
        if self.total % SAVE_EVERY == 0:
            self.save()

    def save(self) -> None:
        """Put the counts so far in the result file."""
        result = {
            "surface": self.name,
            "engine": self._options.engine,
            "seed": self._options.seed,
            "inputs": self.total,
            "read": self.num_read,
            "refused": self.num_refused,
            "failures": {place: found[0] for place, found in self.failures.items()},
            "examples": {place: found[1] for place, found in self.failures.items()},
            "seconds": round(time.perf_counter() - self._began, 1),
        }
        partial = self._options.result.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.replace(self._options.result)


def _place(error: BaseException) -> str:
    """Exception and innermost line of the package: what makes two failures one."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"/{PACKAGE}/" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
    text = f" {error}"[:160] if isinstance(error, (Escaped, AssertionError)) else ""
    return f"{type(error).__name__} in {where}{text}"


def run_surface(options: argparse.Namespace) -> None:
    """Fuzz one surface in this process and write its counts."""
    warnings.simplefilter("ignore")
    root = Path(tempfile.mkdtemp(prefix=f"fuzz-{options.only}-"))
    os.environ["MPLCONFIGDIR"] = str(root / "matplotlib")
    {"atheris": _by_atheris, "hypothesis": _by_hypothesis}[options.engine](options, root)


def _by_hypothesis(options: argparse.Namespace, root: Path) -> None:
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    count = Count(options, root)
    while count.total < options.inputs:  # in rounds: hypothesis remembers all that it drew

        @seed(options.seed + count.total)
        @settings(
            max_examples=min(1000, options.inputs - count.total),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.binary(max_size=256))
        def round_of_inputs(data: bytes) -> None:
            count.one(data)

        round_of_inputs()
    count.save()


def _by_atheris(options: argparse.Namespace, root: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=[PACKAGE]):
        count = Count(options, root)
    atexit.register(count.save)
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
    """Run the surfaces, two at a time, and save their counts."""
    parser = Arguments(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=SURFACES)
    parser.add_argument("--engine", choices=sorted(INPUTS), help="default: both")
    parser.add_argument("--inputs", type=positive, help="of each surface and engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print each new failure")
    parser.add_argument("--jobs", type=positive, default=2, help="surfaces at a time")
    parser.add_argument("--result", type=Path, help="(of one surface, for the parent)")
    parser.add_argument("--output", type=Path, default=Path("docs/reliability/fuzz.json"))
    options = parser.parse_args()
    if options.result is not None:
        run_surface(options)
        return
    jobs = [
        (engine, name)
        for engine in ([options.engine] if options.engine else INPUTS)
        for name in ([options.only] if options.only else SURFACES)
    ]
    writing = threading.Lock()

    def run(job: tuple[str, str]) -> dict[str, Any]:
        found = _in_a_process(*job, options)
        with writing:
            _save(options, found)
        return found

    with ThreadPoolExecutor(options.jobs) as threads:
        results = list(threads.map(run, jobs))
    sys.exit(int(any(found["failures"] for found in results)))


def _in_a_process(engine: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    result = folder / "result.json"
    inputs = options.inputs or INPUTS[engine][name]
    command = [sys.executable, "-m", "scripts.fuzz.run", "--only", name, "--engine", engine]
    command += ["--seed", str(options.seed), "--inputs", str(inputs), "--result", str(result)]
    command += ["--show"] if options.show else []
    done = subprocess.run(command, env=os.environ | {"TMPDIR": str(folder)}, check=False)
    if not result.exists():
        sys.exit(f"{name}: the fuzzer ended with status {done.returncode} and left no counts")
    found = json.loads(result.read_text()) | {"status": done.returncode}
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({k: v for k, v in found.items() if k != "examples"}), flush=True)
    return found


def _save(options: argparse.Namespace, new: dict[str, Any]) -> None:
    """Put the counts of a surface in place of its earlier ones by the same engine and seed."""
    from taopd.runs.jsonl import write_json
    from taopd.trainer.environment import environment

    before = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
    key = ("engine", "surface", "seed")
    runs = {tuple(run[name] for name in key): run for run in [*before, new]}
    document = {
        "command": "python -m scripts.fuzz.run",
        "inputs": sum(run["inputs"] for run in runs.values()),
        "failures": sum(sum(run["failures"].values()) for run in runs.values()),
        "runs": list(runs.values()),
        "versions": environment()["versions"],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, document)


if __name__ == "__main__":
    main()
