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
from taopd.report.rollouts import Rollout, read_rollouts
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
        args = SimpleNamespace(compatibility=name, signals="exact")
        lines.on_log(args, state, None, logs=logs)
    legend, *steps = stream.getvalue().splitlines()
    assert words in legend and len(steps) == 2


@pytest.mark.parametrize(("signals", "unit"), [("exact", "nats"), ("topk_lists", "0 to 1")])
def test_the_legend_says_in_what_unit_the_entropy_is(signals, unit):
    stream = io.StringIO()
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=4)
    lines, logs = StepLines(stream), {"loss": 0.5, "signal/disagreement_nats/mean": 1.0}
    lines.on_train_begin(None, state, None)
    state.global_step = 1
    args = SimpleNamespace(compatibility="mass", signals=signals)
    lines.on_log(args, state, None, logs=logs)
    assert f"; H: the student's entropy, {unit};" in stream.getvalue()


def test_the_last_line_has_the_loss_of_the_steps_since_the_line_before():
    """The closing entry of a run holds its metrics since the last log, and the mean loss of all its steps."""
    stream = io.StringIO()
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=12)
    lines, args = StepLines(stream), SimpleNamespace(anchor_coef=3.0)
    lines.on_train_begin(args, state, None)
    state.global_step = 10
    lines.on_log(args, state, None, logs={"loss": 2.0})
    state.global_step = 12
    closing = {"train_loss": 2.5, "loss/selected_nats": 4.0, "loss/anchor_nats": 0.5}
    lines.on_log(args, state, None, logs=closing)
    assert [line.split("  left")[0] for line in stream.getvalue().splitlines()] == [
        "step 10/12  loss 2",
        "step 12/12  loss 5.5",
    ]


@pytest.mark.parametrize(
    ("share", "shown"), [(0.0004, "0.04"), (0.9996, "99.96"), (0.1, "10.0"), (1.0, "100.0")]
)
def test_a_kept_share_is_not_rounded_to_nothing_or_to_all(share, shown):
    line = step_line(1, 4, {"loss": 1.0, "select/kept_fraction": share}, 0)
    assert line == f"step 1/4  loss 1  kept {shown}%  left 0:00:00"


def told(line):
    """What `taopd inspect --tokens` prints of one rollout."""
    stream = io.StringIO()
    pieces = line["tokens"]
    one = Rollout(run="a", step=1, line=line, pieces=pieces, correct=None, kind="words")
    console = Console(file=stream, width=200)
    terminal.show([one], [one], signal="kept", tokens=True, console=console)
    return stream.getvalue()


def rollout_of(kept, ranks, **others):
    size = len(kept)
    return {
        **{"tokens": ["w"] * size, "kept": kept, "rank": ranks, "num_valid": 500, "prompt": "q"},
        **{name: [0.5] * size for name in ("disagreement", "compatibility", "entropy")},
        **others,
    }


def test_what_is_left_out_is_said():
    out = told(rollout_of([True] * 23, list(range(23)), prompt="q" * 2005))
    assert "the first 20 of 23 kept tokens" in out and "… 5 more characters" in out
    out = told(rollout_of([True] * 20, list(range(20)), prompt="q" * 2000))
    assert "first 20" not in out and "more characters" not in out


def test_a_kept_token_that_was_no_candidate_has_no_rank():
    rows = told(rollout_of([True, True, True], [4, -1, 0])).splitlines()
    cells = [line.split()[1:4] for line in rows if line.startswith("w ")]
    assert [row[0] for row in cells] == ["1", "5", "-"]
    assert "0 of 500" not in told(rollout_of([True], [-1]))


def test_a_probability_is_never_0_or_100_per_cent():
    top = {"ids": [[1, 2, 3]], "logprobs": [[0.0, -0.69, -7.6]]}
    names = {"1": "one", "2": "two", "3": "three"}
    out = told(rollout_of([True], [0], student_top=top, teacher_top=top, vocabulary=names))
    assert "one >99 %, two 50 %, three <1 %" in out


def test_a_kept_share_of_a_rollout_is_not_rounded_to_nothing():
    assert "0.04 % kept" in told(rollout_of([True] + [False] * 2499, list(range(2500))))
