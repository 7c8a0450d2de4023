"""`taopd bench`: the repository's benchmarks; they are not part of the installed package."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import taopd
from taopd.cli import Parser
from taopd.errors import ConfigError


def run(argv: Sequence[str]) -> int:
    """Find the benchmarks beside the package and hand the flags over."""
    root = Path(taopd.__file__).resolve().parents[2]
    folder = root / "benchmarks"
    parser = Parser(
        prog="taopd bench",
        description="Measure speed and memory against TRL and full distillation, in one run, after "
        "checking that results agree. Needs a checkout of the repository.",
        epilog="example:\n  taopd bench --tiny\n  taopd bench head_loss --save\n  taopd bench report",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=_names(folder))
    parser.flag("--tiny", "small sizes, as in CI")
    parser.flag("--save", "keep results in benchmarks/results; needs a clean tree")
    options = parser.parse_args(argv)
    if not (folder / "__main__.py").exists():
        raise ConfigError(
            f"no benchmarks at {folder}: clone the repository and install it with pip install -e ."
        )
    sys.path.insert(0, str(root))
    benchmarks = importlib.import_module("benchmarks.__main__")
    known = [*benchmarks.names(), "report"]
    for name in options.names:
        if name not in known:
            raise ConfigError(f"no benchmark is called {name!r}; there are {', '.join(known)}")
    if "report" in options.names and len(options.names) > 1:
        raise ConfigError("report: takes no benchmark beside it, as it shows all that was saved")
    flags = [f"--{name}" for name in ("tiny", "save") if getattr(options, name)]
    benchmarks.main([*options.names, *flags])
    return 0


def _names(folder: Path) -> str:
    found = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    return f"{', '.join(found)}, or report (all)" if found else "which ones (all)"
