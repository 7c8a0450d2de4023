"""Kills a training run over and over, resumes it, and compares its end with a run that was never touched.

    python -m scripts.reliability.kill_runs --kills 20 --seed 0 --save docs/reliability/kills.json
    python -m scripts.reliability.kill_runs --processes 2 --save docs/reliability/kills-fsdp2.json

What is compared, byte by byte or value by value: the student's weights, the last checkpoint's optimizer and
random state, every line of `metrics.jsonl` (less clocks, and less the closing summary, which is of the last
process) and of `rollouts.jsonl`, and every per-token table in `selection/`.

How: `taopd train` runs in a process of its own, or in several under FSDP2, and gets SIGKILL (one of several
first, the others a moment later, as launchers do). The moments are drawn from a seed: at
start-up, within a step, while a checkpoint is written (a random moment after the partial folder appears) and,
the last one, while the student is written. Then `taopd train --resume`, or `--overwrite` where no checkpoint
was whole yet.
"""

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.arguments import Arguments
from scripts.reliability.forked import FSDP2, ForkedRun, until
from scripts.reliability.tiny_models import write_lab
from taopd.cli import positive
from taopd.runs.checkpoints import PARTIAL, Layout, checkpoints, step_of, why_incomplete
from taopd.runs.jsonl import read_jsonl, write_json

WHERE = ("start", "step", "saving", "student")
CLOCKS = ("perf/", "step_time", "train_runtime", "train_samples", "train_steps")
SETTINGS = {
    "max_completion_length": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_iterations": 2,
    "score_top_k": 4,
    "budget": 0.3,
    "guard_every": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "log_selection": True,
    "log_rollouts": 2,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One kill, as it happened."""

    where: str
    """"start", "step", "saving" or "student"."""
    from_step: int
    """The step that was to be saved before the moment was awaited."""
    after_s: float
    """Delay that was drawn, from there, or from the appearance of the partial folder."""
    partial_left: bool
    """Half a checkpoint, or a student half-written, lay there afterwards."""
    whole: list[int]
    """Steps whose checkpoint was whole afterwards."""
    broken: list[str]
    """Newer checkpoint folders that are not whole; must stay empty."""
    half_deleted: list[str]
    """Older ones that `save_total_limit` was deleting."""


def main(argv: list[str] | None = None) -> int:
    """Run, print a line per kill, and save; 1 if anything differs."""
    parser = Arguments(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=positive, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=positive, default=32)
    parser.add_argument("--processes", type=positive, default=1, help="more than one: FSDP2")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args(argv)
    import taopd.trainer.settings_file
    import taopd.trainer.trainer  # noqa: F401  (imported once, before the forks)

    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            Path(folder), options.kills, options.seed, options.steps, options.processes
        )
    print(json.dumps({name: value for name, value in result.items() if name != "kills"}, indent=2))
    if options.save is not None:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.save, result)
    return 0 if result["identical"] and result["broken"] == 0 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How all runs of a comparison are started."""

    config: Path
    num_processes: int

    @property
    def layout(self) -> Layout:
        return "replicated" if self.num_processes == 1 else "sharded"

    def start(self, run: Path, flag: str | None = None, *, hold: bool = False) -> ForkedRun:
        """Resume the run, or begin it anew where no checkpoint is whole."""
        whole = any(why_incomplete(path, self.layout) is None for path in checkpoints(run))
        arguments = ["train", "--config", str(self.config), "--output_dir", str(run)]
        arguments += ["--skip-check", "--quiet", flag or ("--resume" if whole else "--overwrite")]
        log = run.parent / f"{run.name}.log"
        return ForkedRun(arguments, log, self.num_processes, hold_student=hold)


def measure(
    root: Path, num_kills: int, seed: int, num_steps: int, num_processes: int = 1
) -> dict[str, Any]:
    """Run once untouched and once with kills; the comparison as plain values."""
    write_lab(root / "lab")
    config = root / "config.yaml"
    paths = {
        "model_name_or_path": str(root / "lab/student"),
        "teacher_model_name_or_path": str(root / "lab/teacher"),
        "dataset_name": str(root / "lab/prompts.parquet"),
    }
    settings = SETTINGS | (FSDP2 if num_processes > 1 else {})
    config.write_text(yaml.safe_dump(settings | paths | {"max_steps": num_steps}))
    setup = Setup(config=config, num_processes=num_processes)
    started = time.perf_counter()
    untouched, killed = root / "untouched", root / "killed"
    if (code := setup.start(untouched, "--overwrite").wait()) != 0:
        raise RuntimeError(f"the untouched run ended with {code}: {_log(untouched)}")
    step_seconds = (time.perf_counter() - started) / num_steps
    moments = _draw(num_kills, num_steps, random.Random(seed), step_seconds)
    kills = [_kill(setup, killed, number, *moment) for number, moment in enumerate(moments)]
    if (code := setup.start(killed).wait()) != 0:
        raise RuntimeError(f"the killed run ended with exit code {code}: {_log(killed)}")
    same = compare(untouched, killed, num_steps)
    command = "python -m scripts.reliability.kill_runs"
    command += f" --kills {num_kills} --seed {seed} --steps {num_steps}"
    return {
        "command": command + (f" --processes {num_processes}" if num_processes > 1 else ""),
        "steps": num_steps,
        "settings": settings,
        "num_kills": len(kills),
        "by_moment": {where: sum(kill.where == where for kill in kills) for where in WHERE},
        "partial_left": sum(kill.partial_left for kill in kills),
        "broken": sum(len(kill.broken) for kill in kills),
        "same": same,
        "identical": all(same.values()),
        "kills": [asdict(kill) for kill in kills],
    }


def compare(one: Path, other: Path, num_steps: int) -> dict[str, bool]:
    """What two finished run folders have in common."""
    ends = one / f"checkpoint-{num_steps}", other / f"checkpoint-{num_steps}"
    logs = ("metrics", "rollouts")
    return {
        "student": _bytes(one / "model", "model") == _bytes(other / "model", "model"),
        "weights": _bytes(ends[0], "model", "shard") == _bytes(ends[1], "model", "shard"),
        "optimizer": _bytes(ends[0], "optimizer") == _bytes(ends[1], "optimizer"),
        "random_state": _states(ends[0]) == _states(ends[1]),
        **{name: _lines(one / f"{name}.jsonl") == _lines(other / f"{name}.jsonl") for name in logs},
        "selection": _tables(one / "selection") == _tables(other / "selection"),
    }


def _draw(
    num_kills: int, num_steps: int, draw: random.Random, step_seconds: float
) -> list[tuple[str, int, float]]:
    """(kind, step that must be saved first, delay), in the order of the steps."""
    steps = sorted(draw.randrange(0, num_steps - 2) for _ in range(num_kills - 1))
    longest = {"start": 1.5 * step_seconds, "step": step_seconds, "saving": 0.02}
    moments = []
    for number, step in enumerate(steps):
        where = ("saving", "step", "saving", "step", "start")[number % 5]
        moments.append((where, 0 if where == "start" else step, draw.uniform(0.0, longest[where])))
    return [*moments, ("student", num_steps - 2, draw.uniform(0.0, 0.002))]


def _kill(setup: Setup, run: Path, number: int, where: str, step: int, delay: float) -> Kill:
    """Start or resume the run and kill it at one moment."""
    process = setup.start(run, hold=where == "student")
    awaited = run / (".model-partial" if where == "student" else PARTIAL)

    def reached() -> bool | None:
        if process.code() is not None:
            raise RuntimeError(f"it ended by itself before {where} {step}: {_log(run)}")
        steps = (step_of(path) or 0 for path in checkpoints(run))
        return True if step == 0 or max(steps, default=0) >= step else None

    if until(reached) is None:
        raise TimeoutError(f"step {step} was not reached")
    if where in ("saving", "student"):
        until(lambda: True if awaited.exists() or process.code() is not None else None)
    time.sleep(delay)
    if not process.kill(number):
        raise RuntimeError(f"it ended by itself at {where} {step}: {_log(run)}")
    found = {path: why_incomplete(path, setup.layout) for path in checkpoints(run)}
    whole = [step_of(path) or 0 for path, problem in found.items() if problem is None]
    torn = {
        f"{path.name}: {problem}": (step_of(path) or 0) > max(whole, default=0)
        for path, problem in found.items()
        if problem
    }
    kill = Kill(
        where=where,
        from_step=step,
        after_s=delay,
        partial_left=any((run / name).exists() for name in (PARTIAL, ".model-partial")),
        whole=whole,
        broken=[text for text, newer in torn.items() if newer],
        half_deleted=[text for text, newer in torn.items() if not newer],
    )
    print(kill, flush=True)
    return kill


def _log(run: Path) -> str:
    return (run.parent / f"{run.name}.log").read_text(encoding="utf-8")[-2000:]


def _bytes(folder: Path, *kinds: str) -> dict[str, str]:
    """Hashes of the weight files of these kinds; there must be some."""
    paths = sorted(p for kind in kinds for p in folder.glob(f"{kind}*.safetensors"))
    assert paths, f"{folder} has no {kinds}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _states(checkpoint: Path) -> str:
    """Random state and memories; the metrics that are summed up for the next line hold clocks."""
    from taopd.trainer.checkpoint.state_file import load_tree

    states = [load_tree(path) for path in sorted(checkpoint.glob("rank-*.safetensors"))]
    kept = [{name: state[name] for name in ("random", "callbacks", "tokens")} for state in states]
    return json.dumps(kept, default=lambda tensor: tensor.tolist())


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = [row for row in read_jsonl(path) if "train_runtime" not in row]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in rows]


def _tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    import pyarrow.parquet as pq

    return {path.name: pq.read_table(path).to_pylist() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    sys.exit(main())
