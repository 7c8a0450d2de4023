"""Work that lies in a folder is another's unless it has the same settings, seeds and inputs.

Oracles: what the files held before, byte for byte; the settings that were changed, by name.
"""

import dataclasses
import json

import pytest

from scripts import guard_runs
from taopd.errors import DataError
from taopd.experiments.arm_settings import Arm, write_arm
from taopd.experiments.kept_arms import content, prepare
from taopd.experiments.lab.stacked import jobs
from taopd.experiments.lab.stacked.jobs import Job, run_jobs


def arm_of(folder, name="a", seed=0, **config):
    for model in ("student", "teacher"):
        (folder / model).mkdir(exist_ok=True)
        (folder / model / "model.safetensors").write_bytes(model.encode() * 3)
    (folder / "prompts.jsonl").write_text('{"prompt": "1"}\n')
    return Arm(
        name=name,
        seed=seed,
        config={"max_steps": 3, "budget": 0.1} | config,
        student=str(folder / "student"),
        teacher=str(folder / "teacher"),
        prompts=str(folder / "prompts.jsonl"),
        match="auto",
        evaluate_every=1,
        num_test_prompts=4,
    )


def finish(place):
    curve = {"accuracy_curve": [[0, 0.5]], "accuracy_greedy": 0.5}
    about = {"name": place.name, "seed": 0, "selector": "full", "budget": 1.0} | curve
    (place / "results.json").write_text(json.dumps(about))


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(tmp_path):
    """An arm that has finished, and one that has begun: arms and places."""
    pairs = [(arm_of(tmp_path, name), tmp_path / "arms" / name) for name in ("a", "b")]
    prepare(pairs)
    finish(pairs[0][1])
    (pairs[1][1] / "metrics.jsonl").write_text('{"step": 1}\n')
    return pairs


def test_the_same_arm_is_kept_and_one_that_had_begun_is_cleared(finished, tmp_path):
    prepare(finished)
    assert (finished[0][1] / "results.json").exists()
    assert not (finished[1][1] / "metrics.jsonl").exists()


def test_a_finished_arm_of_other_settings_is_refused_by_name_and_nothing_is_changed(
    finished, tmp_path
):
    (arm, place), begun = finished
    for other, words in (
        (dataclasses.replace(arm, config=arm.config | {"max_steps": 300}), "config.max_steps"),
        (dataclasses.replace(arm, num_test_prompts=5), "num_test_prompts"),
        (dataclasses.replace(arm, config={"max_steps": 3}), "config.budget"),
    ):
        before = files(tmp_path)
        with pytest.raises(DataError, match=rf"arm a-seed0 finished with other .* \({words}\)"):
            prepare([begun, (other, place)])
        assert files(tmp_path) == before


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"seed": "x"}', "{"])
def test_a_finished_arm_whose_results_are_damaged_is_told_before_the_others_run(
    finished, tmp_path, text
):
    (finished[0][1] / "results.json").write_text(text)
    before = files(tmp_path)
    with pytest.raises(DataError, match=r"a/results\.json"):
        prepare(finished)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["student/model.safetensors", "prompts.jsonl"])
def test_another_model_or_file_under_the_same_path_is_refused(finished, tmp_path, name):
    (arm, place), _ = finished
    path = tmp_path / name
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1  # of the same size
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"other files than lie there now \({name[:7]}\w* /"):
        prepare([(arm, place)])


def test_arms_of_earlier_versions_and_inputs_that_are_gone_are_kept(tmp_path):
    arm, place = arm_of(tmp_path), tmp_path / "arms" / "a"
    write_arm(arm, place)  # as before: no inputs.json
    finish(place)
    prepare([(arm, place)])
    hub = dataclasses.replace(arm, name="h", student="org/model")
    prepare([(hub, tmp_path / "h")])
    finish(tmp_path / "h")
    prepare([(hub, tmp_path / "h")])


def test_a_changed_block_of_a_large_file_is_seen_and_a_log_beside_it_is_not(tmp_path):
    model = tmp_path / "model.safetensors"
    model.write_bytes(bytes(5_000_000))
    before = content(tmp_path)
    (tmp_path / "train.log").write_text("x")
    assert content(tmp_path) == before
    with open(model, "r+b") as file:  # training moves every weight: here every hundredth byte
        for place in range(0, 5_000_000, 100):
            file.seek(place)
            file.write(b"\1")
    assert content(tmp_path) != before
    assert content(tmp_path / "none") is None and content(tmp_path / "train.log") is None


def rows_of(arms):
    steps = arms[0].config["max_steps"]
    return [
        {"name": arm.name, "seed": arm.seed, "accuracy_curve": [[0, 0.1], [steps, 0.2]]}
        for arm in arms
    ]


@pytest.mark.parametrize("digest", [True, False])
def test_a_finished_job_of_other_seeds_or_steps_is_not_taken_for_the_one_that_is_asked(
    tmp_path, monkeypatch, digest
):
    arms = [arm_of(tmp_path, seed=seed) for seed in range(2)]
    path = tmp_path / "job.json"
    saved = {"arms": rows_of(arms)} | ({"digest": jobs.digest_of(arms)} if digest else {})
    path.write_text(json.dumps(saved))
    run_jobs([Job(path=path, arms=arms, about={})])  # the same: done
    more = [*arms, arm_of(tmp_path, seed=2)]
    longer = [arm_of(tmp_path, seed=seed, max_steps=6) for seed in range(2)]
    others = [more, arms[:1], longer]
    # Only new files tell settings that no result shows.
    others += [[arm_of(tmp_path, seed=seed, budget=0.3) for seed in range(2)]] * digest
    for other in others:
        with pytest.raises(DataError, match=r"job\.json holds a finished job of other seeds"):
            run_jobs([Job(path=path, arms=other, about={})])
    path.write_text('{"arms": [{"name"')
    with pytest.raises(DataError, match=r"job\.json"):
        run_jobs([Job(path=path, arms=arms, about={})])


def test_a_lab_that_lies_elsewhere_is_the_same_lab(tmp_path):
    arm = arm_of(tmp_path)
    moved = dataclasses.replace(arm, student=f"/elsewhere/{tmp_path.name}/student")
    other = dataclasses.replace(arm, student="/elsewhere/another/student")
    assert jobs.digest_of([arm]) == jobs.digest_of([moved]) != jobs.digest_of([other])


def test_guard_runs_of_other_steps_are_not_taken_for_these(tmp_path):
    path = tmp_path / "x.json"
    runs = [
        {"arm": name, "seed": seed, "greedy": [0.0] * 3}
        for name in guard_runs.ARMS
        for seed in guard_runs.SEEDS
    ]
    path.write_text(json.dumps({"exam_every": 20, "runs": runs}))
    guard_runs.check_finished(path, 40)
    guard_runs.check_finished(path, 45)
    for steps, some in ((400, runs), (40, runs[1:])):
        path.write_text(json.dumps({"exam_every": 20, "runs": some}))
        with pytest.raises(SystemExit, match="other arms, seeds or steps"):
            guard_runs.check_finished(path, steps)
