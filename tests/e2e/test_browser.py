"""The report in a real browser, where there is one; make installs what is missing but node and Chromium."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "browser"
BROWSERS = (os.environ.get("CHROMIUM", ""), "/usr/bin/chromium", "/usr/bin/chromium-browser")


def missing() -> str | None:
    """What keeps these tests from running, in words."""
    if shutil.which("node") is None:
        return "no node"
    if not any(name and Path(name).exists() for name in (*BROWSERS, "/usr/bin/google-chrome")):
        return "no Chromium (set CHROMIUM to its path)"
    if not (FOLDER / "node_modules" / "playwright-core").is_dir():
        return "playwright-core is not installed: run make test-browser once"
    return None


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=f"browser tests: {missing()}")
def test_the_report_in_chromium(tmp_path):
    done = subprocess.run(
        ["node", "--test", "--test-concurrency=1", str(FOLDER / "report.test.mjs")],
        cwd=FOLDER,
        env=os.environ
        | {"PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith("not ok")]
    assert done.returncode == 0, "\n".join(failed) or done.stdout[-2000:]
