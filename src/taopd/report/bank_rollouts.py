"""Rollouts of a bank, one per checkpoint that was measured on it: the same tokens, gain by gain.

A folder of gains holds every feature and, per checkpoint, the gain of every token, so two checkpoints
side by side are two rollouts with the same completion. The words are those of the student that the bank's
`sources.json` names, or of a run in the same report with the bank's vocabulary; else ids are shown.
"""

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from taopd.errors import DataError
from taopd.report.folders import Sources, read_json
from taopd.report.rollouts import Rollout
from taopd.report.text import readable, tokenizer_kind
from taopd.runs.parquet import read_table
from taopd.runs.schemas import GAIN_FORMAT, ROLLOUT
from taopd.runs.sha256 import json_sha256
from taopd.runs.validation import ANY, TEXT, WHOLE, WORD, fit, read_document

MOST_CHECKPOINTS = 6
"""Of one folder of gains."""
_MANIFEST = {
    "sha256?": TEXT,
    "bank_sha256?": TEXT,
    "checkpoints?": [{"file": TEXT}],
    "fingerprints?": {"tokenizer?": {"vocabulary?": TEXT}},
}
_PLACES = ("completion", "token_id")
_TOKENIZER = {"model": {"vocab": ANY}, "added_tokens?": [{"id": WHOLE, "content": WORD}]}


def bank_rollouts(sources: Sources, *, limit: int) -> list[Rollout]:
    """At most `limit` rollouts of all gains, and of banks whose gains are not here, shared evenly."""
    found: list[Rollout] = []
    manifests = {
        path: read_json(path / "manifest.json", _MANIFEST)
        for path in (*sources.gains, *sources.banks)
    }
    measured = {manifests[path].get("bank_sha256") for path in sources.gains}
    banks = [path for path in sources.banks if manifests[path].get("sha256") not in measured]
    folders = [*sources.gains, *banks]
    for place, path in enumerate(folders):
        manifest = manifests[path]
        words = _vocabulary(path, manifest, sources)
        tokens = read_table(path / "tokens.parquet", _PLACES)
        room = (limit - len(found)) // (len(folders) - place)
        if path in banks:
            found += _rollouts(tokens, None, words, path.name, path.name, room)
            continue
        checkpoints = manifest.get("checkpoints", [])[: min(MOST_CHECKPOINTS, room)]
        for checkpoint in checkpoints:
            gain = read_table(path / Path(checkpoint["file"]).name).get("gain_forward")
            label = f"{path.name}, {checkpoint.get('label', 'checkpoint')}"
            each = room // len(checkpoints)
            found += _rollouts(tokens, gain, words, path.name, label, each)
    return found


def _rollouts(
    tokens: pd.DataFrame,
    gain: pd.Series | None,
    words: dict[int, str],
    run: str,
    label: str,
    limit: int,
) -> list[Rollout]:
    """The first `limit` completions, with the features of the largest K not above 16."""
    found = (re.fullmatch(r"disagreement_k(\d{1,6})", str(name)) for name in tokens.columns)
    sizes = sorted(int(match[1]) for match in found if match)
    if not sizes or (gain is not None and len(gain) != len(tokens)):
        raise DataError(f"{run}: its tables are not those of a bank")
    k = max([size for size in sizes if size <= 16], default=sizes[0])
    columns = {
        **{name: name for name in ("entropy", "student_logprob", "teacher_logprob")},
        **{name: f"{name}_k{k}" for name in ("disagreement", "compatibility", "quadrant")},
    }
    kind = tokenizer_kind(words.values())
    rollouts = []
    for completion, rows in list(tokens.groupby("completion", sort=True))[:limit]:
        ids = rows["token_id"].tolist()
        line: dict[str, Any] = {
            "prompt": f"completion {completion} of the bank (K = {k})",
            "token_ids": ids,
            **{name: _numbers(rows[c]) for name, c in columns.items() if c in rows},
        }
        if gain is not None:
            line["gain"] = _numbers(gain.loc[rows.index])
        fit(line, ROLLOUT, f"{run}, completion {completion}")
        line["label"] = f"{label}, completion {completion}"
        pieces = [readable(words[i], kind) if i in words else f"⟨{i}⟩ " for i in ids]
        common = {"line": line, "pieces": pieces, "prompt": line["prompt"], "kind": kind}
        rollouts.append(Rollout(run=run, step=0, correct=None, **common))
    return rollouts


def _numbers(column: pd.Series) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in column.tolist()]


def _vocabulary(path: Path, manifest: dict[str, Any], sources: Sources) -> dict[int, str]:
    """Token of each id, from the first tokenizer that is the bank's; empty if there is none."""
    student = _student(path, manifest)
    if student is not None and student.is_file():
        return _read_vocabulary(student)
    wanted = manifest.get("fingerprints", {}).get("tokenizer", {}).get("vocabulary")
    for file in (run.path / "model" / "tokenizer.json" for run in sources.runs):
        words = _read_vocabulary(file) if file.is_file() else {}
        if words and wanted in (None, json_sha256(sorted(words.items()))):
            return words
    return {}


def _student(path: Path, manifest: dict[str, Any]) -> Path | None:
    """The tokenizer of the student, where the bank of a folder says that it was."""
    bank = (
        path.with_name(path.name.removesuffix("-gain"))
        if manifest["format"] == GAIN_FORMAT
        else path
    )
    student = read_json(bank / "sources.json").get("student")
    return (bank / student).resolve() / "tokenizer.json" if isinstance(student, str) else None


def _read_vocabulary(file: Path) -> dict[int, str]:
    """From a `tokenizer.json`: its model's vocabulary and its added tokens."""
    document = read_document(file, _TOKENIZER)
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of the ids.
        fit(vocabulary, [[ANY]], str(file))
        words = {index: str(entry[0]) for index, entry in enumerate(vocabulary) if entry}
    else:
        fit(vocabulary, {...: WHOLE}, str(file))
        words = {index: token for token, index in vocabulary.items()}
    return words | {token["id"]: token["content"] for token in document.get("added_tokens", [])}
