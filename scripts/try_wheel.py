"""The wheel outside the repository: built, installed into a new environment, and tried. `make test-wheel`.

    python -m scripts.try_wheel            # the newest versions that the package's own limits allow
    python -m scripts.try_wheel --newest   # then the newest torch, transformers and TRL, beyond those limits

No constraints of this repository are used. Tried are: what the package says about itself, `taopd demo`, the
page, and the quick tests, from a copy of `tests` without the sources beside it. With --newest each of the
three libraries is raised alone, and the last lines say which of them did not pass.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

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


def install(folder: Path) -> Path:
    """A new environment with the wheel; returns its Python."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("taopd-*.whl")
    run(*pip, "install", wheel, *TOOLS, cwd=folder)
    for name in ("tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return python


def try_it(python: Path, folder: Path) -> None:
    """Description, demo, page and quick tests."""
    check_description(python, folder)
    taopd = python.parent / "taopd"
    run(taopd, "demo", "--steps", "5", "--output", "demo", cwd=folder)
    run(taopd, "report", "demo", "-o", "demo.html", cwd=folder)
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUICK, cwd=folder)


def try_newest(python: Path, folder: Path) -> int:
    """Each library alone at its newest version; says which do not pass."""
    failed = []
    for name in LIBRARIES:
        before = version(python, name)
        run(python, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps", name, cwd=folder)
        newest = version(python, name)
        try:
            run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *WITH_LIBRARIES, cwd=folder)
            print(f"{name} {newest}: passes (was {before})")
        except subprocess.CalledProcessError:
            failed.append(f"{name} {newest} (tested with {before})")
            pinned = f"{name}=={before}"
            run(python, "-m", "pip", "install", "--quiet", "--no-deps", pinned, cwd=folder)
    print("do not pass: " + ", ".join(failed) if failed else "all of them pass")
    return int(bool(failed))


def main() -> int:
    """Build, install, try; the folder is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="taopd-wheel-") as name:
        folder = Path(name)
        python = install(folder)
        print(", ".join(f"{each} {version(python, each)}" for each in ("taopd", *LIBRARIES)))
        if "--newest" in sys.argv:
            return try_newest(python, folder)
        try_it(python, folder)
    print("the wheel works outside the repository")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
