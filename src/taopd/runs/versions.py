"""Versions of the installed packages, as run folders, banks, labs and model cards record them.

Why one place: on a node without a network taopd runs from its sources (docs/offline.md) and has no metadata
to ask. A version is a record, and no reason for a run to end.
"""

import importlib.metadata

from taopd import __version__


def installed_version(package: str) -> str | None:
    """The version of an installed package, None without it; taopd's own is that of the code that runs.

    Example:
        >>> installed_version("taopd") == __version__, installed_version("no-such-package")
        (True, None)
    """
    if package == "taopd":
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
