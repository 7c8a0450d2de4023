"""Labs under a falling rate: the table and the picture's lines, on made-up curves; the jobs' settings."""

from scripts import lab_schedules
from scripts.labs_again import gathered
from taopd.experiments.arm_settings import Arm
from tests.unit.lab_jobs import finished

STEPS = (0, 500, 1000)


def test_a_row_has_the_ends_of_both_arms_under_both_schedules(tmp_path):
    for schedule, reach, full in (
        ("linear", (0.0, 0.9, 0.8), (0.0, 0.3, 0.2)),
        ("constant", (0.0, 0.7, 0.6), (0.0, 0.5, 0.4)),
    ):
        path = tmp_path / f"exact__envoi__{schedule}.json"
        arms = {"reach@0.1": reach, "full": full}
        finished(path, "envoi", STEPS, arms, teacher=0.98, loss="exact", schedule=schedule)
    rows = gathered(tmp_path, lab_schedules.ABOUT)
    greedy, sampled = (lab_schedules.table(rows, greedy=how) for how in (True, False))
    assert greedy.splitlines()[-1] == "| envoi | exact | 80 (90) | 60 (70) | 20 (30) | 40 (50) |"
    assert sampled.splitlines()[-1] == "| envoi | exact | 8 | 6 | 2 | 4 |"
    (lines,) = lab_schedules.panels(rows).values()
    assert lines == [
        ("reach", list(STEPS), [0.0, 0.9, 0.8]),
        ("full", list(STEPS), [0.0, 0.3, 0.2]),
    ]


def test_a_job_of_every_schedule_differs_in_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(lab_schedules, "build_lab", lambda name, parallel: name)
    monkeypatch.setattr("scripts.default_method.lab_arm", _arm)
    jobs = lab_schedules.make_jobs(tmp_path, "sampled", "envoi")
    found = {job.about["schedule"]: job.arms for job in jobs}
    assert set(found) == {"linear", "constant"}
    for falling, constant in zip(found["linear"], found["constant"], strict=True):
        others = constant.config | {"lr_scheduler_type": "linear"}
        assert falling.config == others
        assert falling.config["loss"] == "sampled_reverse_kl"
        assert (falling.name, falling.seed) == (constant.name, constant.seed)


def test_the_longer_part_has_the_distance_of_a_constant_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(lab_schedules, "build_lab", lambda name, parallel: name)
    monkeypatch.setattr("scripts.default_method.lab_arm", _arm)
    (longer,) = lab_schedules.make_jobs(tmp_path, "longer", "envoi")
    falling, _ = lab_schedules.make_jobs(tmp_path, "exact", "envoi")
    assert longer.path.name == "longer__envoi__linear.json"
    for long, short in zip(longer.arms, falling.arms, strict=True):
        assert long.config == short.config | {"max_steps": 2 * short.config["max_steps"]}


def _arm(lab, name, settings, *, seed, steps):
    about = {"match": "", "evaluate_every": 1, "num_test_prompts": 1}
    paths = dict.fromkeys(("student", "teacher", "prompts"), lab)
    return Arm(name=name, seed=seed, config=settings | {"max_steps": steps}, **about, **paths)
