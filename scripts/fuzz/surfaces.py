"""What reads files or answers that somebody else may have written: one harness each.

A harness makes a valid input once, then takes bytes, changes the input by them, and reads it as the commands
do. Only a `TaopdError` may come out. What is written goes below the folder it was given, and is whole.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from scripts.fuzz.odd import Choices, as_json, changed, torn
from taopd.errors import TaopdError

ROOT = Path(__file__).parents[2]
Read = Callable[[Choices], None]

TRAIN: dict[str, Any] = {
    "model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher",
    "dataset_name": "prompts.parquet",
    "output_dir": "runs/x",
    "selector": "0.5*teachability + 0.5*entropy",
    "budget": 0.1,
    "score_top_k": 4,
    "loss": "jsd",
    "beta": 0.5,
    "gradient_window": 8,
    "budget_schedule": "linear",
    "budget_end": 0.2,
    "max_steps": 10,
    "learning_rate": "1e-6",
    "lr_scheduler_type": "constant",
    "max_completion_length": 9,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 5,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "seed": 0,
    "shadow_selectors": ["random", "entropy"],
    "model_init_kwargs": {"attn_implementation": "eager"},
    "chat_template_kwargs": {"enable_thinking": False},
    "stop_token_ids": [1, 2],
    "env": {"TAOPD_FUZZ": "1"},
}
STUDY: dict[str, Any] = {
    "title": "t",
    "student": "student",
    "teacher": "teacher",
    "prompts": "prompts.parquet",
    "match": "exact",
    "config": {"max_steps": 10, "max_completion_length": 9, "budget": 0.1, "method": "published"},
    "arms": [{"name": "mine", "selector": "entropy"}, {"selector": "random", "loss": "jsd"}],
    "grid": {"selector": ["teachability", "divergence"], "budget": [0.05, 0.1]},
    "seeds": [0, 1],
    "equal": "steps",
    "evaluate_every": 5,
    "num_test_prompts": 8,
    "metric": "greedy",
    "collapse_points": 10.0,
    "random_control": True,
    "full_control": True,
    "workers": 1,
    "output": "runs/study",
}


def config_reader(root: Path) -> Read:
    """`taopd train --config`, as far as the settings, and `taopd plan --config`."""
    from taopd.cli import plan
    from taopd.runs.folder import RunFolder
    from taopd.trainer.settings_file import parse_settings

    path = root / "config.yaml"
    names = {"model_name_or_path": "Qwen3-0.6B", "teacher_model_name_or_path": "Qwen3-1.7B"}
    seed = TRAIN | names | {"output_dir": str(root / "run")}

    def read(choices: Choices) -> None:
        path.write_bytes(_yaml(seed, choices))
        environment = dict(os.environ)
        try:
            settings = parse_settings(str(path), [])
            settings.changed()
            json.dumps(settings.resolved(), default=str)
            RunFolder.check(str(settings.training.output_dir))
            with _quiet():
                plan.run(["--config", str(path), "--json"])
        finally:
            os.environ.clear()
            os.environ.update(environment)

    return read


def study_reader(root: Path) -> Read:
    """`taopd compare STUDY.yaml --list`, and the folders its arms would get."""
    from taopd.experiments.study.expand import expand
    from taopd.experiments.study.file import load_study_file
    from taopd.experiments.study.run import base_config
    from taopd.runs.folder import RunFolder

    path, output = root / "study.yaml", root / "out"
    output.mkdir()

    def read(choices: Choices) -> None:
        path.write_bytes(_yaml(STUDY, choices))
        study = load_study_file(path)
        arms = expand(study, base_config(study))
        RunFolder.check(study.output or output)
        shutil.rmtree(output / "arms", ignore_errors=True)
        for arm in arms:
            place = output / "arms" / f"{arm.name}-seed{study.seeds[0]}"
            place.mkdir(parents=True)
            if place.resolve().parent != (output / "arms").resolve():
                raise AssertionError(f"arm {arm.name!r} leaves the folder")

    return read


def bank_reader(root: Path) -> Read:
    """Banks and gains: manifest, columns, tensors; damaged by chance, or changed and hashed again."""
    from scripts.fuzz.seeds import make_bank, make_gains
    from taopd.diagnose.bank import FixedContextBank
    from taopd.diagnose.gain_files import read_gains
    from taopd.report.page import write_report

    bank, gains = make_bank(root / "seed-bank"), make_gains(root / "seed-gains")
    kinds = [(bank, "taopd-bank-1", FixedContextBank.open), (gains, "taopd-gain-1", read_gains)]

    def read(choices: Choices) -> None:
        seed, kind, reader = choices.of(kinds)
        folder = _fresh(seed, root / "bank")
        _change_bank(folder, kind, choices)
        with _either():
            opened: Any = reader(folder)
            if kind == "taopd-bank-1":
                _ = opened.k, opened.temperature, opened.vocab_size, opened.locate(0)
        _report(write_report, [folder], root)

    return read


def _change_bank(folder: Path, kind: str, choices: Choices) -> None:
    from taopd.diagnose.bank.manifest import MANIFEST, write_manifest

    manifest = json.loads((folder / MANIFEST).read_text())
    names = sorted(path.name for path in folder.iterdir())
    how = choices.below(4)
    if how == 0:
        path = folder / choices.of(names)
        path.write_bytes(torn(path.read_bytes(), choices))
        return
    content = {k: v for k, v in manifest.items() if k not in ("format", "files", "sha256")}
    if how == 1:
        _seal(folder, changed(manifest, choices))
        return
    if how == 2:
        content = changed(content, choices)
    else:
        name = choices.of([name for name in names if name != MANIFEST])
        (_change_parquet if name.endswith(".parquet") else _change_tensors)(folder / name, choices)
    if isinstance(content, dict):
        try:
            write_manifest(folder, kind, content)
        except (TypeError, ValueError, UnicodeEncodeError):
            (folder / MANIFEST).write_bytes(as_json(content))


def _seal(folder: Path, manifest: Any) -> None:
    """Write a manifest whose own hash fits, whatever it says."""
    import hashlib

    if isinstance(manifest, dict):
        content = {name: value for name, value in manifest.items() if name != "sha256"}
        text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
        manifest = content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "manifest.json").write_bytes(as_json(manifest))


def _change_parquet(path: Path, choices: Choices) -> None:
    import pandas as pd
    import pyarrow.parquet as pq

    from taopd.diagnose.bank.manifest import write_parquet

    frame = pq.read_table(path).to_pandas()
    name = choices.of(list(frame))
    how = choices.below(6)
    if how == 0:
        frame = frame.drop(columns=name)
    elif how == 1:
        frame[name] = [str(value) for value in frame[name]]
    elif how == 2:
        frame[name] = choices.of([np.nan, np.inf, -1.0, 1e30, 0.0, -5, 2**40, None, "x", True])
    elif how == 3:
        frame = frame.head(choices.below(len(frame)))
    elif how == 4:
        frame = pd.concat([frame, frame])
    else:
        frame = frame.rename(columns={name: choices.of(["x", "", "token_id", "\u202e"])})
    columns = {
        str(key): frame[key].to_numpy() for key in dict.fromkeys(frame) if frame[key].ndim == 1
    }
    write_parquet(path, columns)


def _change_tensors(path: Path, choices: Choices) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = choices.of(sorted(tensors))
    how = choices.below(6)
    if how == 0:
        del tensors[name]
    elif how == 1:
        tensors[name] = tensors[name][:-1].contiguous()
    elif how == 2:
        tensors[name] = tensors[name].float() * float("nan")
    elif how == 3:
        tensors[name] = torch.full_like(tensors[name], choices.of([0, -1, 7, 100]))
    elif how == 4:
        tensors[name] = tensors[name].flatten()
    else:
        tensors["other"] = tensors.pop(name)
    save_file(tensors, path)


def conformance_reader(root: Path) -> Read:
    """`taopd conformance FILE`."""
    from taopd.cli.conformance import show as run

    golden = json.loads((ROOT / "tests/golden/topk_lists.json").read_text())[:1]
    golden[0]["selections"] = golden[0]["selections"][::20]
    seed, path = as_json(golden), root / "batches.json"

    def read(choices: Choices) -> None:
        small = choices.below(3) == 0
        path.write_bytes(torn(seed, choices) if small else as_json(changed(golden, choices)))
        with _quiet():
            run([path])

    return read


def run_reader(root: Path) -> Read:
    """`taopd report`, `inspect`, `compare FOLDER` and what `train --resume` reads of a run folder."""
    import matplotlib.font_manager  # noqa: F401  (it looks for fonts once, with a process)

    from scripts.fuzz.seeds import make_runs
    from taopd.cli import inspect
    from taopd.report.page import write_report
    from taopd.runs.checkpoints import newest_complete, seal
    from taopd.runs.folder import RunFolder
    from taopd.trainer.checkpoint.steps_done import steps_done

    runs = make_runs(root / "seed-runs")
    parsed = {path: _parsed(path) for folder in runs for path in _small_files(folder)}

    def read(choices: Choices) -> None:
        seed = choices.of(runs)
        folder = _fresh(seed, root / "run")
        path = choices.of(_small_files(seed))
        _change_file(folder / path.relative_to(seed), parsed[path], choices)
        with _either(), _quiet():
            _report(write_report, [folder], root)
        with _either(), _quiet():
            inspect.run([str(folder), "--tokens", "--order", "disagreement"])
        with _either(), _quiet():
            if (folder / "arms").is_dir():
                _compare(folder, pictures=choices.below(100) == 0)
        checkpoint = RunFolder.check(folder, resume=True) / "checkpoint-2"
        newest_complete(folder)
        if choices.below(2) == 0:  # a seal that fits what was changed
            seal(checkpoint, step=2, num_processes=1)
        newest, _ = newest_complete(folder)
        if newest is not None:
            steps_done(newest)

    return read


def _compare(folder: Path, *, pictures: bool) -> None:
    """`taopd compare FOLDER`; its pictures take a second."""
    from taopd.cli import compare
    from taopd.experiments.study.finished import analyse_finished
    from taopd.report.study_table import markdown, table

    if pictures:
        compare.run([str(folder)])
        return
    results, timings = analyse_finished(folder)
    print(json.dumps(results, default=str), table(results), markdown(results, timings))


def _small_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".jsonl"))


def _parsed(path: Path) -> Any:
    text = path.read_text()
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines()]


def _change_file(path: Path, seed: Any, choices: Choices) -> None:
    if choices.below(4) == 0:
        path.write_bytes(torn(path.read_bytes(), choices))
    elif path.suffix == ".json":
        path.write_bytes(as_json(changed(seed, choices)))
    else:
        lines = changed(seed, choices)
        lines = lines if isinstance(lines, list) else [lines]
        path.write_bytes(b"".join(as_json(line) + b"\n" for line in lines))


def teacher_reader(root: Path) -> Read:
    """What vLLM and SGLang answer, through the teachers that read it."""
    from scripts.fuzz.seeds import sglang_teacher, vllm_teacher
    from taopd.errors import TeacherError

    teachers = [sglang_teacher(), vllm_teacher(exact=False), vllm_teacher(exact=True)]

    def read(choices: Choices) -> None:
        _, transport, score = choices.of(teachers)
        transport.damage = lambda answer: changed(answer, choices)
        try:
            scores = score()
        except TeacherError:
            raise
        if not bool((scores.logprobs <= 1e-3).all()) or bool(scores.logprobs.isnan().any()):
            raise AssertionError("numbers that cannot be true were accepted")

    return read


SURFACES: dict[str, Callable[[Path], Read]] = {
    "config": config_reader,
    "study": study_reader,
    "bank": bank_reader,
    "conformance": conformance_reader,
    "run": run_reader,
    "teacher": teacher_reader,
}


def _yaml(seed: dict[str, Any], choices: Choices) -> bytes:
    """A YAML file: the document changed, or its text."""
    if choices.below(3) == 0:
        return torn(yaml.safe_dump(seed).encode(), choices)
    try:
        text = yaml.safe_dump(changed(seed, choices), allow_unicode=choices.below(2) == 0)
    except yaml.YAMLError:
        return b"- x"
    return text.encode("utf-8", "surrogatepass")


def _report(write_report: Callable, folders: list[Path], root: Path) -> None:
    """Write the page; it is whole, or there is none."""
    page = root / "report.html"
    page.unlink(missing_ok=True)
    try:
        write_report(folders, page)
    finally:
        if page.exists() and not page.read_text(encoding="utf-8").endswith("</html>\n"):
            raise AssertionError("half a page was written")
        left = [path.name for path in root.glob(".*")]
        if left:
            raise AssertionError(f"left behind: {left}")


def _fresh(seed: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(seed, folder)
    return folder


@contextlib.contextmanager
def _either() -> Any:
    """A refusal here does not keep the next reader from its turn."""
    with contextlib.suppress(TaopdError):
        yield


@contextlib.contextmanager
def _quiet() -> Any:
    # As a terminal takes it: text that cannot be encoded fails here as it would there.
    with io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as out, contextlib.redirect_stdout(out):
        yield
