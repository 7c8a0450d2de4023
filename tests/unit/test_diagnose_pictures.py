"""Pictures of the diagnostic: every table draws, twice alike, and bad tables say what is missing."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from taopd.diagnose import (
    AnalysisSettings,
    decomposition,
    gain_curve,
    matched_top_n,
    q3_gap,
    robustness,
)
from taopd.errors import DataError
from taopd.report.figures import diagnose as diagnostic
from taopd.report.figures import style
from tests.unit.diagnose_simulation import simulate_bank

FAST = AnalysisSettings(num_resamples=50)


@pytest.fixture(scope="module")
def bank():
    return simulate_bank(num_prompts=30, length=20, learnable=0.3, ks=(8, 16))[0]


DRAWINGS = {
    "gain_vs_disagreement": (lambda t: t, diagnostic.draw_gain_against_disagreement),
    "coefficients": (lambda t: decomposition(t, FAST), diagnostic.draw_coefficients),
    "matched_top_n": (lambda t: matched_top_n(t, FAST), diagnostic.draw_matched),
    "q3_gap": (lambda t: robustness(t, FAST), diagnostic.draw_q3_gap),
    "gain_curve": (lambda t: gain_curve([(1, t), (2, t)], FAST), diagnostic.draw_gain_curve),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_draws_png_and_svg_the_same_twice(bank, tmp_path, name):
    table, draw = DRAWINGS[name]
    paths = draw(table(bank), tmp_path / "a")
    assert [path.name for path in paths] == [f"{name}.png", f"{name}.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG") and paths[0].stat().st_size > 10_000
    assert b"<svg" in paths[1].read_bytes()
    again = draw(table(bank), tmp_path / "b")
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]


@pytest.mark.parametrize("name", DRAWINGS)
def test_one_prompt_draws_without_intervals(bank, tmp_path, name):
    table, draw = DRAWINGS[name]
    assert draw(table(bank.assign(prompt=0)), tmp_path)[0].exists()


@pytest.mark.parametrize("name", DRAWINGS)
def test_an_empty_table_is_an_error(bank, tmp_path, name):
    table, draw = DRAWINGS[name]
    with pytest.raises(DataError, match="to draw"):
        draw(table(bank).iloc[:0], tmp_path)


def test_shares_single_group_and_non_finite_gains_draw(bank, tmp_path):
    tokens = bank.assign(gain_forward=bank["gain_forward"].where(bank.index != 5, np.nan))
    diagnostic.draw_gain_against_disagreement(tokens, tmp_path)
    with pytest.raises(DataError, match="no column 'gain_x'"):
        diagnostic.draw_gain_against_disagreement(tokens, tmp_path, gain="gain_x")
    with pytest.raises(DataError, match="no token to draw"):
        diagnostic.draw_gain_against_disagreement(tokens.assign(gain_forward=np.inf), tmp_path)
    table = q3_gap(tokens, replace(FAST, gain="gain_reverse_share"), groups=[4])
    diagnostic.draw_q3_gap(table, tmp_path)
    few = pd.DataFrame(tokens.iloc[:3])
    diagnostic.draw_gain_against_disagreement(few, tmp_path)


def test_letters_that_no_font_has_are_told_once_and_others_are_drawn_by_a_font_that_has_them(
    tmp_path, caplog
):
    """matplotlib draws boxes, and warns of every glyph in every file."""
    style._say_boxes.cache_clear()
    for _ in range(2):
        figure, axes = plt.subplots()
        # The second letter is in STIX, which comes along; its "last resort" has boxes for all.
        title = axes.set_title("arm \N{EGYPTIAN HIEROGLYPH A001} \N{COMBINING ENCLOSING CIRCLE}")
        style.save(figure, tmp_path, "x")
        assert title.get_fontfamily()[0] == "DejaVu Sans"
        assert not set(title.get_fontfamily()) <= {"DejaVu Sans", "Last Resort High-Efficiency"}
    (told,) = caplog.messages
    assert told.startswith("no font of this machine has \N{EGYPTIAN HIEROGLYPH A001}: pictures")
