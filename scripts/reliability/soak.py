"""Soak: 2,000 steps of the tiny lab through the real trainer; does anything grow that should not?

    python -m scripts.reliability.soak                     # docs/reliability/soak.json and soak.png
    python -m scripts.reliability.soak --draw              # the picture again, from the file

Teacher and student of the lab, method anchored, collapse guard, evaluation, logging and rollouts at every
step, checkpoints with a limit. Every `EVERY` steps: resident memory, live tensors and Python objects, open
file descriptors, threads, child processes, bytes of every log. Slopes are of means over blocks of `BLOCK`
steps after the warm-up, in which the trainer's own log fills up to its limit of 500 entries, with the t
interval of an ordinary regression: neighboring readings depend on each other, blocks hardly.
"""

import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from scripts.arguments import Arguments
from taopd import TeachabilityConfig, TeachabilityTrainer
from taopd.cli import positive
from taopd.experiments.lab import build_lab
from taopd.experiments.lab.demo import LAB_CONFIG
from taopd.models.prompts import load_prompts
from taopd.runs.jsonl import read_jsonl, write_json
from taopd.trainer.environment import environment
from taopd.trainer.step_lines import StepLines

STEPS, EVERY, WARM_UP, BLOCK = 2000, 20, 600, 100
MIB = 2**20
LOGS = ("metrics.jsonl", "rollouts.jsonl", "warnings.jsonl")


class Probe(TrainerCallback):
    """Reads the process from outside, through /proc, at every `EVERY`-th step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.readings: list[dict[str, float]] = []
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % EVERY == 0:
            self.readings.append({"step": state.global_step} | self._read(state))

    def _read(self, state: Any) -> dict[str, float]:
        gc.collect()
        found = gc.get_objects()
        tensors = [one for one in found if type(one) in (torch.Tensor, torch.nn.Parameter)]
        status = dict(
            line.split(":", 1)
            for line in Path("/proc/self/status").read_text().splitlines()
            if ":" in line
        )
        checkpoints = sorted(self.folder.glob("checkpoint-*/trainer_state.json"))
        return {
            "seconds": time.perf_counter() - self._began,
            "rss_mib": int(status["VmRSS"].split()[0]) / 1024,
            "threads": int(status["Threads"]),
            "handles": len(os.listdir("/proc/self/fd")),
            "python_objects": len(found),
            "tensors": len(tensors),
            "tensor_mib": sum(one.nbytes for one in tensors) / MIB,
            "log_history": len(state.log_history),
            "checkpoints": len(checkpoints),
            "trainer_state_bytes": max((p.stat().st_size for p in checkpoints), default=0),
            **{name: _size(self.folder / name) for name in LOGS},
        }


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def train(folder: Path, steps: int) -> list[dict[str, float]]:
    """Run the soak and return its readings."""
    torch.set_num_threads(1)
    lab = build_lab("dialect")
    settings = LAB_CONFIG | {"method": "anchored", "collapse_guard": "warn"}
    args = TeachabilityConfig(
        output_dir=str(folder),
        max_steps=steps,
        score_top_k=lab.top_k,
        max_completion_length=lab.max_completion_length,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=100,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=200,
        **settings,
    )
    prompts = load_prompts(lab.prompts, split="train")
    held_out = load_prompts(lab.prompts, split="test").select(range(64))
    probe = Probe(folder)
    trainer = TeachabilityTrainer(
        model=AutoModelForCausalLM.from_pretrained(lab.student, dtype=torch.float32),
        teacher_model=str(lab.teacher),
        args=args,
        train_dataset=prompts,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(lab.student, padding_side="left"),
        callbacks=[probe],
    )
    trainer.remove_callback(StepLines)
    trainer.train(check=False)
    return probe.readings


def slope(readings: list[dict[str, float]], name: str) -> dict[str, float]:
    """Growth per 1,000 steps after the warm-up, with a 95 % interval over blocks."""
    kept = [row for row in readings if row["step"] > WARM_UP]
    blocks: dict[int, list[float]] = {}
    for row in kept:
        blocks.setdefault(int(row["step"] - 1) // BLOCK, []).append(row[name])
    x = np.array([BLOCK * (block + 0.5) / 1000 for block in blocks])
    y = np.array([np.mean(values) for values in blocks.values()])
    value = half = 0.0
    if np.ptp(y) > 0:  # a constant has no error to estimate
        fit = stats.linregress(x, y)
        value, half = float(fit.slope), float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr)
    return {
        "per_1000_steps": value,
        "low": value - half,
        "high": value + half,
        "first": float(y[0]),
        "last": float(y[-1]),
        "num_blocks": len(x),
    }


def summarize(folder: Path, readings: list[dict[str, float]]) -> dict[str, Any]:
    """Slopes, and the lengths of single lines of the logs: first tenth against last tenth."""
    names = [name for name in readings[0] if name not in ("step", "seconds")]
    lines = {}
    for name in LOGS[:2]:
        sizes = [len(json.dumps(line)) for line in read_jsonl(folder / name)]
        tenth = max(1, len(sizes) // 10)
        lines[name] = {
            "lines": len(sizes),
            "longest_bytes": max(sizes),
            "mean_bytes_first_tenth": float(np.mean(sizes[:tenth])),
            "mean_bytes_last_tenth": float(np.mean(sizes[-tenth:])),
        }
    return {
        "command": "python -m scripts.reliability.soak",
        "steps": int(readings[-1]["step"]),
        "seconds": readings[-1]["seconds"],
        "warm_up": WARM_UP,
        "slopes": {name: slope(readings, name) for name in names},
        "lines": lines,
        "readings": readings,
        "env": {k: v for k, v in environment(seed=42).items() if k in ("versions", "git_dirty")},
    }


def draw(found: dict[str, Any], target: Path) -> None:
    """Four small charts over the steps."""
    from taopd.report.figures.style import COLORS, plt, save

    readings = found["readings"]
    steps = [row["step"] for row in readings]
    charts = (
        ("resident memory", "rss_mib", "MiB", 1.0),
        ("live tensors", "tensor_mib", "MiB", 1.0),
        ("open files and threads", "handles", "", 1.0),
        ("rollouts.jsonl", "rollouts.jsonl", "MiB", 1 / MIB),
    )
    figure, panels = plt.subplots(2, 2, figsize=(9, 5.5), layout="constrained")
    for axes, (title, name, unit, scale) in zip(panels.flat, charts, strict=True):
        axes.plot(steps, [scale * row[name] for row in readings], color=COLORS[0], label=name)
        per = found["slopes"][name]
        words = (
            f"{scale * per['per_1000_steps']:+.2f} "
            f"[{scale * per['low']:+.2f}, {scale * per['high']:+.2f}] {unit} per 1,000 steps"
        )
        if name == "handles":
            threads = [row["threads"] for row in readings]
            axes.plot(steps, threads, color=COLORS[1], linestyle="--", label="threads")
            axes.legend(frameon=False)
        axes.axvline(WARM_UP, color="0.7", linewidth=0.8)
        axes.set(title=f"{title}: {words}", xlabel="optimizer step", ylabel=unit, ylim=(0, None))
        axes.title.set_size(9)
    for path in save(figure, target.parent, target.stem):
        if path.suffix == ".svg":
            path.unlink()


def main() -> None:
    """Run, save, draw; or draw what was saved."""
    parser = Arguments(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/soak"))
    parser.add_argument("--output", type=Path, default=Path("docs/reliability/soak.json"))
    parser.add_argument("--steps", type=positive, default=STEPS)
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    if not options.draw:
        options.runs.mkdir(parents=True, exist_ok=False)
        found = summarize(options.runs, train(options.runs, options.steps))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, found)
    found = json.loads(options.output.read_text(encoding="utf-8"))
    draw(found, options.output.with_suffix(".png"))
    for name, per in found["slopes"].items():
        print(f"{name:22} {per['per_1000_steps']:+12.3f} [{per['low']:+.3f}, {per['high']:+.3f}]")


if __name__ == "__main__":
    main()
