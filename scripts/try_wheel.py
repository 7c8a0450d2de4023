"""The wheel outside the repository: built, installed into a new environment, and tried. `make test-wheel`.

    python -m scripts.try_wheel            # the newest versions that the package's own limits allow
    python -m scripts.try_wheel --oldest   # every library at its lower limit
    python -m scripts.try_wheel --newest   # the newest torch, transformers and TRL, beyond those limits

The first uses no constraints of this repository. Tried are: what the package says about itself, `taopd demo`,
the page, and the quick tests, from a copy of `tests` without the sources beside it; the second runs tests of
the trainer too. The third begins with constraints.txt and raises each of the three libraries alone, with what
it needs. The last lines say which are the newest already, which newer ones pass, which do not and why; the
exit code is 1 if any does not.
"""

import os
import re
import shutil
import subprocess
import tempfile
import tomllib
import venv
from pathlib import Path

from scripts.arguments import Arguments

ROOT = Path(__file__).parents[1]
QUICK = (
    "tests/contract/test_public_api.py",
    "tests/unit/test_selectors.py",
    "tests/unit/test_losses.py",
    "tests/unit/test_exact.py",
    "tests/unit/test_config.py",
    "tests/unit/test_cli.py",
)
WITH_LIBRARIES = (
    "tests/contract/test_trl_surface.py",
    "tests/contract/test_trl_behaviours.py",
    "tests/e2e/test_trainer.py",
    "tests/e2e/test_resume.py",
)
"""What a new release of a library breaks first."""
LIBRARIES = ("torch", "transformers", "trl")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "beartype")


def run(*command: str | Path, cwd: Path, quiet: bool = False) -> None:
    """Run a command away from the repository; its output is shown, and a failure ends everything."""
    if not quiet:
        print("+", *command, flush=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(part) for part in command], cwd=cwd, env=clean, check=True)


def version(python: Path, package: str) -> str:
    """The installed version of a package."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def check_description(python: Path, cwd: Path) -> None:
    """No link of the long description leads to a file."""
    code = "import importlib.metadata as m; print(m.metadata('taopd').get_payload())"
    done = subprocess.run([python, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    dead = re.findall(r"\]\((?!https?:)([^)]*)\)", done.stdout)
    if dead or "taopd" not in done.stdout:
        raise SystemExit(f"the long description is empty or links to files: {dead}")


def install(folder: Path, *pinned: str) -> Path:
    """A new environment with the wheel; returns its Python.

    Args:
        pinned: options of pip that hold versions.
    """
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("taopd-*.whl")
    run(*pip, "install", *pinned, wheel, *TOOLS, cwd=folder)
    unused = shutil.ignore_patterns("node_modules", "__pycache__")
    for name in ("tests", "docs"):  # tests read the guide
        shutil.copytree(ROOT / name, folder / name, ignore=unused)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return python


def try_it(python: Path, folder: Path, *more: str) -> None:
    """Description, demo, page and quick tests; `more`: further ones."""
    check_description(python, folder)
    taopd = python.parent / "taopd"
    run(taopd, "demo", "--steps", "5", "--output", "demo", cwd=folder)
    run(taopd, "report", "demo", "-o", "demo.html", cwd=folder)
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUICK, *more, cwd=folder)


def oldest() -> list[str]:
    """Requirements that hold every library the package names at its lower limit, whatever the patch."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = [re.match(r"([\w.-]+)(?:\[.*\])?>=([\d.]+)", each) for each in named]
    return [f"{each[1]}=={each[2]}.*" for each in found if each is not None]


def try_newest(python: Path, folder: Path) -> int:
    """Each library alone at its newest version; says which do not pass, and which tests say so."""
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    (wheel,) = folder.glob("taopd-*.whl")
    told, failed = [], 0
    for name in LIBRARIES:
        pinned = version(python, name)
        # With its dependencies: a build of torch for GPUs does not start without them.
        run(*pip, "--upgrade", name, cwd=folder)
        newest = version(python, name)
        if newest == pinned:
            told.append(
                f"{name} {pinned}: pinned, and the newest{_held_back(python, name, newest)}"
            )
            continue
        broken = _broken_tests(python, folder)
        failed += bool(broken)
        words = "does not pass" if broken else "passes"
        held = _held_back(python, name, newest)
        told.append(f"{name} {newest}: {words} (pinned: {pinned}){held}")
        told += [f"    {line}" for line in broken]
        run(*pip, "--constraint", ROOT / "constraints.txt", wheel, f"{name}=={pinned}", cwd=folder)
    print("\n".join(told))
    return int(failed > 0)


def _broken_tests(python: Path, folder: Path) -> list[str]:
    """The lines of pytest's summary about tests that fail, with the error of each."""
    command = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rfE")
    print("+", *command, *WITH_LIBRARIES, flush=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean["COLUMNS"] = "200"  # pytest cuts its summary to the width of the terminal
    done = subprocess.run(
        [*command, *WITH_LIBRARIES], cwd=folder, env=clean, capture_output=True, text=True
    )
    print(done.stdout[-20_000:], done.stderr[-2_000:], flush=True)
    lines = [row for row in done.stdout.splitlines() if row.startswith(("FAILED ", "ERROR "))]
    return lines or ([f"pytest ended with {done.returncode}"] if done.returncode else [])


def _held_back(python: Path, name: str, installed: str) -> str:
    """Words about a newer version of the index that pip's own settings keep away, or nothing."""
    command = (python, "-m", "pip", "--disable-pip-version-check", "index", "versions", name)
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.match(rf"{name} \(([^)]+)\)", done.stdout)
    newer = found is not None and found[1] != installed.partition("+")[0]
    return f"; the index has {found[1]}, which settings of pip hold back" if found and newer else ""


def main() -> int:
    """Build, install, try; the folder is removed afterwards."""
    parser = Arguments(description=(__doc__ or "").splitlines()[0])
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument(
        "--newest", action="store_true", help="say which newer versions fail, and why"
    )
    ends.add_argument("--oldest", action="store_true", help="every library at its lower limit")
    args = parser.parse_args()
    newest = args.newest
    with tempfile.TemporaryDirectory(prefix="taopd-wheel-") as name:
        folder = Path(name)
        pinned = ("--constraint", str(ROOT / "constraints.txt")) * newest
        python = install(folder, *pinned, *(oldest() if args.oldest else ()))
        print(", ".join(f"{each} {version(python, each)}" for each in ("taopd", *LIBRARIES)))
        if newest:
            return try_newest(python, folder)
        try_it(python, folder, *(WITH_LIBRARIES if args.oldest else ()))
    print("the wheel works outside the repository")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
