"""A step of verl's trainer with its real parts: ray, TransferQueue, a group of two workers, FSDP2 on gloo."""

import os
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="make test-verl")

from tests.integrations.verl_lab import CpuWorker, make_worker, random_rows, scored, verl_config

# isort: split
import ray
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from taopd.integrations.verl import SelectiveTrainer
from taopd.integrations.verl.selection import WEIGHTS, choose_weights
from taopd.integrations.verl.trainer import read_settings

ROOT = Path(__file__).parents[2]
WORKERS = {
    "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture
def queue(micro_lab):
    """A local ray with verl's queue in one storage unit; both end with the test."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        num_cpus=6,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 2**20,
        runtime_env={"env_vars": WORKERS},
    )
    settings = verl_config(micro_lab).transfer_queue
    settings.backend.SimpleStorage.num_data_storage_units = 1
    tq.init(settings)
    yield
    tq.close()
    ray.shutdown()


def one_rank(config, rows) -> dict:
    """The same update with one rank in this process, past trainer, queue and ray."""
    worker = make_worker(config)
    weights, chosen = choose_weights(scored(worker, rows), read_settings(config), step=7)
    batch = list_of_dict_to_tensordict(rows)
    batch[WEIGHTS] = weights
    tu.assign_non_tensor(
        batch,
        calculate_entropy=False,
        distillation_use_topk=True,
        distillation_only=True,
        global_batch_size=len(rows),
        mini_batch_size=len(rows),
        temperature=1.0,
    )
    out = tu.get(worker.update_actor(batch), "metrics")
    return chosen | {f"actor/{name}": out[name][0] for name in ("loss", "grad_norm", "lr")}


def test_a_step_of_the_trainer_on_two_ranks_equals_one_rank(micro_lab, queue):
    rows = random_rows(micro_lab)
    config = verl_config(micro_lab, "trainer.v1.taopd_sync.budget=0.1")
    parts = {"config": config.actor_rollout_ref, "distillation_config": config.distillation}
    group = RayWorkerGroup(
        resource_pool=RayResourcePool([2], use_gpu=False, max_colocate_count=1),
        ray_cls_with_init=RayClassWithInitArgs(ray.remote(CpuWorker), role="actor", **parts),
        device_name="cpu",
    )
    group.init_model()
    # The trainer without its rollout servers: what `_step_once` calls for a batch that is in the queue.
    trainer = SelectiveTrainer.__new__(SelectiveTrainer)
    trainer.config, trainer.settings = config, read_settings(config)
    trainer.actor_rollout_wg, trainer.global_steps = group, 7
    trainer.distillation_config = omega_conf_to_dataclass(config.distillation)
    keys = [f"prompt{row}_0_0" for row in range(len(rows))]
    tags = [{"is_padding": False} for _ in rows]
    where = {"keys": keys, "partition_id": "train"}
    tq.kv_batch_put(**where, fields=list_of_dict_to_tensordict(rows), tags=tags)
    batch = KVBatchMeta(**where, tags=tags, extra_info={"temperature": 1.0})
    metrics: dict = {}
    batch = trainer._compute_old_log_prob(batch, metrics)
    batch = trainer._update_actor(batch, metrics)
    assert list(batch.keys) == keys
    truth = one_rank(config, rows)
    assert truth["select/kept_tokens"] == 3
    assert truth["actor/grad_norm"] > 0
    for name, value in truth.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
