"""What the system says of a file that cannot be written or used: one message for every command.

Why by the number of the error and not by where it is raised: any write may meet a full disk.

Not here: errors without a file, such as a worker's broken pipe. They are bugs and keep their traceback.
"""

import errno
import os

from taopd.errors import ResourceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK = {*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


def disk_fault(error: BaseException) -> ResourceError | None:
    """The error to show for a file that cannot be written or used; None for a bug."""
    if (what := cannot_write(error, weights=False)) is not None:
        return ResourceError(
            f"cannot write {what}. Make room or mend the folder, and give the command again"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return ResourceError(
            f"cannot use {error.filename} ({error.strerror or first_line(error)}). Mend it or name "
            "another one, and give the command again"
        )
    return None


def cannot_write(error: BaseException, *, weights: bool = True) -> str | None:
    """The file that could not be written and why, for a full, limited or read-only disk; else None.

    Args:
        weights: whatever safetensors says is of writing; False: only what it says of the disk.
    """
    from safetensors import SafetensorError

    text = first_line(error)
    of_disk = any(os.strerror(number) in text for number in _DISK)
    if isinstance(error, SafetensorError):
        return f"weights ({text})" if weights or of_disk else None
    if not isinstance(error, OSError) or not (error.errno in _DISK or of_disk):
        return None
    return f"{error.filename or 'a file'} ({error.strerror or text})"


def is_full(error: OSError) -> bool:
    """Whether a disk, or what one user may have of it, is full."""
    return error.errno in _FULL


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
