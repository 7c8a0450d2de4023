"""bench_real: a training step on SmolLM2-135M against TRL's, stage by stage, on the same batch.

Reads the pair that `make real` makes (`runs/smollm2`, or another folder: --pair, or TAOPD_PAIR). Each arm
is a trainer in a process of its own, run by its own `train()`, in bfloat16 autocast with two threads; the
arms take turns, one step each, so that a busy machine disturbs all of them alike:
  trl             trl.DistillationTrainer, beta 1: all tokens
  trl, autocast   the same with its loss inside the autocast: with `bf16=True` it calls its backbones past the
                  wrapper that holds the autocast, and so computes them in float32
  full            taopd, selector full: all tokens
  5 %             taopd, teachability as published, the exact gradient
  5 %, window 8   taopd, through a gradient window
  default, 10 %   taopd with its default method, reach
The learning rate is so small that the weights stay as they are, and every step begins with the same seed on
the same 4 prompts in the same order: all arms sample the same completions in every step, which is checked.

Checked before a time is printed: the same completions in all arms, and the gradients of all tokens (full and
trl, autocast) against TRL's.

Stages, in seconds of the process (CPU time; waiting for a turn is none of it):
  sample     from prompts to completions
  score      both models' forwards and the signals (TRL: inside its loss)
  select     the choice and its metrics
  update     all of a step but sampling and the optimizer: forwards, scoring, selection, loss, backward
  step       all of it, the optimizer and the logs included
The peak is the process's resident memory during the measured steps, Python and libraries included.

At the end `taopd train` is started for one step: seconds from the command to its first line and to step 1.

Run: python -m benchmarks.bench_real [--pair FOLDER | --tiny]
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from trl import DistillationConfig, DistillationTrainer

from benchmarks.__main__ import PAIR
from benchmarks.measuring import first_lines, versions
from benchmarks.stages import WARMUP, Stages
from scripts.arguments import Arguments
from taopd import TeachabilityConfig, TeachabilityTrainer, load_prompts
from taopd.runs.host_memory import free_bytes

ARMS: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl, autocast": {},
    "full": {"selector": "full"},
    "5 %": {"selector": "teachability", "budget": 0.05},
    "5 %, window 8": {"selector": "teachability", "budget": 0.05, "gradient_window": 8},
    "default, 10 %": {"method": "reach", "budget": 0.1},
}
THREADS = 2
NO_RATE = 1e-30
"""A learning rate that leaves float32 weights as they are."""
GIB_PER_ARM, ARMS_AT_ONCE = 4.0, 3
TOLERANCE, NOISE = 1e-3, 1.5
"""Largest relative error of a gradient of all tokens against TRL's in float32. In bfloat16 the measure is
what rounding does to TRL's own gradient: full's may be `NOISE` times as far from float32."""


@dataclass(frozen=True)
class Case:
    """What is run."""

    pair: Path
    rollouts: int
    tokens: int
    repeats: int
    bf16: bool


def trainer_of(name: str, case: Case, folder: str) -> DistillationTrainer:
    """An arm's trainer: TRL's, or ours with the arm's settings."""
    shared = {
        **{"output_dir": folder, "max_steps": WARMUP + case.repeats, "seed": 0},
        **{"per_device_train_batch_size": case.rollouts, "max_completion_length": case.tokens},
        **{"learning_rate": NO_RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0},
        **{
            "gradient_checkpointing": False,
            "bf16": case.bf16,
            "use_cpu": True,
            "report_to": "none",
        },
        # A step is an epoch here: shuffled, each would draw other completions, prompt by prompt.
        **{
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "shuffle_dataset": False,
        },
        **{f"{model}model_init_kwargs": {"dtype": "float32"} for model in ("", "teacher_")},
    }
    prompts = load_prompts(str(case.pair / "prompts.parquet"), split="train")
    models = [str(case.pair / part) for part in ("student", "teacher")]
    data = {"train_dataset": prompts.select(range(case.rollouts))}
    if name.startswith("trl"):
        return DistillationTrainer(*models, DistillationConfig(beta=1.0, **shared), **data)
    top_k = {} if case.bf16 else {"score_top_k": 4}  # The toy's vocabulary is a few words.
    settings = {"loss": "reverse_kl", "method": "published", **top_k, **shared, **ARMS[name]}
    return TeachabilityTrainer(*models, TeachabilityConfig(**settings), **data)


def work(name: str, case: Case, pipe: Connection) -> None:
    """An arm's process: train, a step whenever the pipe says so."""
    # What five trainers print is not for the table, which is the coordinator's.
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
    ):
        torch.set_num_threads(THREADS)
        stages = Stages(pipe)
        # Both classes sample in TRL's method; ours goes on to score in its own.
        sample = stages.timed("sample", DistillationTrainer._generate_and_score_completions)
        DistillationTrainer._generate_and_score_completions = lambda *args: stages.sampled(
            sample(*args)
        )
        trainer = trainer_of(name, case, folder)
        for stage in () if name.startswith("trl") else ("score", "select"):
            setattr(trainer, f"_{stage}", stages.timed(stage, getattr(trainer, f"_{stage}")))
        if name == "trl, autocast":
            trainer._compute_loss = trainer.accelerator.autocast()(trainer._compute_loss)
        trainer.add_callback(stages)
        # The look at the pair comes before the first step, and is no part of one.
        trainer.train(**({} if name.startswith("trl") else {"check": False}))


def turns(names: list[str], case: Case) -> dict[str, list[dict[str, Any]]]:
    """Steps of these arms, taking turns, the warm-up first."""
    context = multiprocessing.get_context("fork")  # The imports are paid for once.
    ends, processes = {}, []
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for name in names:
            ends[name], other = context.Pipe()
            process = context.Process(target=work, args=(name, case, other), daemon=True)
            process.start()
            other.close()
            processes.append(process)
        for _ in range(WARMUP + case.repeats):
            for name, end in ends.items():
                end.send("step")
                found[name].append(end.recv())
    except (EOFError, OSError):  # OSError: a pipe that nobody reads any more.
        sys.exit(f"the process of {name!r} ended before its time; its error stands above")
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.terminate()
    return found


def measure(case: Case, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Steps of every arm: all side by side, or TRL with as many others at a time as memory holds.

    Ends the process where memory holds fewer than `ARMS_AT_ONCE`.
    """
    free = free_bytes() / 2**30
    room = int(free / GIB_PER_ARM) if case.bf16 else len(names)
    if room < min(ARMS_AT_ONCE, len(names)):
        sys.exit(
            f"{free:.1f} GiB of memory are free, and {ARMS_AT_ONCE} arms side by side take "
            f"{ARMS_AT_ONCE * GIB_PER_ARM:.0f} GiB: end what else runs, or use a machine with more"
        )
    found: dict[str, list[dict[str, Any]]] = {}
    others = names[1:]
    for start in range(0, len(others), room - 1):
        group = turns(["trl", *others[start : start + room - 1]], case)
        for name, steps in group.items():
            found[name] = [*found[name], *steps[WARMUP:]] if name in found else steps
    return found


def check(found: dict[str, list[dict[str, Any]]], case: Case) -> dict[str, float]:
    """Relative error and cosine of full's gradient against TRL's; the same completions everywhere.

    Ends the process where the batches or the gradients of all tokens differ.
    """
    first = found["trl"][0]["sampled"]
    for name, steps in found.items():
        for index, step in enumerate(steps):
            if step["sampled"] != first:
                sys.exit(
                    f"FAILED: the batch of {name!r} in step {index} is not TRL's of step 0 (prompts or "
                    "completions); no time is printed"
                )
    trl = torch.from_numpy(found["trl"][0]["gradient"])
    checked: dict[str, float] = {}
    for name, key in (("trl, autocast", "autocast"), ("full", "gradient")):
        own = torch.from_numpy(found[name][0]["gradient"])
        checked[f"{key}_error"] = float((own - trl).norm() / trl.norm())
        checked[f"{key}_cosine"] = float(torch.cosine_similarity(own, trl, dim=0))
    rounding = checked["autocast_error"] if case.bf16 else 0.0
    if checked["gradient_error"] > max(TOLERANCE, NOISE * rounding) or rounding > 0.5:
        sys.exit(f"FAILED: the gradients of all tokens differ, {checked}; no time is printed")
    return checked


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians over the measured steps, and what they are of TRL's."""
    medians = {
        name: {
            stage: statistics.median(step["seconds"].get(stage, 0.0) for step in steps[WARMUP:])
            for stage in ("sample", "score", "select", "update", "step")
        }
        for name, steps in found.items()
    }
    exact = torch.from_numpy(found["5 %"][0]["gradient"]) if "5 %" in found else None
    rows = []
    for name, steps in found.items():
        peak = max(step["peak_mib"] for step in steps[WARMUP:])
        row = {"arm": name} | {f"{stage}_s": value for stage, value in medians[name].items()}
        for stage in ("sample", "update", "step"):
            for peer, base in (("trl", "trl"), ("autocast", "trl, autocast")):
                row[f"{stage}_of_{peer}"] = medians[name][stage] / medians[base][stage]
        times = [step["seconds"]["step"] for step in steps[WARMUP:]]
        row |= {"step_min_s": min(times), "step_max_s": max(times), "peak_mib": peak}
        if "window" in name and exact is not None:
            own = torch.from_numpy(steps[0]["gradient"])
            row["cosine_with_exact"] = float(torch.cosine_similarity(own, exact, dim=0))
        rows.append(row)
    return rows


def start_up(case: Case) -> dict[str, float]:
    """Seconds of `taopd train` to its first line and to step 1, by the clock and of its process."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            **{"model_name_or_path": case.pair / "student", "use_cpu": "true"},
            **{"teacher_model_name_or_path": case.pair / "teacher"},
            **{"dataset_name": case.pair / "prompts.parquet", "dataset_train_split": "train"},
            **{
                "output_dir": f"{folder}/run",
                "max_steps": 1,
                "report_to": "none",
                "logging_steps": 1,
            },
            **{"per_device_train_batch_size": case.rollouts, "max_completion_length": case.tokens},
            **{"gradient_checkpointing": "false", "bf16": str(case.bf16).lower()},
            **({} if case.bf16 else {"score_top_k": 4}),
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return first_lines(["taopd", "train", *words], {"first_line": "", "step_1": "step 1"})


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and the line of JSON."""
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", type=Path, default=PAIR)
    parser.add_argument("--tiny", action="store_true", help="micro models, three arms")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # Threads of this process would not outlive the forks.
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            from scripts.reliability.tiny_models import write_lab

            write_lab(Path(folder))
            case = Case(Path(folder), rollouts=4, tokens=6, repeats=2, bf16=False)
        else:
            if not (options.pair / "pair.json").is_file():
                sys.exit(f"{options.pair} holds no pair: run `make real`, or name one with --pair")
            case = Case(options.pair, rollouts=4, tokens=48, repeats=3, bf16=True)
        names = [name for name in ARMS if not options.tiny or name != "5 %"]
        found = measure(case, names)
        checked = check(found, case)
        rows = rows_of(found)
        started = start_up(case)
    heads = (
        "arm",
        "sample s",
        "score s",
        "select s",
        "update s",
        "step s",
        "update/trl",
        "step/trl",
        "update/auto",
        "step/auto",
        "MiB",
    )
    print(" ".join(f"{head:>13}" for head in heads))
    for row in rows:
        stages = [f"{row[f'{s}_s']:.2f}" for s in ("sample", "score", "select", "update", "step")]
        peers = [(stage, peer) for peer in ("trl", "autocast") for stage in ("update", "step")]
        ratios = [f"{row[f'{stage}_of_{peer}']:.2f}" for stage, peer in peers]
        cells = [row["arm"], *stages, *ratios, f"{row['peak_mib']:.0f}"]
        print(" ".join(f"{cell:>13}" for cell in cells))
    print(
        f"taopd train: first line after {started['first_line_s']:.1f} s, step 1 after "
        f"{started['step_1_s']:.1f} s ({started['step_1_cpu_s']:.1f} s of its process)"
    )
    document = {
        "name": "bench_real",
        "rollouts": case.rollouts,
        "max_new_tokens": case.tokens,
        "completion_tokens": found["trl"][0]["tokens"],
        "repeats": case.repeats,
        "dtype": "bfloat16" if case.bf16 else "float32",
        "rows": rows,
        "start_up": started,
    }
    print(json.dumps(document | checked | versions() | {"threads": THREADS}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
