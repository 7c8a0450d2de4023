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
    ["compare", "no-such-folder", "nor-this"],
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


FIRST_LINE = """
import json, sys
import taopd.cli

class Begun(Exception):
    pass

class Recorder:
    def __init__(self, command, *, quiet):
        self.command = command
    def __enter__(self):
        found[self.command] = sorted(sys.modules)
        raise Begun
    def __exit__(self, *_):
        pass

found = {}
taopd.cli.Heartbeat = Recorder
for command in json.loads(sys.argv[1]):
    try:
        taopd.cli.main([command, "x", "--config", "x.yaml"])
    except Begun:
        __import__(f"taopd.cli.{command}")
        found[command] += sorted(sys.modules)
print(json.dumps(found))
"""
MOST_MODULES = 400
"""Of a process that has said nothing yet: the interpreter's own, ours, and what reads YAML and arguments."""


def test_a_command_speaks_before_it_loads_anything_heavy():
    """From the heartbeat on a line comes by itself (`test_heartbeat.py`); until then modules are counted, as
    seconds depend on the machine."""
    names = ["train", "check", "plan", "compare", "diagnose", "evaluate", "report"]
    done = subprocess.run(
        [sys.executable, "-c", FIRST_LINE, json.dumps(names)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert list(found) == names
    for name, modules in found.items():
        assert not {module.partition(".")[0] for module in modules} & set(HEAVY), name
        assert len(set(modules)) < MOST_MODULES, name


def test_bad_input_in_a_fresh_process_is_one_line_and_exit_code_2(tmp_path):
    argv = [sys.executable, "-m", "taopd", "demo", "--steps", "x"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("taopd demo: error: ") and done.stderr.count("\n") == 1
