"""Names that begin with `~`, and a process without a home folder."""

import pwd
import re

import pytest

from taopd import FixedContextBank
from taopd.errors import ConfigError, DataError
from taopd.experiments.lab.build import default_root
from taopd.experiments.smollm2.pair import default_cache
from taopd.models.loading import load_model, load_tokenizer
from taopd.models.prompts import load_prompts
from taopd.runs.folder import RunFolder
from taopd.runs.paths import cache_folder, expanded

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
