"""The functions that the student may call while it samples, and what they forbid."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils import get_json_schema

from taopd.errors import ConfigError
from taopd.models.prompt_rows import read_prompt
from taopd.selectors.resolve import load_object

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

Tools = list[Callable[..., Any]]

_ENDS = (
    "the id that ends a message with a tool call and the one that ends the turn mean different things; set "
    "stop_tokens='train' or 'exclude'"
)


def given_tools(args: "TeachabilityConfig", tools: Sequence[Callable[..., Any]] | None) -> Any:
    """The trainer's tools: those of the caller, or of the setting `tools`; None without any.

    Raises:
        ConfigError: both are given, stop ids are merged, or see `load_tools`.
    """
    if tools and args.tools:
        raise ConfigError("tools and the setting tools: keep one of them")
    tools = load_tools(args.tools) if args.tools else tools
    if tools and args.stop_tokens == "merge":
        raise ConfigError(f"stop_tokens='merge' with tools: {_ENDS}")
    return tools


def load_tools(path: str) -> Tools:
    """The functions behind a dotted path: a list of them, or one.

    Raises:
        ConfigError: the path leads nowhere or to something else, or a function does not say what it takes.
    """
    found = load_object(path, "tools")
    tools = [found] if callable(found) else found
    if not isinstance(tools, list | tuple) or not tools or not all(map(callable, tools)):
        raise ConfigError(
            f"tools={path!r} is a {type(found).__name__}; expected a list of functions"
        )
    for tool in tools:
        try:
            get_json_schema(tool)
        # Its own exceptions are not exported by name in every version.
        except Exception as error:
            name = getattr(tool, "__name__", type(tool).__name__)
            raise ConfigError(
                f"tools={path!r}: {name} needs type hints and a docstring with its arguments in Google "
                f"style, from which the model learns how to call it ({error})"
            ) from error
    return list(tools)


def check_rows(rows: Sequence[Any], args: "TeachabilityConfig") -> None:
    """Refuse merged stop ids beside prompts with tools of their own.

    Raises:
        ConfigError: names the row. DataError: a row that is no prompt.
    """
    if args.stop_tokens != "merge":
        return
    for number, row in enumerate(rows):
        if read_prompt(row, f"row {number}").tools:
            raise ConfigError(f"stop_tokens='merge', and row {number} has tools: {_ENDS}")
