"""Every printed command with one argument left out, misspelt or of the wrong type.

Oracles: what is required stands before "[options]" in the usage of the help page; a name is misspelt by
leaving a letter out, and the message must bring the name back. Always: exit code 2 and one line, with the
argument and the page that explains it. The micro models stand for the lab; nothing is loaded or trained.
"""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.run_docs import lines
from scripts.site.reference import help_page
from taopd import cli
from taopd.experiments import lab

ROOT = Path(__file__).parents[2]
FREE = {"--output_dir", "--output", "-o"}
"""Any name will do."""
PRINTED = {re.sub(r"\b(config|pair)\.yaml", "recipes/tiny.yaml", line.command) for line in lines()}
"""With a config that is there in place of the reader's own."""
COMMANDS = [shlex.split(line)[1:] for line in sorted(PRINTED) if re.match(r"taopd [a-z]", line)]


def start(words):
    """How many words name the command."""
    return 2 if words[0] == "diagnose" else 1


def required(words):
    """Names of flags and arguments that the usage asks for; of alternatives all."""
    page = help_page(words[: start(words)])
    usage = re.search(r"usage: taopd (.*)", page)[1].partition("[")[0]
    return set(
        re.findall(r"--[\w-]+|\b[A-Z]{2,}\b(?= |$)", re.sub(r"(--[\w-]+) [A-Z]+", r"\1", usage))
    )


def left_out(words):
    """(arguments, one of which the message must name)."""
    needed = required(words)
    places = [None] * start(words) + list(words[start(words) :])
    for at, word in enumerate(places):
        if word is None:
            continue
        follows = at + 1 < len(words) and not words[at + 1].startswith("-")
        if word.startswith("--") and follows and at + 2 == len(words):
            # Its value, at the end of the line: in between, a value could be taken from what follows.
            yield words[: at + 1], (word, word[2:])
        if word in needed:
            end = next(
                (i for i in range(at + 1, len(words)) if words[i].startswith("-")), len(words)
            )
            name = word.removeprefix("--")
            yield [*words[:at], *words[end:]], (word, f"{name} file")
    positional = {name for name in needed if not name.startswith("-")}
    if positional and not words[start(words)].startswith("-"):
        flags = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        yield [*words[: start(words)], *words[flags:]], tuple(positional)


def misspelt(words):
    if len(words[start(words) - 1]) > 3:
        name = words[start(words) - 1]
        yield [*words[: start(words) - 1], name[:-2] + name[-1], *words[start(words) :]], (name,)
    for at, word in enumerate(words):
        if word.startswith("--") and len(word) > 5:
            name = word[2:]
            yield [*words[:at], f"--{name[:-2]}{name[-1]}", *words[at + 1 :]], (name,)


def wrong_type(words):
    for at, word in enumerate(words[1:], 1):
        flag = words[at - 1]
        if re.fullmatch(r"[\d.]+", word) and flag.startswith("--"):
            yield [*words[:at], "many", *words[at + 1 :]], (flag, flag[2:])


def given_twice(words):
    """Every flag with a value once more at the end, but those that the help page calls repeatable."""
    page = help_page(words[: start(words)])
    for flag, value in zip(words, [*words[1:], "--"], strict=True):
        repeatable = re.search(rf"{flag} [A-Z]+ .*repeatable", page)
        if flag.startswith("--") and not value.startswith("--") and not repeatable:
            yield [*words, flag, value], (f"{flag} is given twice",)


def wrong_value(words):
    """A name or a path that is not there, where nothing else of the line is missing in an empty folder."""
    for at, word in enumerate(words[start(words) :], start(words)):
        others = [
            each for place, each in enumerate(words[start(words) :], start(words)) if place != at
        ]
        flag = words[at - 1] if words[at - 1].startswith("-") else ""
        missing = any(each.startswith("runs/") for each in others)
        if word.startswith("-") or re.fullmatch(r"[\d.]+", word) or flag in FREE or missing:
            continue
        bad = f"{word[:-1]}{'x' if word[-1] != 'x' else 'y'}"
        yield [*words[:at], bad, *words[at + 1 :]], (bad,)


KINDS = (left_out, misspelt, wrong_type, given_twice, wrong_value)


@pytest.fixture
def workplace(tmp_path, monkeypatch, micro_lab):
    for name in ("recipes", "tests", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    there = SimpleNamespace(
        folder=micro_lab.root,
        variant="dialect",
        student=micro_lab.student,
        teacher=micro_lab.teacher,
        prompts=micro_lab.prompts,
    )
    monkeypatch.setattr(lab, "build_lab", lambda variant, **_: there)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_bad_argument_is_named_with_its_page(kind, workplace, capsys):
    tried, wrong = set(), []
    for words in COMMANDS:
        for argv, names in kind(words):
            if tuple(argv) in tried:
                continue
            tried.add(tuple(argv))
            code = cli.main(argv)
            told = capsys.readouterr().err
            found = [row for row in told.splitlines() if row.startswith("taopd") and "error" in row]
            named = found and any(name in found[0] for name in names)
            page = found and re.search(r"`taopd( [a-z -]+)? --help(-all)?`", found[0])
            internal = re.search(r"invalid _\w+", told)  # the name of a function
            if code != 2 or len(found) != 1 or not named or not page or internal:
                wrong.append(f"{' '.join(argv)}: {code}, {names}: {found or told[-300:]}")
    assert not wrong, "\n".join(wrong)
    assert len(tried) > 10


@pytest.mark.parametrize("flag", ["--student", "--split", "--prompts"])
def test_a_name_left_empty_is_refused_by_its_flag(workplace, capsys, flag):
    assert cli.main(["diagnose", "freeze", flag, ""]) == 2
    told = capsys.readouterr().err
    assert f"{flag}: must not be empty text. See `taopd diagnose freeze --help`" in told


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["demo", "--steps", "-3"], "--steps: must be a whole number from 1 on, not '-3'"),
        (["check", "recipes/tiny.yaml", "--max-tokens", "1.5"], "from 1 on, not '1.5'"),
        (["bench", "report", "select"], "report: takes no benchmark beside it"),
        (["evaluate", "x", "--seed", "-1"], "--seed: must be a whole number from 0 on"),
        (["evaluate", "x", "--seed", str(2**64)], f"--seed: must be below 2^63, not {2**64}"),
        (["report", "x", "--max-rollouts", "0"], "--max-rollouts: must be a whole number from 1"),
        (["demo", "--output", ""], "--output: must be a path, not empty text"),
        (["report", " "], "FOLDER: must be a path, not empty text"),
        (["compare", "recipes/studies/tiny.yaml", "--output", ""], "--output: must be a path"),
        (["compare", ""], "STUDY: must not be empty text"),
        (["check", ""], "name the config file"),
        (["check", "--config", ""], "--config: must not be empty text"),
        (["plan", "--config="], "--config: must not be empty text"),
        (["evaluate", "", "--dataset", "x"], "MODEL: must not be empty text"),
        (["evaluate", "x", "--dataset", " "], "--dataset: must not be empty text"),
        (["leaderboard", "--selector", ""], "--selector: must not be empty text"),
        (["train", "--config", "recipes/nothing.yaml"], "the config file recipes/nothing.yaml"),
        (["report", "recipes/tiny.yaml"], "recipes/tiny.yaml is a file; a report is made from"),
        (["train", "recipes/tiny.yaml"], "a file is given as --config recipes/tiny.yaml"),
        (
            ["train", "--config", "recipes/tiny.yaml", "--max-steps", "3", "--max_steps=4"],
            "--max_steps is given twice",
        ),
        (["report", "x", "-o", "a.html", "--output", "b.html"], "-o is given twice: give it once"),
        (["inspect", "x", "--step", "3"], "unknown flag '--step'. Known: --limit"),
    ],
)
def test_a_number_out_of_range_and_a_file_for_a_folder_are_named(workplace, capsys, argv, told):
    assert cli.main(argv) == 2
    errors = [row for row in capsys.readouterr().err.splitlines() if "error" in row]
    assert len(errors) == 1 and told in errors[0] and f"`taopd {argv[0]} --help`" in errors[0]
