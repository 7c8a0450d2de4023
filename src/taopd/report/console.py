"""A rich console that prints text without interpreting markup, and the form of a table of arms."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def plain_console(**options: Any) -> "Console":
    """A console to which names and completions of others are text, and never markup (`[/]`, `:x:`).

    Args:
        options: of `rich.console.Console`.
    """
    from rich.console import Console

    return Console(markup=False, emoji=False, **options)


def arms_table(numbers: Sequence[str], *, title: str, caption: str) -> "Table":
    """An empty table of arms, a row each, with columns of numbers."""
    from rich import box
    from rich.table import Table

    form: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    shown = Table(title=title, caption=caption, **form)
    shown.add_column("arm", overflow="fold")  # a long name must not take the numbers' room
    for name in numbers:
        shown.add_column(name, justify="right", no_wrap=True)
    return shown
