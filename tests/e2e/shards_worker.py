"""The ranks of `test_shards.py`: FSDP2 runs on CPUs, saved, resumed by as many processes and by more.

Run as: python shards_worker.py MICRO_LAB_FOLDER OUTPUT_FOLDER. Rank r of a world writes WORLD-r.json there.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))
from taopd.errors import NumericsError, ResourceError
from taopd.models.prompts import load_prompts
from taopd.trainer.checkpoint.fsdp import load_optimizer, load_weights, save_optimizer, save_weights
from taopd.trainer.config import TeachabilityConfig
from taopd.trainer.trainer import TeachabilityTrainer
from tests.e2e.rank_worker import fork_ranks, open_fsdp_to_cpu, whole

NUM_ROWS = 4
"""Completions of a generation batch, all ranks."""


def fsdp2_settings(kind: str) -> dict[str, Any]:
    """`kind`: FULL_STATE_DICT (a whole model beside the shards) or SHARDED_STATE_DICT."""
    wrap = {"transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"], "state_dict_type": kind}
    return {"fsdp": True, "fsdp_config": wrap}


def make(lab: Path, folder: Path, world: int, *, lora: bool = False, **settings: Any) -> Any:
    """A trainer under FSDP2, or under DeepSpeed where the settings have it."""
    if "deepspeed" not in settings:
        settings |= fsdp2_settings("SHARDED_STATE_DICT" if lora else "FULL_STATE_DICT")
    args = TeachabilityConfig(
        **{
            "output_dir": str(folder),
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": "none",
            "logging_steps": 1,
            "disable_tqdm": True,
            "max_completion_length": 6,
            "score_top_k": 4,
            "per_device_train_batch_size": NUM_ROWS // world,
            "budget": 0.3,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": 4,
            "method": "anchored",
        }
        | settings
    )
    if args.fsdp:
        open_fsdp_to_cpu(args)
    adapters = None
    if lora:
        from peft import LoraConfig

        torch.manual_seed(0)
        adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return TeachabilityTrainer(
        model=str(lab / "student"),
        teacher_model=str(lab / "teacher"),
        args=args,
        train_dataset=load_prompts(str(lab / "prompts.parquet"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(lab / "student"),
        peft_config=adapters,
    )


def digest(tensor: torch.Tensor) -> str:
    """Of the bytes of a whole tensor."""
    return hashlib.sha256(whole(tensor).detach().contiguous().numpy().tobytes()).hexdigest()


def state(trainer: Any) -> dict[str, Any]:
    """What must be the same: weights, the optimizer's state, the logged losses."""
    return {
        "weights": [digest(p) for p in trainer.model.parameters()],
        "optimizer": [
            digest(value)
            for values in trainer.optimizer.state_dict()["state"].values()
            for value in values.values()
        ],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def run_bf16(lab: Path, folder: Path) -> dict[str, Any]:
    """Under mixed precision: a run, the same resumed, and every loss inside and outside of the wrapper."""
    first = make(lab, folder, 2, bf16=True)
    inside, outside = [], []
    inner, outer = first._compute_loss, first.compute_loss

    def watched_inner(*args):
        loss, *rest = inner(*args)
        inside.append(loss.item())
        return loss, *rest

    def watched_outer(*args, **kwargs):
        loss = outer(*args, **kwargs)
        outside.append(loss.item())
        assert loss.dtype == torch.float32 and loss.requires_grad
        return loss

    first._compute_loss, first.compute_loss = watched_inner, watched_outer
    first.train(check=False)
    part = make(lab, folder, 2, bf16=True)
    part.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {"whole": state(first), "resumed": state(part), "inside": inside, "outside": outside}


def spoil(trainer: Any, step: int) -> None:
    """The loss of the second process is not finite in one step."""
    function = trainer._loss_function
    if trainer.args.process_index == 1:
        trainer._loss_function = lambda logprobs, targets: (
            function(logprobs, targets) / (0.0 if trainer.state.global_step == step else 1.0)
        )


def run_bad_numbers(lab: Path, out: Path) -> dict[str, Any]:
    """Skipped, and stopped and resumed."""
    skipping = make(lab, out / "skip", 2, on_bad_numbers="skip")
    spoil(skipping, 2)
    skipping.train(check=False)
    logs = [log for log in skipping.state.log_history if "numerics/skipped" in log]
    found = {"skipped": [log["numerics/skipped"] for log in logs], "after_skip": state(skipping)}
    stopping = make(lab, out / "stop", 2)
    spoil(stopping, 2)
    try:
        stopping.train(check=False)
    except NumericsError as error:
        found["stopped"] = str(error)
    again = make(lab, out / "stop", 2)
    again.train(resume_from_checkpoint=True)
    return found | {"after_stop": state(again)}


def uneven() -> torch.nn.Module:
    """Rows that the processes do not divide: some hold nothing of a weight."""
    torch.manual_seed(0)
    sizes = {"one": (1, 3), "three": (3, 2), "five": (5,)}
    model = torch.nn.Module()
    for name, size in sizes.items():
        model.register_parameter(name, torch.nn.Parameter(torch.randn(size)))
    return model


def run_uneven(folder: Path, world: int, rank: int) -> bool:
    """Two processes take a step of Adam and write; four read. Whether all is as on one process."""
    truth = uneven()
    mesh = init_device_mesh("cpu", (world,))
    model = fully_shard(uneven(), mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    if world == 2:
        folder.mkdir(exist_ok=True)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        save_weights(folder, model, rank, trained_only=False)
        save_optimizer(folder, optimizer, rank, {"note": "x"})
    else:
        load_weights(folder, model, rank, 2, world, trained_only=False)
        assert load_optimizer(folder, optimizer, rank, 2, world) == {"note": "x"}
    alone = torch.optim.Adam(truth.parameters(), lr=0.1)
    for parameter in truth.parameters():
        parameter.grad = torch.ones_like(parameter)
    alone.step()
    same = [
        torch.equal(whole(p), q)
        for p, q in zip(model.parameters(), truth.parameters(), strict=True)
    ]
    for mine, theirs in zip(
        optimizer.state_dict()["state"].values(), alone.state_dict()["state"].values(), strict=True
    ):
        same += [torch.equal(whole(mine[name]), theirs[name]) for name in theirs]
    return all(same)


def run_two(lab: Path, out: Path, rank: int) -> dict[str, Any]:
    """Two processes: untouched, resumed, resumed when done, out of disk, LoRA."""
    found: dict[str, Any] = {}
    for name, lora in (("full", False), ("lora", True)):
        first = make(lab, out / name, 2, lora=lora)
        first.train(check=False)
        found[name] = {"whole": state(first)}
        part = make(lab, out / name, 2, lora=lora)
        part.train(resume_from_checkpoint=str(out / name / "checkpoint-2"))
        found[name]["resumed"] = state(part)
        part.save_model(str(out / name / "model"))
        done = make(lab, out / name, 2, lora=lora)
        done.train(resume_from_checkpoint=True)
        found[name]["done"] = state(done) | {"steps": done.state.global_step}

    found["bf16"] = run_bf16(lab, out / "bf16")
    found["bad"] = run_bad_numbers(lab, out)
    found["uneven"] = run_uneven(out / "uneven", 2, rank)
    # The last: it leaves the second process waiting, until the first has ended.
    torn = make(lab, out / "torn", 2)
    publish = torn._publish

    def full_disk(partial: Path, final: Path) -> None:
        if torn.state.global_step == 3:
            raise OSError(28, "No space left on device", str(final))
        publish(partial, final)

    torn._publish = full_disk
    try:
        torn.train(check=False)
    except (ResourceError, RuntimeError) as error:
        found["torn"] = str(error)
    return found


def run_four(lab: Path, out: Path, rank: int) -> dict[str, Any]:
    """Four processes read what two wrote: the last checkpoint as it is, an earlier one to go on from."""
    same = make(lab, out / "same", 4)
    same.train(resume_from_checkpoint=str(out / "full" / "checkpoint-4"))
    further = make(lab, out / "further", 4)
    further.train(resume_from_checkpoint=str(out / "full" / "checkpoint-2"))
    read = {"same": state(same), "further": state(further)}
    return read | {"uneven": run_uneven(out / "uneven", 4, rank)}


def main(lab: Path, out: Path, world: int, rank: int) -> None:
    """One process."""
    found = run_two(lab, out, rank) if world == 2 else run_four(lab, out, rank)
    (out / f"{world}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    lab, out = Path(sys.argv[1]), Path(sys.argv[2])
    fork_ranks(out, (2, 4), lambda world, rank: main(lab, out, world, rank))
