"""A real run, its rollouts, its live tables and its page. Oracle: the scored batch the observers saw."""

import json
import math
import types

import numpy as np
import pytest
import torch

from taopd.preflight.probe import measure_micro_batch
from taopd.report import terminal
from taopd.report.folders import read_folders
from taopd.report.page import write_report
from taopd.report.rollouts import read_rollouts
from taopd.runs.limits import LIST_FLOOR
from taopd.trainer import tracker_tables as live
from tests.e2e.test_trainer import make_trainer


@pytest.fixture(scope="module")
def trained(micro_lab, tmp_path_factory):
    """A run of two steps, the scored batches, and what a tracker's module was given."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(micro_lab, folder, max_steps=2, log_rollouts=3, budget=0.2)
    batches, logged = [], []
    module = types.SimpleNamespace(
        Table=lambda columns, data: ("table", columns, data),
        plot=types.SimpleNamespace(line=lambda table, x, y, title: ("line", x, y)),
        log=logged.append,
    )
    tables = live.LiveTables(["wandb"], every=1)
    trainer.observers += [batches.append, tables]
    trainer.add_callback(tables)
    with pytest.MonkeyPatch.context() as patch:
        really = live.importlib.import_module
        patch.setattr(
            live.importlib,
            "import_module",
            lambda name, *rest: module if name == "wandb" else really(name, *rest),
        )
        trainer.train()
    lines = (folder / "run/rollouts.jsonl").read_text().splitlines()
    return folder / "run", [json.loads(line) for line in lines], batches, logged


def test_a_logged_rollout_holds_what_was_scored(trained):
    _, lines, batches, _ = trained
    assert [line["step"] for line in lines] == [1, 1, 1, 2, 2, 2]
    line, scored = lines[1], batches[0]
    here = (scored.positions.row == line["completion"]).nonzero().squeeze(1)
    selection = scored.choice.selection
    assert line["num_valid"] == selection.num_valid and line["cut"] == selection.num_budget
    assert line["rank"] == selection.order[scored.local][here].tolist()
    for name, values in (
        ("disagreement", scored.signals.disagreement),
        ("learnable", selection.learnable[scored.local]),
        ("student_logprob", scored.signals.student_logprobs),
    ):
        assert line[name] == pytest.approx(values[here].tolist(), rel=1e-3, abs=1e-9)
    assert line["answer"] is not None and isinstance(line["truncated"], bool)


def test_lists_hold_every_likely_id_of_either_model_and_no_other(trained):
    _, lines, batches, _ = trained
    line, signals = lines[1], batches[0].signals
    here = (batches[0].positions.row == line["completion"]).nonzero().squeeze(1).tolist()
    tops = {
        name: [
            dict(zip(ids.tolist(), p.exp().tolist(), strict=True))
            for ids, p in zip(a, b, strict=True)
        ]
        for name, a, b in (
            ("student", signals.student_topk_ids[here], signals.student_topk_logprobs[here]),
            ("teacher", signals.teacher_topk_ids[here], signals.teacher_topk_logprobs[here]),
        )
    }
    for name, other in (("student", "teacher"), ("teacher", "student")):
        for at, mine in enumerate(tops[name]):
            expected = [
                token
                for token, p in mine.items()
                if p > LIST_FLOOR or tops[other][at].get(token, 0) > LIST_FLOOR
            ]
            assert line[f"{name}_top"]["ids"][at] == expected
            logprobs = line[f"{name}_top"]["logprobs"][at]
            assert [math.exp(p) for p in logprobs] == pytest.approx(
                [mine[t] for t in expected], rel=6e-3
            )
            assert all(str(token) in line["vocabulary"] for token in expected)


def test_live_tables_of_a_step(trained):
    _, lines, batches, logged = trained
    assert [entry["train/global_step"] for entry in logged] == [1, 2]
    kind, columns, rows = logged[0]["taopd/inspector"]
    assert kind == "table" and columns == list(live.TOKEN_COLUMNS)
    assert [row[0] for row in rows] == lines[0]["tokens"] and [row[-1] for row in rows] == lines[0][
        "kept"
    ]
    _, _, budget = logged[0]["taopd/budget"]
    learnable = batches[0].choice.selection.learnable.double()
    half = torch.topk(learnable, round(0.5 * len(learnable))).values.sum() / learnable.sum()
    assert dict(map(tuple, budget))[0.5] == pytest.approx(float(half))
    assert logged[0]["taopd/budget_plot"][0] == "line"


def test_the_budget_curve_counts_tokens_that_may_train_alone():
    """Oracle: by hand. Two of six are excluded stop tokens, one of them with a D^L of its own."""
    learnable = torch.tensor([0.4, 0.9, 0.3, 0.2, 0.1, 0.0])
    valid = torch.tensor([True, False, True, True, True, False])
    scored = types.SimpleNamespace(
        choice=types.SimpleNamespace(selection=types.SimpleNamespace(learnable=learnable)),
        table=types.SimpleNamespace(valid=valid),
    )
    assert dict(map(tuple, live.budget_rows(scored))) == {
        **dict.fromkeys((0.01, 0.02, 0.05, 0.1, 0.2, 0.3), pytest.approx(0.4)),
        **{0.5: pytest.approx(0.7), 0.75: pytest.approx(0.9), 1.0: pytest.approx(1.0)},
    }


def test_the_page_of_a_real_run(trained, tmp_path):
    folder, *_ = trained
    report = write_report([folder], tmp_path / "x.html")
    assert report.num_rollouts == 6
    assert {"Token by token", "What was selected", "Over the training"} <= set(report.sections)


def test_no_tracker_hears_of_the_look_before_training(micro_lab, tmp_path, monkeypatch):
    """trackio raises on a log before its run has begun, and TRL times every method into it."""
    trainer = make_trainer(micro_lab, tmp_path, max_steps=1)
    trainer.args.report_to = ["trackio"]
    heard, generate = [], trainer._generate_single_turn

    def listen(*args):
        heard.append(list(trainer.args.report_to))
        return generate(*args)

    monkeypatch.setattr(trainer, "_generate_single_turn", listen)
    measure_micro_batch(trainer)
    assert heard == [[]] and trainer.args.report_to == ["trackio"]


def test_a_tracker_without_lines_gets_the_budget_as_a_picture():
    """Oracle: a curve along the diagonal is drawn below left and above right, not above left."""
    picture = live._budget_picture(["budget", "share"], [[x / 10, x / 10] for x in range(11)])
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    colored = np.ptp(picture.astype(int), axis=2) > 60
    height, width = colored.shape
    upper, lower = colored[: height // 3], colored[-height // 2 :]
    assert upper[:, -width // 3 :].any() and not upper[:, : width // 3].any()
    assert lower[:, : width // 2].any()


def test_a_run_logs_the_peak_of_its_memory(trained):
    folder, *_ = trained
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    peaks = [line["perf/peak_memory_mib"] for line in lines if "perf/peak_memory_mib" in line]
    assert len(peaks) == 2 and 0 < peaks[0] <= peaks[1]


def test_a_completion_that_ends_with_a_second_stop_id_is_not_truncated(micro_lab, tmp_path):
    """In the log, in the inspector's filter, and as TRL counts it. Oracle: the generation config."""
    trainer = make_trainer(micro_lab, tmp_path, max_steps=1, log_rollouts=8)
    second = 5
    trainer.eos_token_ids = [*trainer.eos_token_ids, second]  # as a config with two ids gives it
    sampled = [[6, 7, second], [6, second], [6, 7, 2], [6, 7, 8, 9], [second], [7, 2], [8, 9], [9]]
    trainer._generate_single_turn = lambda ids, *_, **__: sampled[: len(ids)]
    trainer.train()
    path = tmp_path / "run/rollouts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 8
    by_ids = {tuple(line["token_ids"]): line["truncated"] for line in lines}
    assert by_ids == {tuple(ids): ids[-1] not in (2, second) for ids in sampled}
    rollouts = read_rollouts(read_folders([path.parent]).runs, limit=8)
    chosen = terminal.choose(rollouts, truncated=True)
    assert sorted(tuple(one.line["token_ids"]) for one in chosen) == [(6, 7, 8, 9), (8, 9), (9,)]
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["completions/clipped_ratio"] == pytest.approx(3 / 8)
