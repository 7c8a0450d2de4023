"""Shared fixtures: a micro Qwen3 teacher and student over 40 words, and prompts, on disk.

Small enough that loading one takes milliseconds; real enough that every library below sees the
files it sees in production: config.json, safetensors, tokenizer.json, parquet.
"""

import os

# Before torch is imported: two OpenMP threads that spin against another process cost more than they
# give.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from dataclasses import dataclass
from pathlib import Path

import pytest

WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", *"0123456789", "+", "=", *(f"w{i}" for i in range(24)))


def is_documented(key: str) -> bool:
    """Whether a metric key of ours is in `METRICS`, directly or through its `/*` family."""
    from taopd.trainer.metrics import METRICS

    return key in METRICS or f"{key.rpartition('/')[0]}/*" in METRICS


@dataclass(frozen=True)
class MicroLab:
    """Paths of the micro models and prompts."""

    root: Path
    student: Path
    teacher: Path
    prompts: Path
    """parquet with prompt, answer and split (24 train, 8 test rows)."""


def write_config(lab: MicroLab, folder: Path, *, name: str = "run", **settings) -> Path:
    """A config file of `taopd train` over the micro lab on a CPU, for a run in `folder/name`.

    Args:
        settings: in place of these or beside them; None leaves one out.
    """
    import yaml

    known = {
        "model_name_or_path": str(lab.student),
        "teacher_model_name_or_path": str(lab.teacher),
        "dataset_name": str(lab.prompts),
        "output_dir": str(folder / name),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    given = {key: value for key, value in (known | settings).items() if value is not None}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def run_script(path: Path, *arguments: str, timeout: float) -> None:
    """Run a Python script of the tests to its end, in a process of its own; its last words if it fails."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def make_tokenizer(words=WORDS):
    """A word-level fast tokenizer; the position in `words` is the id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def make_model(
    *,
    seed: int,
    hidden_size: int = 16,
    vocab_size: int = len(WORDS),
    layers: int = 2,
    tie_word_embeddings: bool = False,
):
    """A randomly initialised Qwen3 with a context of 64 tokens."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tie_word_embeddings,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def make_rows(num_rows: int, split: str) -> list[dict[str, str]]:
    """Additions of two digits, with unequal prompt lengths: "3 + 4 =" and "w1 3 + 4 ="."""
    rows = []
    for index in range(num_rows):
        left, right = index % 5, (3 * index) % 5
        lead = f"w{index % 24} " if index % 2 else ""
        rows.append(
            {"prompt": f"{lead}{left} + {right} =", "answer": str(left + right), "split": split}
        )
    return rows


def make_checkpoint(run: Path, step: int) -> Path:
    """A sealed folder in the place of a checkpoint, for whoever only looks for one."""
    from taopd.runs.checkpoints import OPTIMIZER, STATE, seal

    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    for name in (STATE, OPTIMIZER):
        (folder / name).write_text(f'{{"global_step": {step}}}')
    seal(folder, step=step, num_processes=1)
    return folder


@pytest.fixture(scope="module")
def lab_cache(tmp_path_factory):
    """A cache of labs of its own; their models are trained in this process, and not in others."""
    from taopd.experiments.lab import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_train_in_processes", build._train_here)
        patch.setenv("TAOPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def micro_lab(tmp_path_factory) -> MicroLab:
    """The micro models and prompts, made once per session. Treat as read-only."""
    import pandas as pd

    root = tmp_path_factory.mktemp("micro_lab")
    for name, seed, width in (("student", 0, 16), ("teacher", 1, 32)):
        make_model(seed=seed, hidden_size=width).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    pd.DataFrame(make_rows(24, "train") + make_rows(8, "test")).to_parquet(root / "prompts.parquet")
    return MicroLab(
        root=root,
        student=root / "student",
        teacher=root / "teacher",
        prompts=root / "prompts.parquet",
    )


@pytest.fixture
def own_labs():
    """The labs that a script registers for its process are gone after the test."""
    from taopd.experiments.lab.variants import VARIANTS

    known = dict(VARIANTS)
    yield
    VARIANTS.clear()
    VARIANTS.update(known)


@pytest.fixture
def forked_arms(monkeypatch):
    """Arms that this process starts are forked; see `tests.forked_arms`."""
    from tests.forked_arms import start

    monkeypatch.setattr("taopd.experiments.pool._start", start)


LONGEST_FILES = (
    "test_ranks",
    "test_study",
    "test_check",
    "test_diagnose_coverage",
    "test_printed_commands",
)


def pytest_collection_modifyitems(config, items):
    """Several processes take the longest files first: one that came last would make the others wait."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.stem not in LONGEST_FILES)


def pytest_collection_finish(session):
    """No look before training unless a test asks for it: hundreds train, on pairs that would fail."""
    import gc
    import sys

    gc.freeze()  # Every run ends with a full collection: 0.2 s to look at all that was imported.

    record = sys.modules.get("taopd.trainer.run_record")
    if record is not None:
        record.RecordedRuns.train.__kwdefaults__["check"] = False


def replaced(argv, *more) -> list[str]:
    """A command line in which the flags of `more` have these values; a flag may be given once."""
    given = {str(word) for word in more if str(word).startswith("--")}
    kept, dropped = [], False
    for word in map(str, argv):
        if word.startswith("--"):
            dropped = word in given
        if not dropped:
            kept.append(word)
    return [*kept, *map(str, more)]
