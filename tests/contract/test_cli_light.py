"""Help is instant: it imports neither torch nor transformers nor trl. Oracle: sys.modules."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "trl", "datasets", "pandas", "numpy")
COMMANDS = (
    ["--help"],
    ["--version"],
    *(
        [name, "--help"]
        for name in ("demo", "train", "check", "compare", "evaluate", "plan", "report", "inspect")
    ),
    ["conformance", "--help"],
    *(["diagnose", name, "--help"] for name in ("freeze", "gain", "report", "one-step")),
    ["diagnose", "--help"],
    ["no-such-command"],
    # From shapes that are known by name a plan needs no library.
    ["plan", "--student", "Qwen3-1.7B", "--teacher", "Qwen3-4B", "--json"],
)


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(argv):
    code = (
        "import sys, json; from taopd.cli import main; main(json.loads(sys.argv[1]));"
        "print(json.dumps(sorted(name.partition('.')[0] for name in sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(argv)], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & set(HEAVY)


def test_bad_input_in_a_fresh_process_is_one_line_and_exit_code_2(tmp_path):
    argv = [sys.executable, "-m", "taopd.cli", "demo", "--steps", "x"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("taopd demo: error: ") and done.stderr.count("\n") == 1
