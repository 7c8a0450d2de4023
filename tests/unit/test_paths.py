"""Names that begin with `~`, and a process without a home folder."""

import pwd
import re
from pathlib import Path

import pytest

from taopd import FixedContextBank
from taopd.cli import Parser, compare, main
from taopd.errors import ConfigError, DataError
from taopd.experiments.lab.build import default_root
from taopd.experiments.smollm2.pair import default_cache
from taopd.models.loading import load_model, load_tokenizer
from taopd.models.prompts import load_prompts
from taopd.runs.folder import RunFolder
from taopd.runs.paths import cache_folder, expanded
from tests.browser import make_pages
from tests.unit.test_partly_shown import study

NOBODY = "~no-such-user/x.parquet"


def no_user(uid):
    raise KeyError(uid)


@pytest.mark.parametrize(
    "read",
    [
        load_prompts,
        FixedContextBank.open,
        lambda path: RunFolder.check(path, resume=False, overwrite=False),
    ],
)
def test_the_home_of_nobody_is_named_and_no_traceback(read):
    with pytest.raises(DataError, match=f"no such path: {NOBODY}.*write the whole path"):
        read(NOBODY)


def test_without_a_home_folder_it_is_said_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("TAOPD_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_user)
    for made_once in (default_root, default_cache):
        with pytest.raises(ConfigError, match="set HOME, or TAOPD_CACHE"):
            made_once()
    monkeypatch.setenv("TAOPD_CACHE", str(tmp_path))
    assert default_root() == tmp_path / "tinylab" and cache_folder() == tmp_path


def test_the_home_folder_is_the_one_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TAOPD_CACHE", raising=False)
    assert expanded("~/a") == tmp_path / "a" and expanded("b") == type(tmp_path)("b")
    assert cache_folder() == tmp_path / ".cache/taopd"


def test_what_is_written_below_the_home_folder_is_there(monkeypatch, tmp_path, capsys):
    """A shell leaves `--output=~/x` as it is; a study file has it in any case."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TAOPD_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (run,) = make_pages.small(tmp_path / "runs")[:1]
    assert main(["report", str(run), "--output=~/page.html"]) == 0
    assert (tmp_path / "page.html").is_file()
    folder = study(tmp_path / "study", seeds=[0], finished=[0])
    assert main(["compare", str(folder), "--output=~/compared"]) == 0
    assert (tmp_path / "compared" / "results.json").is_file()
    parser = Parser(prog="taopd x", description="", epilog="")
    parser.flag("--jobs FOLDER", default=Path("runs/jobs"))
    assert parser.parse_args([]).jobs == Path("runs/jobs")
    assert parser.parse_args(["--jobs=~/jobs"]).jobs == tmp_path / "jobs"
    assert main(["report", str(run), f"--output={NOBODY}"]) == 2
    assert f"argument -o/--output: no such path: {NOBODY}" in capsys.readouterr().err
    assert not list((tmp_path / "here").iterdir())


def test_a_study_may_name_an_output_below_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "study.yaml"
    path.write_text("lab: dialect\nseeds: [0]\narms: [{name: a}]\noutput: ~/mine\n")
    asked = []
    monkeypatch.setattr(compare, "run_plan", lambda plan, output, *rest: asked.append(output) or 0)
    monkeypatch.setattr("taopd.experiments.study.run.plan_study", lambda study, progress: None)
    assert main(["compare", str(path)]) == 0 and asked == [tmp_path / "mine"]


@pytest.mark.parametrize(
    "name", ["a b", "ü", "-", "a--b", "a..b", "x.git", "a/b/c", "x" * 300, "a\nb", "a\0b"]
)
def test_a_name_that_neither_a_folder_nor_a_hub_has_is_named(name, tmp_path, monkeypatch):
    """Names with spaces and umlauts are of local folders that are not there, and no hub is asked."""
    monkeypatch.chdir(tmp_path)
    for read, kind in ((load_model, "model folder"), (load_tokenizer, "tokenizer folder")):
        with pytest.raises(DataError, match=rf"^no such {kind}: {re.escape(name)} \(looked in"):
            read(name)
    with pytest.raises(DataError, match=rf"^no such dataset: {re.escape(name)} \(looked in"):
        load_prompts(name)
