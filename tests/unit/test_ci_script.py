"""`.ci/run` where Chromium cannot be installed: it goes on, says why in one line, and never waits."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "run"
TOOLS = ("bash", "dirname", "grep", "mktemp", "rm", "sleep", "tail")
SKIPPED = "Chromium is not installed, the browser tests are skipped: "


def machine(folder: Path, **programs: str) -> Path:
    """A PATH with a few tools, root as the user, a `make` that says its targets, and these scripts."""
    path = folder / "bin"
    path.mkdir()
    for name in TOOLS:
        (path / name).symlink_to(str(shutil.which(name)))
    # Seconds are a tenth of a second here.
    limit = f'exec {shutil.which("timeout")} -k 1 "$(({"$3"} / 60)).2" "${{@:4}}"'
    shared = {"make": 'echo "make $*"', "id": "echo 0", "timeout": limit}
    for name, text in (shared | programs).items():
        (path / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (path / name).chmod(0o755)
    return path


def run(folder: Path, path: Path, **environment: str) -> list[str]:
    """Lines that the script prints; it must end well, and wait for nobody who stays."""
    (folder / ".ci").mkdir(exist_ok=True)
    # This machine may have a Chromium.
    text = SCRIPT.read_text()
    assert "/usr/bin/chromium" in text
    (folder / ".ci" / "run").write_text(text.replace("/usr/bin/", f"{folder}/"))
    found = subprocess.run(
        [str(path / "bash"), str(folder / ".ci" / "run")],
        env={"PATH": str(path), "TMPDIR": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert found.stderr == ""
    return found.stdout.splitlines()


@pytest.mark.parametrize(
    ("programs", "why"),
    [
        ({}, "there is no apt-get"),
        ({"apt-get": "exit 100", "id": "echo 1000"}, "only root may"),
        (
            {"apt-get": 'echo "E: no package for $*" >&2; exit 100'},
            "E: no package for install -y -qq --no-install-recommends chromium",
        ),
        ({"apt-get": 'read answer || { echo "asked: no answer"; exit 1; }'}, "asked: no answer"),
        # A child that keeps the output open, in a group that no signal reaches.
        ({"apt-get": "trap '' TERM; sleep 90 & sleep 90"}, "apt-get took more than 240 s"),
        ({"apt-get": "exit 0"}, "the package chromium has no {folder}/chromium"),
    ],
)
def test_without_chromium_it_goes_on_and_says_why(tmp_path, programs, why):
    lines = run(tmp_path, machine(tmp_path, **programs), CI="1")
    assert lines == [
        SKIPPED + why.replace("{folder}", str(tmp_path)),
        "make lint docs test test-vllm",
    ]
    assert not list(tmp_path.glob("tmp.*")), "the log of apt-get is removed"


def test_chromium_is_installed_where_it_can_be(tmp_path):
    path = machine(
        tmp_path, **{"apt-get": f'[ "$1" = update ] || cp {shutil.which("bash")} chromium'}
    )
    (path / "cp").symlink_to(str(shutil.which("cp")))
    assert run(tmp_path, path, CI="1") == ["make lint docs test test-vllm"]


@pytest.mark.parametrize("environment", [{}, {"CI": "1", "CHROMIUM": str(shutil.which("bash"))}])
def test_nothing_is_installed_outside_ci_or_where_chromium_is_named(tmp_path, environment):
    path = machine(tmp_path, **{"apt-get": "echo called >called; exit 1"})
    assert run(tmp_path, path, **environment) == ["make lint docs test test-vllm"]
    assert not (tmp_path / "called").exists()
