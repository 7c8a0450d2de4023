"""Folder of gains: the bank's features, one Parquet file of gains per checkpoint, and a manifest.

Self-contained, so that analyses and reports need neither the bank nor a model.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from taopd.diagnose.bank import FixedContextBank
from taopd.diagnose.bank.manifest import (
    MANIFEST,
    check_destination,
    read_manifest,
    write_manifest,
    write_parquet,
    written_whole,
)
from taopd.diagnose.features import GAINS
from taopd.diagnose.gain import CheckpointGain
from taopd.errors import DataError
from taopd.runs.parquet import read_table
from taopd.runs.schemas import GAIN_FORMAT
from taopd.runs.validation import TEXT, WHOLE, Maybe, Some, fit, shown

_TOKENS = "tokens.parquet"
_SHAPE = {"checkpoints": Some({"file": TEXT, "label": TEXT, "step": Maybe(WHOLE)})}


def write_gains(
    gains: Sequence[CheckpointGain],
    bank: FixedContextBank,
    folder: str | Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Write gains of one bank atomically; return the folder's absolute path.

    Raises:
        DataError: nothing to write, or a folder that holds something else.
    """
    if not gains:
        raise DataError("no gains to write")
    path = check_destination(folder, GAIN_FORMAT, overwrite=overwrite)
    with written_whole(path, GAIN_FORMAT, overwrite=overwrite) as partial:
        features = list(bank.tokens)
        write_parquet(partial / _TOKENS, _columns(bank.tokens))
        entries = []
        for index, gain in enumerate(gains):
            name = f"gain-{index:03d}.parquet"
            write_parquet(partial / name, _columns(gain.tokens.drop(columns=features)))
            entries.append({"file": name, **gain.summary()})
        content = {
            "bank_sha256": bank.manifest["sha256"],
            "k": bank.k,
            "temperature": bank.temperature,
            "fingerprints": bank.fingerprints,
            "checkpoints": [
                # JSON has no NaN: the mean of an empty group is null.
                {name: None if value != value else value for name, value in entry.items()}
                for entry in entries
            ],
        }
        write_manifest(partial, GAIN_FORMAT, content)
    return path


def read_gains(folder: str | Path) -> list[CheckpointGain]:
    """The gains of a folder, every file checked against the manifest.

    Raises:
        DataError: no such folder, or a file that is missing, truncated or edited.
    """
    path = Path(folder)
    manifest = read_manifest(path, GAIN_FORMAT)
    fit(manifest, _SHAPE, str(path / MANIFEST))
    tokens = read_table(path / _TOKENS)
    gains = []
    for entry in manifest["checkpoints"]:
        if entry["file"] not in manifest["files"]:
            raise DataError(f"{path / MANIFEST} does not hold the file {shown(entry['file'])}")
        columns = read_table(path / entry["file"], GAINS)
        if len(columns) != len(tokens) or set(columns) & set(tokens):
            raise DataError(f"{path / entry['file']} does not fit the tokens of these gains")
        both = pd.concat([tokens, columns], axis=1)
        gains.append(CheckpointGain(label=entry["label"], step=entry["step"], tokens=both))
    return gains


def _columns(frame: pd.DataFrame) -> dict[str, pa.Array]:
    return {str(name): pa.array(frame[name].to_numpy()) for name in frame}
