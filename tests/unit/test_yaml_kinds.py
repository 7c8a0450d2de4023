"""Files of another kind as a config or a study: one line that names the file, and nothing written."""

import os
import re

import pytest

from taopd import cli
from taopd.errors import ConfigError
from taopd.runs.validation import read_yaml

FILES = {
    "a PNG": (b"\x89PNG\r\n\x1a\n\0\0", "it is no text in UTF-8 (byte 0x89 in position 0)"),
    "UTF-16": ("a: b\n".encode("utf-16"), "it is no text in UTF-8 (byte 0xff in position 0)"),
    "Latin-1": ("a: ü\n".encode("latin-1"), "it is no text in UTF-8 (byte 0xfc in position 3)"),
    "empty": (b"", "and holds nothing"),
    "a list": (b"- a\n", "and holds a list"),
    "a tab": (b"a:\n\tb: 1\n", r"found character '\t'"),
    "a bracket": (b"a: [1\n", "expected ',' or ']'"),
    "two documents": (b"a: 1\n---\na: 2\n", "found another document in line 2"),
    "a key twice": (b"a: 1\na: 2\n", "the key 'a' stands twice, in lines 1 and 2"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_named_in_one_line(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, told = FILES[kind]
    (tmp_path / "run.yaml").write_bytes(content)
    plan, study = ["plan", "--config", "run.yaml"], ["compare", "run.yaml", "--output", "x"]
    for argv in (["train", "--config", "run.yaml"], ["check", "run.yaml"], plan, study):
        assert cli.main(argv) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and "run.yaml" in error[0] and told in error[0]
        assert "unicode string" not in error[0]
    assert os.listdir() == ["run.yaml"]


def test_a_byte_order_mark_and_lines_of_windows_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    for content in (b"\xef\xbb\xbfa: 1\nb: x\n", b"a: 1\r\nb: x\r\n"):
        path.write_bytes(content)
        assert read_yaml(path, "the file") == {"a": 1, "b": "x"}


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("max_steps: 012", "line 2: 012 is octal in YAML, 10: write 12 or 10"),
        ("seeds: [00, 07, 010]", "line 2: 010 is octal in YAML, 8: write 10 or 8"),
        ("max_steps: 1:30", "line 2: 1:30 is a number to base 60 in YAML, 90: write 90"),
    ],
)
def test_a_number_that_yaml_reads_to_another_base_is_refused(tmp_path, written, told):
    (tmp_path / "run.yaml").write_text(
        f"a: [0, 00, 07, -5, 1_000, 0x1F]\n{written}\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=re.escape(told)):
        read_yaml(tmp_path / "run.yaml", "the file")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (
            ["diagnose", "freeze", "--student", "s", "--outptu", "x"],
            "'--outptu'. Did you mean '--output'",
        ),
        (["evaluate", "--datset", "x"], "'--datset'. Did you mean '--dataset'"),
        (["plan", "run.yaml"], "a file is given as --config run.yaml"),
    ],
)
def test_a_misspelt_flag_is_named_before_what_is_missing(argv, told, capsys):
    assert cli.main(argv) == 2
    assert told in capsys.readouterr().err


def test_a_folder_whose_name_begins_with_dashes_follows_two_dashes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "--", "--x"]) == 2
    assert "no such folder: --x" in capsys.readouterr().err


@pytest.mark.parametrize("into", [".", "run.yaml/x.json"])
def test_a_leaderboard_that_cannot_be_written_is_refused_before_a_job(
    into, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("")
    assert cli.main(["leaderboard", "--into", into]) == 2
    assert f"--into {into}" in capsys.readouterr().err
    assert os.listdir() == ["run.yaml"]
