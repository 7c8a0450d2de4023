"""Checkpoints of FSDP2 runs, 2 and 4 gloo processes. Oracle: the run that was never interrupted."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from taopd.errors import ConfigError, DataError
from taopd.runs.checkpoints import newest_complete, num_processes_of, why_incomplete
from taopd.trainer.checkpoint.fsdp import layout_of, load_weights
from taopd.trainer.checkpoint.state_file import Shard, load_tree, save_tree
from tests.conftest import make_model, run_script

WORKER = Path(__file__).parent / "shards_worker.py"
pytestmark = pytest.mark.slow
KINDS = ("full", "lora")


@pytest.fixture(scope="module")
def runs(micro_lab, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    run_script(WORKER, str(micro_lab.root), str(out), timeout=300)
    return out


def read(runs: Path, world: int, rank: int) -> dict:
    return json.loads((runs / f"{world}-{rank}.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_as_if_never_interrupted(runs, kind):
    truth = read(runs, 2, 0)[kind]["whole"]
    assert len(truth["losses"]) == 4 and len(set(truth["weights"])) > 10
    for rank in (0, 1):
        found = read(runs, 2, rank)[kind]
        assert found["whole"] == found["resumed"] == truth


def test_bf16_resumes_alike_and_keeps_the_loss_in_float32(runs):
    """Oracle: the loss where it was computed, inside of the wrapper that hands out bfloat16."""
    found = read(runs, 2, 0)["bf16"]
    assert found["resumed"] == found["whole"]
    assert found["inside"] == found["outside"] and len(found["inside"]) == 4
    assert found["inside"] != torch.tensor(found["inside"]).bfloat16().tolist(), "vacuous"


def test_a_bad_loss_on_one_process_is_skipped_or_stops_both(runs):
    truth = read(runs, 2, 0)["full"]["whole"]
    for rank in (0, 1):
        found = read(runs, 2, rank)["bad"]
        assert found["skipped"] == [0.0, 0.0, 1.0, 0.0]
        assert found["after_skip"]["weights"] != truth["weights"]
        assert "2 steps are saved in" in found["stopped"]
        assert found["after_stop"] == truth
    assert "on another process" in read(runs, 2, 0)["bad"]["stopped"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_done_takes_no_further_step(runs, kind):
    found = read(runs, 2, 0)[kind]
    assert found["done"] == found["whole"] | {"steps": 4}


def test_another_number_of_processes_reads_the_same_state(runs):
    truth = read(runs, 2, 0)["full"]["whole"]
    for rank in range(4):
        found = read(runs, 4, rank)
        assert found["same"] == truth
        assert len(found["further"]["losses"]) == 4
        assert found["further"]["weights"] != truth["weights"], "four processes sample otherwise"


def test_rows_that_the_processes_do_not_divide(runs):
    """1, 3 and 5 rows on two and four processes, some of which hold nothing. Oracle: one process."""
    assert all(read(runs, world, rank)["uneven"] for world in (2, 4) for rank in range(world))


def test_no_pickle_and_every_process_has_its_part(runs):
    for kind in KINDS:
        folder = runs / kind / "checkpoint-4"
        names = {path.name for path in folder.rglob("*") if path.is_file()}
        assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".jinja"}
        assert {
            f"{part}-{r}.safetensors" for part in ("shard", "optimizer", "rank") for r in (0, 1)
        } <= names
        assert ("model.safetensors" in names) == (kind == "full")
        assert num_processes_of(folder) == 2
    whole = load_file(runs / "full/checkpoint-4/model.safetensors")
    parts = [load_tree(runs / f"full/checkpoint-4/shard-{rank}.safetensors") for rank in (0, 1)]
    for name, tensor in whole.items():
        together = torch.cat([part[name].values for part in parts])
        torch.testing.assert_close(together, tensor, rtol=0, atol=0)


def test_the_student_is_saved_whole_from_shards_alone(runs):
    saved = load_file(runs / "full/model/model.safetensors")
    last = load_file(runs / "full/checkpoint-4/model.safetensors")
    assert (
        all(torch.equal(saved[name], last[name]) for name in last) and saved.keys() == last.keys()
    )
    with safe_open(runs / "lora/model/adapter_model.safetensors", "pt") as adapter:
        assert any("lora_B" in name for name in adapter.keys())  # noqa: SIM118


def test_a_full_disk_leaves_the_checkpoint_before(runs):
    assert "No space left on device" in read(runs, 2, 0)["torn"]
    assert "The newest checkpoint is" in read(runs, 2, 0)["torn"]
    found, passed_over = newest_complete(runs / "torn", "sharded")
    assert found is not None and found.name == "checkpoint-2" and not passed_over
    assert not (runs / "torn/checkpoint-3").exists()


def test_another_layout_refuses_it(runs):
    folder = runs / "full/checkpoint-4"
    assert why_incomplete(folder, "sharded") is None
    assert "sharded' run, this one is replicated" in str(why_incomplete(folder))
    assert "this one is deepspeed" in str(why_incomplete(folder, "deepspeed"))


def test_a_lost_part_is_noticed(runs, tmp_path):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(runs / "full/checkpoint-4", folder)
    (folder / "shard-1.safetensors").unlink()
    assert why_incomplete(folder, "sharded") == "shard-1.safetensors is missing"


@pytest.fixture
def mesh():
    """One process, that two wrote for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def read_alone(folder: Path, mesh, **shape) -> dict[str, torch.Tensor]:
    model = fully_shard(make_model(seed=3, **shape), mesh=mesh)
    load_weights(folder, model, 0, 2, 1, trained_only=False)
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def test_one_process_reads_the_weights_of_two(runs, mesh):
    folder = runs / "full/checkpoint-4"
    truth = load_file(folder / "model.safetensors")
    found = read_alone(folder, mesh)
    assert all(torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.parametrize("shape", [{"hidden_size": 24}, {"layers": 3}], ids=str)
def test_another_model_is_refused(runs, mesh, shape):
    with pytest.raises(DataError, match="missing, or of another model"):
        read_alone(runs / "full/checkpoint-4", mesh, **shape)


def test_a_part_that_no_process_wrote_is_missed(runs, mesh, tmp_path):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(runs / "full/checkpoint-4", folder)
    tree = load_tree(folder / "shard-1.safetensors")
    del tree["lm_head.weight"]
    save_tree(folder / "shard-1.safetensors", tree)
    with pytest.raises(DataError, match=r"lm_head\.weight is incomplete"):
        read_alone(folder, mesh)


def test_version_1_of_fsdp_is_refused():
    plugin = SimpleNamespace(fsdp_version=1)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        state=SimpleNamespace(fsdp_plugin=plugin),
        parallelism_config=None,
    )
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        layout_of(accelerator)
    plugin.fsdp_version = 2
    assert layout_of(accelerator) == "sharded"


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_processes_that_share_a_batch_are_refused(name):
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.MULTI_CPU,
        parallelism_config=ParallelismConfig(**{name: 2}),
    )
    with pytest.raises(ConfigError, match=f"{name}=2 in parallelism_config is not supported"):
        layout_of(accelerator)


def test_shapes_are_read_without_values(runs):
    tree = load_tree(runs / "full/checkpoint-4/shard-1.safetensors", shard_values=False)
    block = next(iter(tree.values()))
    assert isinstance(block, Shard) and block.values is None
    assert block.start[0] + block.size[0] == block.shape[0]
