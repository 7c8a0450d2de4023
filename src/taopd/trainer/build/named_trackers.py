"""The trackers that `report_to` names: one that is unknown or not installed is refused in one line."""

from transformers.integrations import INTEGRATION_TO_CALLBACK

from taopd.errors import ConfigError


def check_trackers(named: str | list[str] | None) -> None:
    """Make the trackers, as the trainer does when it begins: one that cannot be made is told before."""
    names = [named] if isinstance(named, str) else named or []
    if names in (["all"], ["none"]):  # all: those that are installed
        return
    if unknown := [name for name in names if name not in INTEGRATION_TO_CALLBACK]:
        # In a list of its own such a word means something.
        worst = next((name for name in unknown if name not in ("all", "none")), unknown[0])
        raise ConfigError(
            f"report_to={named!r}: {worst} is not supported; take some of "
            f"{', '.join(INTEGRATION_TO_CALLBACK)}, or all or none alone"
        )
    try:
        for name in names:
            INTEGRATION_TO_CALLBACK[name]()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"report_to={named!r}: {error}") from error
