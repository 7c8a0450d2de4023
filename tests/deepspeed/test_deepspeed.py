"""Two gloo processes under DeepSpeed, ZeRO-2 and ZeRO-3, choose and train as one (`make test-deepspeed`).

Oracle: the same case in one process without DeepSpeed. A gradient is what a step of SGD moved, since
DeepSpeed drops gradients within the step; every weight is in parts, however small.
"""

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from taopd.runs.checkpoints import why_incomplete
from taopd.trainer.cost import load_shape
from tests.conftest import run_script
from tests.e2e.test_ranks import CASES, by_rank, places, plan_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="make test-deepspeed installs it"
)
NAMES = {"anchored", "spread", "accumulated", "window", "tied", "none_selected", "none_valid"}
NAMES |= {"empty", "no_position", "lora", "uneven"}
USED = [case for case in CASES if case["name"] in NAMES]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(micro_lab, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("deepspeed")
    cases = json.dumps(USED)
    arguments = str(micro_lab.root), str(out), cases, "zero2", "zero3"
    run_script(ROOT / "tests/e2e/rank_worker.py", *arguments, timeout=400)
    return out


@pytest.mark.parametrize("way", ["zero2", "zero3"])
@pytest.mark.parametrize("case", [case["name"] for case in USED])
def test_two_processes_equal_one(runs, case, way):
    one, truth = by_rank(runs, case, "ddp", 1)
    ranks, moved = by_rank(runs, case, way, 2)
    assert all("DEEPSPEED" in rank["type"] for rank in ranks)
    for key in ("kept", "anchored"):
        assert places(ranks, key) == places(one, key), key
    assert places(one, "kept")[-1], "vacuous"
    for mine, theirs in zip(ranks[0]["log"], one[0]["log"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert "update/norm" in theirs and "update/norm" not in mine
    if "eval_loss" in one[0]:
        assert ranks[1]["eval_loss"] == pytest.approx(one[0]["eval_loss"], rel=1e-5)
    if case == "uneven":
        return  # two small steps: what they moved is too little to be read as a gradient
    largest = max(float(gradient.norm()) for gradient in truth.values())
    assert largest > 0, "vacuous"
    for name, gradient in truth.items():
        scale = max(float(gradient.norm()), 1e-3 * largest)
        assert float((moved[name] - gradient).norm()) / scale < 1e-5, name
    for name in moved.keys() - truth.keys():
        assert case == "lora" and not moved[name].any(), f"{name} is frozen"


def test_under_zero3_student_and_teacher_are_in_parts(runs):
    ranks, _ = by_rank(runs, "anchored", "zero3", 2)
    assert {rank[key] for rank in ranks for key in ("weights_bytes", "teacher_bytes")} == {0}


@pytest.mark.parametrize(("case", "steps"), [("anchored", 1), ("accumulated", 2)])
def test_what_ranks_move_is_what_plan_says(runs, micro_lab, case, steps):
    """Oracle: the bytes given to collectives.

    The student is gathered once more to generate, and heads once more where DeepSpeed has let go of them:
    with these small models that is 6 % of a step.
    """
    settings = {"micro_batches": steps, "guard": True}
    said = plan_of(micro_lab, 2, "zero3", **settings).communication.moved
    student = load_shape(str(micro_lab.student)).num_parameters * 4
    for rank in by_rank(runs, case, "zero3", 2)[0]:
        moved = sum_of(rank["traffic"], "c10d._allgather_base_.default") - student
        assert moved == pytest.approx(said["parameters"], rel=0.1)
        reduced = sum_of(rank["traffic"], "c10d._reduce_scatter_base_.default")
        assert reduced == pytest.approx(said["gradients"], rel=1e-3)


def sum_of(traffic: dict, name: str) -> float:
    """Bytes of the wholes; the counter sees the whole and the own half."""
    return sum(counts.get(name, 0) for counts in traffic.values()) / 1.5


@pytest.fixture(scope="module")
def resumed(micro_lab, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("resumed")
    worker = Path(__file__).with_name("resume_worker.py")
    run_script(worker, str(micro_lab.root), str(out), timeout=400)
    return out


def test_a_resumed_run_is_as_if_never_interrupted(resumed):
    for rank in (0, 1):
        found = json.loads((resumed / f"{rank}.json").read_text())
        assert found["resumed"] == found["whole"] and len(set(found["whole"].values())) > 10


def test_its_checkpoints_are_whole_and_its_student_too(resumed, micro_lab):
    folder = resumed / "run/checkpoint-4"
    assert why_incomplete(folder, "deepspeed") is None
    assert "this one is sharded" in str(why_incomplete(folder, "sharded"))
    saved, before = (
        load_file(resumed / "model/model.safetensors"),
        load_file(micro_lab.student / "model.safetensors"),
    )
    assert {n: w.shape for n, w in saved.items()} == {n: w.shape for n, w in before.items()}
