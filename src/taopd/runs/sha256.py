"""The sha256 of a file, and of a document."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def file_sha256(path: Path, *, flush: bool = False) -> str:
    """sha256 of a file's bytes, in hex.

    Args:
        flush: have what was written to it on disk first.
    """
    with path.open("rb") as stream:
        if flush:
            os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_sha256(document: Any) -> str:
    """sha256 of a document as JSON, whatever the order of its keys, in hex."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()
