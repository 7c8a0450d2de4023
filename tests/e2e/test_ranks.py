"""Several processes choose the same tokens and take the same gradient as one: DDP and FSDP2, 2 and 4 of them.

Oracle: the same case in one process. One launch runs every case (`rank_worker.py`); tests read what it wrote.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from taopd.distributed.radix import BYTES_PER_PLACE
from taopd.trainer.cost import PlanSettings, load_shape, plan
from taopd.trainer.cost.communication import REACH_BYTES, ROW_BYTES, SPREAD_PLACES
from tests.conftest import run_script

WORKER = Path(__file__).parent / "rank_worker.py"
ANCHORED = {"budget": 0.2, "anchor_coef": 0.5, "anchor_fraction": 0.3, "anchor_responses": 0.6}
SPREAD = {"gather_limit": 0}
# Sharp distributions: those of the micro models agree too well for anything to be worth teaching.
REACH = {"method": "reach", "budget": 0.2, "anchor_fraction": 0.3, "learning_rate": 1.0}
REACH |= {"reach_threshold": 0.05, "temperature": 0.05}
CASES = [
    {"name": "anchored", "settings": ANCHORED, "evaluate": True},
    {"name": "spread", "settings": ANCHORED | SPREAD | {"shadow_selectors": ["tip", "random"]}},
    {
        "name": "accumulated",
        "settings": ANCHORED | {"accumulation": 2, "reduction": "sample_mean"},
    },
    {"name": "window", "settings": ANCHORED | {"gradient_window": 1}},
    {"name": "tied", "settings": ANCHORED, "student": {"tie_word_embeddings": True}},
    # 20 prompts are two generation batches of 8 and four that are left.
    {
        "name": "uneven",
        "settings": {"budget": 0.2, "max_steps": -1, "num_train_epochs": 1, "learning_rate": 1.0},
        "prompts": 20,
    },
    {
        "name": "none_selected",
        "settings": {"selector": "first_responses", "budget": 0.1} | SPREAD,
    },
    {
        "name": "none_valid",
        "settings": ANCHORED | {"stop_tokens": "exclude"},
        "sampling": "stop",
    },
    {"name": "empty", "settings": ANCHORED, "sampling": "empty"},
    {
        "name": "no_position",
        "settings": ANCHORED | SPREAD,
        "sampling": "outside",
        "student": {"vocab_size": 48},
    },
    {"name": "lora", "settings": ANCHORED, "lora": True},
    # With four ranks of two rows each, one rank has rows of one teacher alone.
    {
        "name": "teachers",
        "settings": ANCHORED
        | SPREAD
        | {"accumulation": 2, "budget_scope": "teacher", "teacher_weights": {"code": 0.5}},
        "teachers": ["math", "math", "code"],
        "evaluate": True,
    },
    {"name": "reach", "settings": REACH, "evaluate": True},
    # In the second step the initial student runs on half of the completions, on some ranks on none.
    {
        "name": "remembered",
        "settings": REACH | SPREAD | {"anchor_responses": 0.5, "max_steps": 2},
        "evaluate": True,
    },
    # The hold is exact, the loss of the others is not: two terms a teacher.
    {
        "name": "reach_teachers",
        "settings": REACH | {"loss": "sampled_reverse_kl"},
        "teachers": ["math", "math", "code"],
    },
    {"name": "adamw", "settings": {"budget": 0.2, "optim": "adamw_torch"}},
]
WORLDS = [("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4)]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(micro_lab, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    run_script(WORKER, str(micro_lab.root), str(out), json.dumps(CASES), timeout=500)
    return out


def by_rank(runs, case, way, world):
    """What each rank wrote, and the whole gradients."""
    name = f"{case}-{way}-{world}"
    ranks = [json.loads((runs / f"{name}-{rank}.json").read_text()) for rank in range(world)]
    return ranks, load_file(runs / f"{name}.safetensors")


def places(ranks, key):
    """Per step, the (completion, position) pairs that any rank knows of."""
    return [
        {tuple(pair) for rank in ranks for pair in rank[key][step]}
        for step in range(len(ranks[0][key]))
    ]


@pytest.mark.parametrize(("way", "world"), WORLDS)
@pytest.mark.parametrize("case", [case["name"] for case in CASES])
def test_ranks_equal_one_process(runs, case, way, world):
    one, truth = by_rank(runs, case, "ddp", 1)
    ranks, gradients = by_rank(runs, case, way, world)
    assert all(("FSDP" in rank["type"]) == (way == "fsdp2") for rank in ranks)
    for key in ("kept", "anchored"):
        assert places(ranks, key) == places(one, key), key
    assert places(one, "kept")[-1], "vacuous"
    assert gradients.keys() == truth.keys()
    largest = max(float(gradient.norm()) for gradient in truth.values())
    assert largest > 0, "vacuous"
    for name, gradient in truth.items():
        scale = max(float(gradient.norm()), 1e-3 * largest)
        assert float((gradients[name] - gradient).norm()) / scale < 1e-5, name
    logged = ("select/", "signal/", "shadow/", "update/", "guard/", "teacher/", "loss/")
    for mine, theirs in zip(ranks[0]["log"], one[0]["log"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for key, value in theirs.items():
            # A signal is scaled by its spread, which is small against the float32 it is computed in.
            if key.startswith(logged):
                assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-7), key
    if "eval_loss" in one[0]:
        for rank in ranks:
            assert rank["eval_loss"] == pytest.approx(one[0]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(("way", "world"), WORLDS)
def test_a_rank_may_select_nothing_or_have_nothing(runs, way, world):
    """The cases are what their names say, on the ranks of the later half."""
    for case in ("none_selected", "no_position"):
        ranks, _ = by_rank(runs, case, way, world)
        assert ranks[0]["kept"][0] and not ranks[-1]["kept"][0], case
    for case in ("no_position", "empty"):
        ranks, _ = by_rank(runs, case, way, world)
        assert ranks[-1]["num_local"] == [0] and ranks[0]["num_local"][0] > 0, case
    ranks, _ = by_rank(runs, "none_valid", way, world)
    assert ranks[-1]["num_local"][0] > 0 == ranks[-1]["num_local_valid"][0]
    ranks, _ = by_rank(runs, "uneven", way, world)
    assert len(ranks[0]["kept"]) == 2


def plan_of(micro_lab, world, way, **settings):
    """What `taopd plan` says of the case "adamw"; the lengths decide nothing that is compared."""
    student, teacher = (load_shape(str(path)) for path in (micro_lab.student, micro_lab.teacher))
    known = {"dtype": "float32", "student_dtype": "float32", "teacher_dtype": "float32"}
    lengths = {"prompt_length": 5, "completion_length": 6, "batch": 8 // world}
    return plan(
        student,
        teacher,
        PlanSettings(num_ranks=world, sharding=way, **known, **lengths, **settings),
    )


@pytest.mark.parametrize(("way", "world"), WORLDS)
def test_what_a_rank_holds_is_what_plan_says(runs, micro_lab, way, world):
    """Oracle: the bytes of parameters, teacher and Adam's states that each rank had. Exact: sizes divide."""
    parts = plan_of(micro_lab, world, way).memory.parts
    for rank in by_rank(runs, "adamw", way, world)[0]:
        assert rank["weights_bytes"] == parts["student_weights"]
        assert rank["teacher_bytes"] == parts["teacher_weights"]
        assert rank["optimizer_bytes"] == parts["optimizer_states"]


@pytest.mark.parametrize(("way", "world"), WORLDS)
@pytest.mark.parametrize(("case", "steps"), [("adamw", 1), ("accumulated", 2)])
def test_what_ranks_move_is_what_plan_says(runs, micro_lab, way, world, case, steps):
    """Oracle: the bytes given to collectives, counted as they are called."""
    moved = plan_of(micro_lab, world, way, micro_batches=steps).communication.moved
    for rank in by_rank(runs, case, way, world)[0]:
        counted = rank["traffic"]["other"]
        if way == "ddp":
            assert counted["c10d.allreduce_.default"] == pytest.approx(moved["gradients"], rel=0.01)
            continue
        # The counter sees the whole and the own part of it.
        both = 1 + 1 / world
        assert counted["c10d._allgather_base_.default"] / both == pytest.approx(
            moved["parameters"], rel=1e-3
        )
        assert counted["c10d._reduce_scatter_base_.default"] / both == pytest.approx(
            moved["gradients"], rel=1e-3
        )


@pytest.mark.parametrize(("way", "world"), WORLDS)
def test_a_selection_moves_what_plan_says(runs, way, world):
    """Oracle: the counted bytes; rows are padded to the longest rank, and counts add a few hundred bytes."""
    for case, row, num_columns in (
        ("anchored", ROW_BYTES, 3),
        ("reach", ROW_BYTES + REACH_BYTES, 7),
    ):
        ranks, _ = by_rank(runs, case, way, world)
        sent = max(rank["num_local"][0] for rank in ranks) * row
        facts = (2 + num_columns) * 8
        counted = ranks[0]["traffic"]["select"]["c10d.allgather_.default"]
        assert counted == (sent + facts) * (1 + world), case
    ranks, _ = by_rank(runs, "none_selected", way, world)
    spread = ranks[0]["traffic"]["select"]["c10d.allreduce_.default"]
    assert spread == pytest.approx(SPREAD_PLACES * BYTES_PER_PLACE, rel=0.05)
