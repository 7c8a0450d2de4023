"""`python -m scripts...` and `python -m benchmarks...` as the pages print them, with one argument bad.

Oracles: as in `test_bad_arguments`; what is required stands without brackets in the usage. Always: exit code
2 and one line on stderr, with the argument and the help page, before anything is loaded, run or written.
"""

import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("own_labs")
ROOT = Path(__file__).parents[2]
PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("scripts/**/*.py"))
PAGES += (*ROOT.glob("examples/*.md"), *ROOT.glob("benchmarks/**/*.py"), ROOT / "Makefile")
PRINTED = re.compile(r"python3? -m ((?:scripts|benchmarks)[\w.]*)((?: +[\w./-]+)*)")
WRITTEN = {"scripts.site", "scripts.pages.teachability"}
"""Whose last argument is written."""
PARSERS = ("Arguments(", "toy_is_asked(", "saved_document(")
"""How a script parses what it is given."""


def printed():
    """(module, arguments) of every printed command, once."""
    found = {}
    for page in PAGES:
        for module, rest in PRINTED.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
            # What a sentence goes on with is no argument.
            words = shlex.split(rest)
            module = module.rstrip(".")
            if is_module(module):
                found[module, tuple(words)] = None
    return list(found)


def is_module(name):
    return any(path.is_file() for path in files_of(name))


def files_of(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py"), path / "__main__.py"


def called(module, words, monkeypatch, capsys):
    """Exit code and what was printed on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", [module, *words])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
        # The module under its own name is there already, from another test.
        warnings.simplefilter("ignore", RuntimeWarning)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return left.value.code, *capsys.readouterr()


def bad(module, words, required):
    """(arguments, what the message must name) with one mistake each."""
    for at, word in enumerate(words):
        rest = words[at + 1 :]
        if word.startswith("--"):
            yield [*words[:at], f"{word[:-2]}{word[-1]}", *rest], f"{word[:-2]}{word[-1]}"
        elif re.fullmatch(r"\d+", word):
            yield [*words[:at], "many", *rest], words[at - 1]
        elif at == len(words) - 1 and module in WRITTEN:
            continue
        elif at == 0 or not words[at - 1].startswith("--"):
            yield [*words[:at], f"{word}x", *rest], f"{word}x"
    if words or not required:
        yield [*words, "--no-such-flag"], "--no-such-flag"
    if required:
        yield words[: len(required) - 1], required[-1]


def make_inputs(words):
    """What a printed command reads, empty: one mistake of it is then the only one."""
    for word in words:
        path = Path(word)
        if "/" in word or word == "site":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if path.suffix else path.mkdir(exist_ok=True)
            if path.suffix == ".ipynb":
                path.write_text('{"cells": []}')


def test_a_bad_argument_of_a_script_is_named_with_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tried, wrong = set(), []
    commands = printed()
    for file in (file for module, _ in commands for file in files_of(module) if file.is_file()):
        # Before anything is called: one without a parser would run.
        assert any(parser in file.read_text() for parser in PARSERS), file
    for module, words in commands:
        code, out, _ = called(module, ["--help"], monkeypatch, capsys)
        usage = re.search(rf"usage: python -m {re.escape(module)}((?:.+\n)+)", out)
        assert code == 0 and usage, (module, out)
        required = re.findall(r"(?<=[ \n])\w+(?=[ \n])", re.sub(r"\[[^\]]*\]+", " ", usage[1]))
        # Without a flag, sentences around a command read like arguments of it.
        given = list(words) if required or any(word.startswith("--") for word in words) else []
        make_inputs(given)
        before = sorted(tmp_path.rglob("*"))
        for argv, name in bad(module, given, required):
            if (module, *argv) in tried:
                continue
            tried.add((module, *argv))
            code, out, told = called(module, argv, monkeypatch, capsys)
            page = f"See `python -m {module} --help`."
            if code != 2 or told.count("\n") != 1 or name not in told or page not in told or out:
                wrong.append(f"{module} {' '.join(argv)}: {code}, {name}: {told or out}")
        assert sorted(tmp_path.rglob("*")) == before, f"{module} has written"
    assert not wrong, "\n".join(wrong)
    assert len(tried) > 50 and len({module for module, *_ in tried}) > 25


GATHERS = re.compile(r"""add_runs\(|["']--gather["']""")


def test_a_folder_without_finished_runs_is_named_and_nothing_is_written(
    tmp_path, monkeypatch, capsys
):
    """Of every script that gathers: a folder that is not there, and one of something else."""
    monkeypatch.chdir(tmp_path)
    Path("other").mkdir()
    Path("other/notes.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    texts = {file: file.read_text(encoding="utf-8") for file in ROOT.glob("scripts/**/*.py")}
    del texts[ROOT / "scripts/arguments.py"]
    gathers = {file: text for file, text in texts.items() if GATHERS.search(text)}
    assert len(gathers) >= 8
    for file, text in gathers.items():
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        flags = ["--gather", "--runs"] if "add_runs(" in text else ["--gather"]
        for folder in ("nowhere", "other"):
            code, out, told = called(module, [*flags, folder], monkeypatch, capsys)
            assert (code, out, told.count("\n")) == (2, "", 1), (module, told)
            assert f" {folder}. See `python -m {module} --help`." in told, (module, told)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_make_runs_before_there_is_an_environment_needs_none():
    """Neither installed packages nor ours: -S and -E leave both out."""
    argv = [sys.executable, "-S", "-E", "-m", "scripts.try_wheel", "--help"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
