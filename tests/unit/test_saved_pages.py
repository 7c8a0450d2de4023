"""Pages that are made again from their saved files. Oracle: the committed files."""

import shutil
import sys
from pathlib import Path

import pytest

from scripts import lab_rates, reach_forms, settings_study

RESULTS = Path("docs/results").absolute()


@pytest.mark.parametrize(
    ("script", "name", "flag", "draws"),
    [
        (settings_study, "settings.json", "--data", "draw_panels"),
        (lab_rates, "lab_rates.json", "--data", "draw"),
        (reach_forms, "reach_forms.json", "--output", "draw"),
    ],
)
@pytest.mark.usefixtures("own_labs")
def test_without_runs_the_page_is_made_from_the_saved_file(
    script, name, flag, draws, tmp_path, monkeypatch
):
    saved = RESULTS / name
    data = Path(shutil.copy(saved, tmp_path))
    monkeypatch.chdir(tmp_path)  # where the default folder of runs is not
    monkeypatch.setattr(sys, "argv", [script.__name__, "--gather", flag, str(data)])
    monkeypatch.setattr(script, draws, lambda *_: None, raising=False)
    script.main()
    assert data.read_bytes() == saved.read_bytes()
    made = data.with_suffix(".md").read_text(encoding="utf-8").partition("<!-- generated -->")[2]
    page = saved.with_suffix(".md").read_text(encoding="utf-8")
    assert made and made == page[-len(made) :]
