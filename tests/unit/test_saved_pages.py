"""Pages that are made again from their saved files. Oracle: the committed files."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from scripts import lab_rates, letters, reach_cheaper, reach_forms, settings_study

SCRIPTS = Path(reach_forms.__file__).parent
RESULTS = Path("docs/results").absolute()


@pytest.mark.parametrize(
    ("script", "name", "flag", "draws"),
    [
        (settings_study, "settings.json", "--data", "draw_panels"),
        (lab_rates, "lab_rates.json", "--data", "draw"),
        (reach_forms, "reach_forms.json", "--output", "draw"),
        (reach_cheaper, "reach_cheaper.json", "--output", "draw"),
        (letters, "letters.json", "--output", "draw"),
        (reach_forms, "reach_longer.json", "--output", "draw"),
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


def test_labs_that_a_script_registers_are_made_in_its_own_process():
    """Another process does not know them: on a machine that has not made them yet it ends in a traceback."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in SCRIPTS.glob("*.py")}
    registering = {name: text for name, text in sources.items() if "unseen_labs.register()" in text}
    assert len(registering) > 4
    for name, text in registering.items():
        calls = re.findall(r"\bbuild_lab\([^)]*\)", text)
        assert all("parallel=False" in call for call in calls), name
