"""`taopd inspect` and the lines of a training. Oracles: the text as printed, counted by hand."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from taopd import cli
from taopd.report import terminal
from taopd.report.folders import read_folders
from taopd.report.rollouts import read_rollouts
from taopd.trainer.step_lines import StepLines, step_line
from tests.browser import make_pages, synthetic


@pytest.fixture
def run(tmp_path):
    return make_pages.small(tmp_path)[0]


def rollouts_of(run):
    return read_rollouts(read_folders([run]).runs, limit=100, match="exact")


def test_plain_output_brackets_the_kept_tokens_and_no_other(run, capsys):
    assert cli.main(["inspect", str(run), "--rollout", "1", "--match", "exact"]) == 0
    out = capsys.readouterr().out
    line = json.loads((run / "rollouts.jsonl").read_text().splitlines()[1])
    assert "\x1b" not in out and out.count("[") - 1 == sum(line["kept"])  # One in the legend.
    assert line["prompt"] in out


def test_a_terminal_gets_shades_and_underlined_tokens(run):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="truecolor", width=100)
    rollouts = rollouts_of(run)
    terminal.show(rollouts[:1], rollouts, signal="learnable", tokens=True, console=console)
    out = stream.getvalue()
    kept = sum(rollouts[0].line["kept"])
    assert kept > 0 and out.count("\x1b[1;4") >= kept and "48;2;" in out
    assert "student's best" in out and "[/" not in out


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colors_gets_brackets(run, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    rollouts = rollouts_of(run)
    terminal.show(rollouts[:1], rollouts, signal="learnable", console=console)
    out = stream.getvalue()
    assert "in [brackets]" in out and "each from its number on" not in out
    assert out.count("[") - out.count("\x1b[") - 1 == sum(rollouts[0].line["kept"])


@pytest.mark.parametrize(
    ("tokens", "answer", "right"),
    [
        (["yes", "<|im_end|>"], "yes", True),
        (["ĠNew", "ĠYork", "Ċ", "<|im_end|>"], "New York", True),
        (["k", "Ã", "¶", "ln", "<|im_end|>"], "köln", True),
        (["yes", "Ċ", "no", "<|im_end|>"], "yes\nno", True),
        (["no", "<|im_end|>"], "yes", False),
        (["▁New", "▁York", "</s>"], "New York", True),
        (["▁k", "<0xC3>", "<0xB6>", "ln", "</s>"], "köln", True),
    ],
)
def test_a_completion_is_graded_as_its_tokenizer_decodes_it(run, tokens, answer, right):
    """Its end token and the signs for unseen characters were graded too: no answer in words was right."""
    marked = {"0": "▁a"} if "</s>" in tokens else {"0": "Ġa"}
    whole = {"tokens": tokens, "answer": answer, "truncated": False, "vocabulary": marked}
    for line in whole, whole | {"tokens": tokens[:-1], "truncated": True}:
        (run / "rollouts.jsonl").write_text(json.dumps(line), encoding="utf-8")
        assert [one.correct for one in rollouts_of(run)] == [right]


@pytest.mark.parametrize(("place", "called"), [("", "."), ("below", ".."), ("", "../a")])
def test_a_run_has_its_folders_name_however_it_is_called(run, monkeypatch, capsys, place, called):
    (run / "below").mkdir()
    monkeypatch.chdir(run / place)
    assert cli.main(["inspect", called, "--limit", "1"]) == 0
    assert "\na, step " in capsys.readouterr().out


def test_a_long_log_is_thinned_with_a_word(run, capsys, monkeypatch):
    assert cli.main(["inspect", str(run)]) == 0
    assert "looked at" not in capsys.readouterr().err
    monkeypatch.setattr(terminal, "MAX_ROLLOUTS", 4)
    assert cli.main(["inspect", str(run)]) == 0
    assert "of the 8 logged rollouts are looked at" in capsys.readouterr().err


def test_filters_orders_and_errors(run, capsys):
    rollouts = rollouts_of(run)
    assert [one.line["truncated"] for one in terminal.choose(rollouts, truncated=True)] == [
        True,
        True,
    ]
    ordered = terminal.choose(rollouts, order="disagreement")
    means = [np.mean(one.line["disagreement"]) for one in ordered]
    assert means == sorted(means, reverse=True)
    assert len(terminal.choose(rollouts, wrong=True)) == 8
    for argv, words in (
        (["--signal", "learnabel"], "learnable"),
        (["--rollout", "99"], "there are 8"),
        (["--limit", "0"], "from 1 on"),
    ):
        assert cli.main(["inspect", str(run), *argv]) == 2
        assert words in capsys.readouterr().err


def test_hostile_text_sends_nothing_to_the_terminal(tmp_path, capsys):
    (run,) = make_pages.hostile(tmp_path)
    assert cli.main(["inspect", str(run), "--match", "exact", "--limit", "2", "--tokens"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "⟨U+202E⟩" in out


def test_a_run_without_rollouts_says_so(tmp_path, capsys):
    run = synthetic.write_run(tmp_path / "a", [])
    assert cli.main(["inspect", str(run)]) == 2
    assert "logged no rollouts" in capsys.readouterr().err


def test_one_line_per_step_with_what_is_known():
    assert step_line(7, 100, {"loss": 1.25}, 3661) == "step   7/100  loss 1.25  left 1:01:01"
    stream = io.StringIO()

    class State:
        is_world_process_zero, global_step, max_steps = True, 0, 4

    lines, state = StepLines(stream), State()
    lines.on_train_begin(None, state, None)
    state.global_step = 2
    lines.on_log(None, state, None, logs={"loss": 0.5, "select/kept_fraction": 0.05})
    lines.on_log(None, state, None, logs={"train_runtime": 1.0})
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().startswith("step 2/4  loss 0.5  kept 5.0%  left 0:00:0")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mass", "C: share of the teacher's probability on the student's top tokens;"),
        (
            "reach",
            "C: share of the teacher's probability on what the initial student could have said",
        ),
        ("jaccard", "C: compatibility by jaccard;"),
    ],
)
def test_the_legend_says_what_c_is_in_this_run(name, words):
    stream = io.StringIO()
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=4)
    lines, logs = StepLines(stream), {"loss": 0.5, "signal/disagreement_nats/mean": 1.0}
    lines.on_train_begin(None, state, None)
    for state.global_step in (1, 2):
        lines.on_log(SimpleNamespace(compatibility=name), state, None, logs=logs)
    legend, *steps = stream.getvalue().splitlines()
    assert words in legend and len(steps) == 2
