"""The page about the default with other settings. Oracle: the file that is committed."""

import shutil
import sys
from pathlib import Path

from scripts import settings_study

SAVED = Path("docs/results/settings.json")


def test_without_runs_the_page_is_made_from_the_saved_file(tmp_path, monkeypatch):
    data = Path(shutil.copy(SAVED, tmp_path / "settings.json"))
    argv = ["settings_study", "--gather", "--runs", str(tmp_path / "none"), "--data", str(data)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(settings_study, "draw_panels", lambda *_: None)
    settings_study.main()
    assert data.read_bytes() == SAVED.read_bytes()
    made = data.with_suffix(".md").read_text(encoding="utf-8").partition("<!-- generated -->")[2]
    assert made and made in SAVED.with_suffix(".md").read_text(encoding="utf-8")
