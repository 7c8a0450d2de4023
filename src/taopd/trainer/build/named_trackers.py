"""The trackers that `report_to` names: one that is not installed is refused in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import get_reporting_integration_callbacks

from taopd.errors import ConfigError


@contextmanager
def tracker_errors(named: str | list[str] | None) -> Iterator[None]:
    """What transformers refuses inside for a tracker that is not installed, as a mistake in `report_to`.

    Raises:
        ConfigError: names the setting.
    """
    try:
        yield
    except RuntimeError as error:
        if "installed" not in str(error):
            raise
        raise ConfigError(f"report_to={named!r}: {error}") from error


def check_trackers(named: str | list[str] | None) -> None:
    """Make the trackers, as the trainer does when it begins, so that one that cannot be made is told before.

    Raises:
        ConfigError: one is not installed. ValueError: there is no such tracker.
    """
    names = [named] if isinstance(named, str) else named or []
    if "all" in names:  # those that are installed
        return
    with tracker_errors(named):
        for callback in get_reporting_integration_callbacks([n for n in names if n != "none"]):
            callback()
