"""verl on the micro lab: its config, its batches, its worker on the CPU, and the gradients of its engine."""

import copy
import os
import socket
from functools import cache, partial

import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from transformers import AutoModelForCausalLM

import tests.integrations.cpu_platform  # noqa: F401 (before verl's workers)

# isort: split
import verl.models.transformers.monkey_patch
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from taopd.integrations.verl import SelectiveWorker
from taopd.integrations.verl.selection import FIELDS
from taopd.integrations.verl.trainer import EXACT, TOP_K

VOCABULARY = 40
FORWARD = ["distillation.distillation_loss.loss_mode=taopd_forward_kl_topk"]
K1 = [
    "distillation.distillation_loss.loss_mode=taopd_k1",
    "distillation.distillation_loss.use_policy_gradient=true",
]
PLAIN = ["distillation.distillation_loss.loss_mode=forward_kl_topk"]


class CpuWorker(SelectiveWorker):
    """The worker under test; its process group is made first, since verl's asks for two backends of "cpu"."""

    def __init__(self, *args, **kwargs):
        # verl 0.9.1 looks for a class that trl lost after 0.27; in a verl environment there is no newer trl.
        verl.models.transformers.monkey_patch.is_trl_available = lambda: False
        super().__init__(*args, **kwargs)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")


def verl_config(micro_lab, *overrides: str):
    """verl's own YAML for a run on the micro lab, with further overrides "key=value"."""
    config = copy.deepcopy(composed(micro_lab))
    with open_dict(config):
        for override in overrides:
            key, _, value = override.partition("=")
            OmegaConf.update(config, key.removeprefix("+"), yaml.safe_load(value))
    return config


@cache
def composed(micro_lab):
    """By verl's entry point's own way: hydra over the YAML files of the installed package."""
    settings = [
        "trainer.v1.trainer_mode=taopd_sync",
        "+trainer.v1.taopd_sync.score_top_k=4",
        "distillation.enabled=true",
        "distillation.nnodes=1",
        "distillation.n_gpus_per_node=2",
        f"distillation.teacher_models.teacher_model.model_path={micro_lab.teacher}",
        f"distillation.distillation_loss.topk={VOCABULARY}",
        "distillation.distillation_loss.use_task_rewards=false",
        f"actor_rollout_ref.model.path={micro_lab.student}",
        "actor_rollout_ref.model.enable_gradient_checkpointing=false",
        "actor_rollout_ref.model.use_remove_padding=false",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.calculate_log_probs=false",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.actor.use_torch_compile=false",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        *FORWARD,
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=settings)


def make_worker(config) -> CpuWorker:
    """verl's actor with its FSDP2 engine, one rank, in this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(ranks)
    parts = {"config": config.actor_rollout_ref, "distillation_config": config.distillation}
    worker = CpuWorker(role="actor", **parts)
    worker.init_model()
    return worker


def verl_rows(prompts, completions, teacher, *, topk=VOCABULARY) -> list[dict]:
    """What verl's agent loop puts into the queue for every rollout, teacher's lists shifted as it does."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([*prompt, *completion])
        with torch.no_grad():
            lists = teacher(input_ids=ids[None]).logits[0].log_softmax(-1).topk(topk)
        teacher_ids, teacher_logprobs = lists.indices.int(), lists.values
        teacher_ids[-1], teacher_logprobs[-1] = 0, 0.0  # nothing follows the last token
        mask = torch.ones(len(completion), dtype=torch.int64)
        rows.append(
            {
                "prompts": torch.tensor(prompt),
                "responses": torch.tensor(completion),
                "input_ids": ids,
                "position_ids": torch.arange(len(ids)),
                "response_mask": mask,
                "loss_mask": mask,
                "teacher_ids": teacher_ids,
                "teacher_logprobs": teacher_logprobs,
            }
        )
    return rows


def random_rows(micro_lab, *, num_rows=8, topk=VOCABULARY) -> list[dict]:
    """Rollouts of random words, prompts of 3 to 5 and completions of 2 to 6 tokens."""
    generator = torch.Generator().manual_seed(3)

    def words(number):
        return torch.randint(4, VOCABULARY, (number,), generator=generator).tolist()

    prompts = [words(3 + row % 3) for row in range(num_rows)]
    completions = [words(2 + row % 5) for row in range(num_rows)]
    teacher = AutoModelForCausalLM.from_pretrained(
        micro_lab.teacher, attn_implementation="eager", dtype=torch.float32
    )
    return verl_rows(prompts, completions, teacher, topk=topk)


def layout(packed: bool) -> dict:
    """Padded micro-batches of a number of rows, or packed ones of up to 24 tokens, as in launch.sh."""
    sizes = {"use_dynamic_bsz": packed, "use_remove_padding": packed}
    return sizes | ({"max_token_len_per_gpu": 24} if packed else {})


def scored(worker, rows, *, k=4, exact=False, micro=2, packed=False) -> TensorDict:
    """The batch's columns, by the worker's pass for the old log-probs."""
    batch = list_of_dict_to_tensordict(rows)
    tu.assign_non_tensor(
        batch,
        **{TOP_K: k, EXACT: exact},
        compute_loss=False,
        calculate_entropy=True,
        temperature=1.0,
        micro_batch_size_per_gpu=micro,
        **layout(packed),
    )
    out = worker.compute_log_prob(batch)
    columns = {name: out[name] for name in out.keys() if name in FIELDS or name == "log_probs"}  # noqa: SIM118
    masks = {name: batch[name] for name in ("response_mask", "loss_mask")}
    return TensorDict(columns | masks, batch_size=len(rows))


def gradients(worker, config, rows, *, micro=2, packed=False, **columns):
    """Loss and gradients of one mini-batch through verl's engine and loss, without the optimizer's step."""
    batch = list_of_dict_to_tensordict(rows)
    for name, values in columns.items():
        batch[name] = values
    loss = config.distillation.distillation_loss
    tu.assign_non_tensor(
        batch,
        calculate_entropy=False,
        distillation_use_topk=True,
        distillation_only=not loss.use_policy_gradient,
        global_batch_size=len(rows),
        temperature=1.0,
        micro_batch_size_per_gpu=micro,
        **layout(packed),
        use_fused_kernels=False,
    )
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    function = partial(
        distillation_ppo_loss,
        config=actor,
        distillation_config=omega_conf_to_dataclass(config.distillation),
    )
    engine = worker.actor.engine
    with engine.train_mode(disable_auto_offload=True):
        engine.optimizer_zero_grad()
        out = engine.forward_backward_batch(batch, function)
        found = {
            name: parameter.grad.full_tensor().clone()
            for name, parameter in engine.module.named_parameters()
            if parameter.grad is not None
        }
    return sum(out["loss"]), found
