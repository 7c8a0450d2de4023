"""The table of signal names. Oracles: the tables and files that have these keys."""

from dataclasses import fields

from taopd.report.folders import read_folders
from taopd.report.pack import pack
from taopd.report.rollouts import read_rollouts
from taopd.runs.schemas import ROLLOUT
from taopd.runs.signal_names import SELECTED_BY, SHADES, SIGNALS, SignalName
from taopd.signals import SignalTable
from tests.browser import make_pages


def test_the_columns_of_a_selector_are_fields_of_its_table():
    names = [field.name for field in fields(SignalTable)]
    assert names[: len(SELECTED_BY)] == list(SELECTED_BY)


def test_a_rollout_may_have_every_signal_and_the_page_gets_its_words(tmp_path):
    folder = make_pages.small(tmp_path)[0]
    rollouts = read_rollouts(read_folders([folder]).runs, limit=8, match="exact")
    assert {f"{key}?" for key in SIGNALS} <= set(ROLLOUT)
    described, _ = pack(rollouts)
    assert list(described["signals"]) == list(SHADES) and "kept" in SHADES
    assert described["signals"]["entropy"] == {
        **{"name": "H, the student's entropy", "short": "H", "unit": "nats"},
        **{"ramp": "s", "to": None},
    }
    logged = {*SIGNALS} - {"gain"}
    assert logged & set(described["columns"]) == logged & set(rollouts[0].line)


def test_a_signal_without_a_symbol_goes_by_its_key_and_title():
    plain = SignalName("score", "", "the selector's score", "")
    assert (plain.name, plain.short) == ("the selector's score", "score")
