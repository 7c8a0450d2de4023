"""bench_plan: `taopd plan` against measured steps of the trainer, memory and CPU time, on one thread.

Random Qwen3 models and fixed random completions of equal length (sampling is not measured). Memory is the
process's peak resident size within a training step, before the optimizer's, above what it held when the step
began. Time is CPU time of the same training step, against TRL's with the same models; the plan's ratio is of
FLOPs without sampling. One process per figure; every allocation of 64 KiB or more is returned to the system
at once, or the peak would be that of the allocator.

With --whole instead: the peak of whole runs of `taopd train`, sampling and optimizer included, on a
random Llama of the size of SmolLM2-135M with 49,152 ids, against the peak that `taopd plan` names for the
same config; the allocator is left as it is.

Run: python -m benchmarks.bench_plan [--tiny] [--shape NAME] [--whole]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measuring import RETURN_BLOCKS, forget_peak, last_line, status_mib, versions
from scripts.arguments import Arguments

PROMPT = 64
NUM_STEPS = 4
"""The first one builds optimizer states and caches; it is not counted."""
TRL = "trl"
PUBLISHED = {"method": "published", "collapse_guard": "off"}
CASES = {
    "budget 0.05": {"budget": 0.05},
    "budget 1": {"budget": 1.0},
    "budget 0.05, reverse KL sampled": {"budget": 0.05, "loss": "sampled_reverse_kl"},
    "budget 0.05, anchor": {"budget": 0.05, "method": "anchored"},
    "budget 0.05, window 8": {"budget": 0.05, "gradient_window": 8},
    TRL: {},
}
HELD = ("process", "student_weights", "teacher_weights", "reference_weights", "optimizer_states")
SHAPES = {
    # The vocabulary's softmax, which the plan does not count, weighs more the narrower the model.
    "head-heavy": {
        "layers": 6,
        "hidden_size": 256,
        "vocab_size": 32_000,
        "batch": 2,
        "completion": 448,
    },
    # Head to backbone as in Qwen3-1.7B.
    "balanced": {
        "layers": 3,
        "hidden_size": 768,
        "vocab_size": 8_000,
        "batch": 1,
        "completion": 192,
    },
}
SMOL = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
WHOLE = {
    "one micro-batch": {"per_device_train_batch_size": 4, "max_completion_length": 128},
    "four micro-batches": {
        **{"per_device_train_batch_size": 2, "max_completion_length": 64},
        "gradient_accumulation_steps": 4,
    },
    "window 8": {
        **{"per_device_train_batch_size": 4, "max_completion_length": 128},
        "gradient_window": 8,
    },
    "checkpointing": {
        **{"per_device_train_batch_size": 8, "max_completion_length": 64},
        "gradient_checkpointing": True,
    },
    "published, no guard": {
        **{"per_device_train_batch_size": 4, "max_completion_length": 64},
        **PUBLISHED,
    },
}
TINY = {"layers": 2, "hidden_size": 64, "vocab_size": 2_000, "batch": 2, "completion": 64}


def make_config(sizes: dict):
    """A Qwen3 with grouped keys, feed-forward of three widths and an own head."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=3 * sizes["hidden_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=sizes["hidden_size"] // 8,
        max_position_embeddings=PROMPT + sizes["completion"],
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def measure(sizes: dict, case: dict | None) -> dict:
    """Run the steps in this process; MiB and median CPU seconds, the first step left out."""
    import trl
    from datasets import Dataset
    from transformers import Qwen3ForCausalLM, TrainerCallback

    import taopd
    from tests.conftest import make_tokenizer

    torch.manual_seed(0)
    words = ("<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(sizes["vocab_size"] - 4)))
    student, teacher = (Qwen3ForCausalLM(make_config(sizes)) for _ in range(2))
    prompt = " ".join(words[4 : 4 + PROMPT])

    def fixed(self, prompt_ids, *args, **kwargs):
        shape = (len(prompt_ids), sizes["completion"])
        return torch.randint(4, sizes["vocab_size"], shape).tolist()

    trl.DistillationTrainer._generate_single_turn = fixed
    peaks, seconds = [], []

    class Meter(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            forget_peak()
            self.base, self.start = status_mib("VmRSS"), time.process_time()

        def on_pre_optimizer_step(self, *args, **kwargs):
            seconds.append(time.process_time() - self.start)
            peaks.append(status_mib("VmHWM") - self.base)

    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "per_device_train_batch_size": sizes["batch"],
            "max_completion_length": sizes["completion"],
            "max_steps": NUM_STEPS,
            **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False},
            **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True},
        }
        if case is None:
            kind, args = trl.DistillationTrainer, trl.DistillationConfig(beta=1.0, **common)
        else:
            kind, args = (
                taopd.TeachabilityTrainer,
                taopd.TeachabilityConfig(**common | PUBLISHED | case),
            )
        trainer = kind(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [prompt] * 64}),
            processing_class=make_tokenizer(words),
            callbacks=[Meter()],
        )
        # TRL's has no check of the pair before it.
        trainer.train() if case is None else trainer.train(check=False)
    return {"peak_mib": max(peaks[1:]), "cpu_s": statistics.median(seconds[1:])}


def child(sizes: dict, case: dict | None, *, memory: bool) -> dict:
    """`measure` in a process of its own."""
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    arguments = ("benchmarks.bench_plan", "--measure", json.dumps([sizes, case]))
    environment |= RETURN_BLOCKS if memory else {}
    return json.loads(last_line(*arguments, environment=environment))


def expected(sizes: dict, case: dict):
    """The plan of a case."""
    from taopd.losses import needs_teacher_distribution
    from taopd.trainer.cost import ModelShape, PlanSettings, plan

    shape = ModelShape.from_config(make_config(sizes))
    return plan(
        shape,
        shape,
        PlanSettings(
            batch=sizes["batch"],
            prompt_length=PROMPT,
            completion_length=sizes["completion"],
            budget=case.get("budget", 1.0),
            dtype="float32",
            device="cpu",
            teacher_dtype="float32",
            padded=False,
            needs_teacher_distribution=needs_teacher_distribution(case.get("loss", "reverse_kl")),
            window=case.get("gradient_window"),
            anchor_fraction=0.05 if "method" in case else 0.0,
            anchor_responses=max(0.25, 1 / sizes["batch"]),
        ),
    )


def compare(sizes: dict) -> list[dict]:
    """One row per case: measured, expected, and their ratio."""
    from taopd.trainer.cost.flops import step_cost

    full = child(sizes, None, memory=False)
    rows = []
    for name, case in CASES.items():
        if name == TRL:
            continue
        planned = expected(sizes, case)
        phases, parts = planned.memory.phases, planned.memory.parts
        # What the process held before the step, its libraries among it.
        held = sum(parts[part] for part in HELD)
        peak = max(phases["score"], phases["train"]) - held
        # The trainer scores first and runs its training forward after, also for one micro-batch.
        cost = step_cost(planned.student, planned.teacher, planned.settings, shared_forward=False)
        ratio = (cost.total - cost.sample) / (planned.full_cost.total - planned.full_cost.sample)
        memory = child(sizes, case, memory=True)["peak_mib"]
        seconds = child(sizes, case, memory=False)["cpu_s"]
        rows.append(
            {
                "case": name,
                "peak_mib": memory,
                "planned_peak_mib": peak / 2**20,
                "planned_phase": max(("score", "train"), key=lambda phase: phases[phase]),
                "cpu_s": seconds,
                "trl_cpu_s": full["cpu_s"],
                "step_ratio": seconds / full["cpu_s"],
                "planned_step_ratio": ratio,
            }
        )
        row = rows[-1]
        print(
            f"{name:<34} peak {row['peak_mib']:7.1f} MiB, planned {row['planned_peak_mib']:7.1f} "
            f"({row['planned_peak_mib'] / row['peak_mib'] - 1:+.0%}, {row['planned_phase']})   "
            f"time / TRL {row['step_ratio']:.2f}, planned {ratio:.2f} "
            f"({ratio / row['step_ratio'] - 1:+.0%})",
            flush=True,
        )
    return rows


def whole_runs(*, tiny: bool) -> list[dict]:
    """One row per config of `WHOLE`: the peak of the process of `taopd train`, and the plan's."""
    import pandas as pd
    import yaml
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import make_tokenizer

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ("<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(49_148)))
        sizes = SMOL | ({"num_hidden_layers": 2} if tiny else {})
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        for seed, role in enumerate(("student", "teacher")):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=1024))
            model.save_pretrained(folder / role)
            make_tokenizer(words).save_pretrained(folder / role)
        texts = [" ".join(words[4 : 4 + PROMPT - i % 32]) for i in range(32)]
        pd.DataFrame({"prompt": texts}).to_parquet(folder / "prompts.parquet")
        for case, settings in WHOLE.items():
            config = {
                "model_name_or_path": str(folder / "student"),
                "teacher_model_name_or_path": str(folder / "teacher"),
                "dataset_name": str(folder / "prompts.parquet"),
                "output_dir": str(folder / case.replace(" ", "-")),
                **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False},
                **{"report_to": "none", "save_strategy": "no", "max_steps": 2, "logging_steps": 1},
            } | settings
            path = folder / "config.yaml"
            path.write_text(yaml.safe_dump(config))
            environment = {"OMP_NUM_THREADS": "1"}
            train = ("taopd", "train", "--config", str(path), "--skip-check", "--quiet")
            last_line(*train, environment=environment)
            log = (Path(config["output_dir"]) / "metrics.jsonl").read_text().splitlines()
            peak = max(json.loads(line).get("perf/peak_memory_mib", 0.0) for line in log)
            command = [sys.executable, "-m", "taopd", "plan", "--config", str(path), "--json"]
            planned = json.loads(subprocess.check_output(command, text=True))["peak_mib"]
            rows.append({"case": case, "peak_mib": peak, "planned_peak_mib": planned})
            print(
                f"{case:<22} peak {peak:7.0f} MiB, planned {planned:7.0f} ({planned / peak - 1:+.0%})",
                flush=True,
            )
    return rows


def main() -> None:
    """Print the table; the last line is JSON."""
    parser = Arguments(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small sizes, as in CI")
    parser.add_argument("--shape", choices=SHAPES, help="one of the shapes instead of all")
    parser.add_argument("--whole", action="store_true", help="whole runs on 135 M parameters")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure is not None:
        print(json.dumps(measure(*options.measure)))
        return
    if options.whole:
        document = {"benchmark": "plan_whole", "settings": {"model": SMOL, "prompt": PROMPT}}
        print(json.dumps(document | {"rows": whole_runs(tiny=options.tiny)} | versions()))
        return
    shapes = {"tiny": TINY} if options.tiny else SHAPES
    shapes = {options.shape: SHAPES[options.shape]} if options.shape else shapes
    results = {}
    for name, sizes in shapes.items():
        print(name, flush=True)
        results[name] = {"settings": sizes, "rows": compare(sizes)}
    document = {
        "benchmark": "plan",
        "settings": {"prompt": PROMPT, "steps": NUM_STEPS},
        "shapes": results,
    }
    print(json.dumps(document | versions()))


if __name__ == "__main__":
    main()
