"""A rich console that prints text without interpreting markup."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def plain_console(**options: Any) -> "Console":
    """A console to which names and completions of others are text, and never markup (`[/]`, `:x:`).

    Args:
        options: of `rich.console.Console`.
    """
    from rich.console import Console

    return Console(markup=False, emoji=False, **options)
