"""The sha256 of a file."""

import hashlib
import os
from pathlib import Path


def file_sha256(path: Path, *, flush: bool = False) -> str:
    """sha256 of a file's bytes, in hex.

    Args:
        flush: have what was written to it on disk first.
    """
    with path.open("rb") as stream:
        if flush:
            os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()
