"""The ranks of `test_ranks.py`: every case under 1, 2 and 4 processes, DDP and FSDP2, in one launch.

Run as: python rank_worker.py MICRO_LAB_FOLDER OUTPUT_FOLDER CASES_JSON [zero2 zero3]; with ways of DeepSpeed
one process, and two of each way. Imports once, then forks each world's ranks, which join over gloo; rank r of
a world writes OUTPUT_FOLDER/CASE-WAY-WORLD-r.json (and rank 0 the gradients). accelerate starts FSDP2 and
DeepSpeed on accelerators only; `open_fsdp_to_cpu` and `open_deepspeed_to_cpu` let them start here.
"""

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationTrainer

sys.path.insert(0, str(Path(__file__).parents[2]))
from scripts.reliability.forked import be_rank, free_port
from taopd.distributed.sharding import gathered
from taopd.models.prompts import load_prompts
from taopd.selectors import register_selector
from taopd.trainer import trainer as trainer_module
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.selection import choose
from taopd.trainer.trainer import TeachabilityTrainer
from tests.conftest import make_model
from tests.e2e.traffic import Traffic

FIXED = {
    "method": "anchored",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "max_completion_length": 6,
    "lr_scheduler_type": "constant",
    "score_top_k": 4,
    "logging_steps": 1,
    "optim": "sgd",
    "learning_rate": 1e3,
    "max_grad_norm": 0.0,
}
NUM_ROWS = 8
"""Completions of a generation batch, all ranks."""


@register_selector("first_responses", local=True)
def first_responses(view):
    """The first completions of the batch: with a small budget most ranks select nothing."""
    return -view.table.completion.double()


def completion_of(prompt_ids: list[int]) -> list[int]:
    """A completion that depends on the prompt alone, so that ranks cannot change it; some are cut short."""
    generator = torch.Generator().manual_seed(sum(i * t for i, t in enumerate(prompt_ids, start=1)))
    length = int(torch.randint(1, 6, (1,), generator=generator))
    return [*torch.randint(4, 40, (length,), generator=generator).tolist(), 2]


def generate(kind: str):
    """In place of sampling: "plain"; "empty", "stop" or "outside" in the later half of the batch."""

    def completions(trainer, prompts, *_, **__):
        first = trainer.accelerator.process_index * len(prompts)
        instead = {"empty": [], "stop": [2], "outside": [45, 46]}
        late = [kind in instead and first + index >= NUM_ROWS // 2 for index in range(len(prompts))]
        return [
            instead[kind] if other else completion_of(prompt)
            for prompt, other in zip(prompts, late, strict=True)
        ]

    return completions


def open_deepspeed_to_cpu() -> None:
    """accelerate starts DeepSpeed on accelerators only: let it take gloo for their backend."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    make = PartialState.__init__
    PartialState.__init__ = lambda self, cpu=False, **kwargs: make(self, False, **kwargs)
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def deepspeed_settings(stage: int) -> dict:
    """A config in which even small weights are in parts."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    zero["stage3_gather_16bit_weights_on_model_save"] = stage == 3
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    return {"deepspeed": config | dict.fromkeys(auto, "auto")}


def open_fsdp_to_cpu(args: TeachabilityConfig) -> None:
    """accelerate turns several GPU processes into FSDP, and several CPU processes not: call them GPU ones."""
    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class Gradients(TrainerCallback):
    """The whole gradients of the last optimizer step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {
            name.removeprefix("module."): whole(p.grad).clone()
            for name, p in model.named_parameters()
            if p.grad is not None
        }


def weights_of(model) -> dict[str, torch.Tensor]:
    """Copies of the whole weights."""
    with gathered(model.parameters()):
        return {
            name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()
        }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_bytes(tensors) -> int:
    """What this rank holds of them."""
    parts = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(part.numel() * part.element_size() for part in parts)


def make_trainer(lab: Path, folder: Path, case: dict, way: str, world: int) -> TeachabilityTrainer:
    settings = dict(case["settings"])
    steps = settings.pop("accumulation", 1)
    if way.startswith("zero"):
        settings |= deepspeed_settings(int(way[-1]))
    if way == "fsdp2":
        settings |= {
            "fsdp": True,
            "fsdp_config": {"transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
        }
    size = NUM_ROWS // world
    args = TeachabilityConfig(
        output_dir=str(folder / f"run-{way}-{world}"),
        per_device_train_batch_size=size // steps,
        per_device_eval_batch_size=size,
        gradient_accumulation_steps=steps,
        **(FIXED | {"max_steps": 1} | settings),
    )
    if way == "fsdp2":
        open_fsdp_to_cpu(args)
    model: object = str(lab / "student")
    if "student" in case:
        model = make_model(seed=0, **case["student"])
    lora = None
    if case.get("lora"):
        from peft import LoraConfig

        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    rows = {
        name: load_prompts(str(lab / "prompts.parquet"), split=name) for name in ("train", "test")
    }
    teacher: object = str(lab / "teacher")
    if "teachers" in case:  # of another width; one rank's rows may all be of one of them
        other = case.get("served") or make_model(seed=7, hidden_size=24, layers=1)
        teacher = {"math": teacher, "code": other}
        rows = {
            name: each.add_column("teacher", named(len(each), case)) for name, each in rows.items()
        }
    return TeachabilityTrainer(
        model=model,
        teacher_model=teacher,
        args=args,
        train_dataset=rows["train"].select(range(case.get("prompts", 24))),
        eval_dataset=rows["test"].select(range(7)),
        processing_class=AutoTokenizer.from_pretrained(lab / "student"),
        peft_config=lora,
    )


def named(count: int, case: dict) -> list[str]:
    """Teachers of the first rows of a dataset, over and over in the pattern of the case."""
    pattern = case["teachers"]
    return [pattern[index % len(pattern)] for index in range(count)]


def watch_rows(measure, found: list):
    """`Anchor.measure` that notes how many of the chosen-from rows are this rank's, and may train."""

    def watched(forward, student, scored):
        valid = scored.table.valid[scored.local]
        found.append((len(valid), int(valid.sum())))
        return measure(forward, student, scored)

    return watched


def run_case(lab: Path, out: Path, case: dict, way: str, world: int) -> None:
    """Train, and write what this rank knows."""
    DistillationTrainer._generate_single_turn = generate(case.get("sampling", "plain"))
    trainer = make_trainer(lab, out / case["name"], case, way, world)
    rank, kept, anchored, local = trainer.accelerator.process_index, [], [], []
    trainer._anchor.measure = watch_rows(trainer._anchor.measure, local)

    def watched(table, *args, **kwargs):
        choice = choose(table, *args, **kwargs)
        if kwargs["training"]:
            for flags, places in ((choice.selection.kept, kept), (choice.reference_mask, anchored)):
                pairs = torch.stack([table.completion, table.position], 1)[flags]
                places.append(pairs.tolist())
        return choice

    trainer_module.choose = watched
    gradients = Gradients()
    trainer.add_callback(gradients)
    deepspeed = way.startswith("zero")
    before = weights_of(trainer.model) if deepspeed else {}
    for source in getattr(trainer._teacher, "sources", {"": trainer._teacher}).values():
        source._agreed = True  # looked at once a run, which is no part of a step
    with Traffic(trainer) as traffic:
        trainer.train(check=False)
    if deepspeed:  # whose gradients are gone when the step is done: of SGD, from what it moved
        moved = weights_of(trainer.model)
        rate = trainer.args.learning_rate
        gradients.found = {n: (before[n] - moved[n]) / rate for n in moved}
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "kept": kept,
        "anchored": anchored,
        "num_local": [num for num, _ in local],
        "num_local_valid": [num for _, num in local],
        "log": log,
        "traffic": traffic.found,
        "type": str(trainer.accelerator.distributed_type),
        "weights_bytes": local_bytes(trainer.model.parameters()),
        "teacher_bytes": sum(local_bytes(m.parameters()) for m in trainer._teacher.models if m),
        "optimizer_bytes": local_bytes(
            value
            for state in trainer.optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value) and value.ndim
        ),
    }
    if case.get("evaluate"):
        found["eval_loss"] = trainer.evaluate()["eval_loss"]
    name = f"{case['name']}-{way}-{world}"
    (out / f"{name}-{rank}.json").write_text(json.dumps(found))
    if rank == 0:
        save_file(gradients.found, out / f"{name}.safetensors")


def run_cases(lab: Path, out: Path, cases: list[dict], world: int, ways: Sequence[str]) -> None:
    """One process of a world, through all cases."""
    if world > 1 and any(way.startswith("zero") for way in ways):
        open_deepspeed_to_cpu()
    for way in ways if world > 1 else ("ddp",):
        for case in cases:
            if way in case.get("ways", (way,)) and world in case.get("worlds", (1, 2, 4)):
                run_case(lab, out, case, way, world)


def fork_ranks(out: Path, worlds: Sequence[int], run: Callable[[int, int], None]) -> None:
    """Fork every world's ranks, `run(world, rank)` in each, and wait; fails if one of them failed."""
    gc.freeze()  # As in conftest.py: a run ends with a full collection.
    for world in worlds:
        port = free_port()
        children = [_fork(out, world, rank, port, run) for rank in range(world)]
        failed = [rank for rank, child in enumerate(children) if os.waitpid(child, 0)[1] != 0]
        if failed:
            text = (out / f"stderr-{world}-{failed[0]}.txt").read_text()
            sys.exit(f"world of {world}: ranks {failed} failed\n{text[-3000:]}")


def _fork(out: Path, world: int, rank: int, port: int, run: Callable[[int, int], None]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        be_rank(rank, world, port)
        with (out / f"stderr-{world}-{rank}.txt").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        run(world, rank)
        if dist.is_initialized():
            dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    lab, out, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    ways = sys.argv[4:] or ["ddp", "fsdp2"]
    worlds = (1, 2) if sys.argv[4:] else (1, 2, 4)
    fork_ranks(out, worlds, lambda world, rank: run_cases(lab, out, cases, world, ways))
