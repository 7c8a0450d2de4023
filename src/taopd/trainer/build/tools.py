"""The functions that the student may call while it samples, and what they forbid."""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from transformers.utils import get_json_schema

from taopd.errors import ConfigError
from taopd.models.prompt_rows import read_prompt, text_of_part
from taopd.selectors.resolve import load_object

if TYPE_CHECKING:
    from taopd.trainer.config import TeachabilityConfig

Tools = list[Callable[..., Any]]

_ENDS = (
    "the id that ends a message with a tool call and the one that ends the turn mean different things; set "
    "stop_tokens='train' or 'exclude'"
)


def given_tools(args: "TeachabilityConfig", tools: Any) -> Any:
    """The trainer's tools: those of the caller, or of the setting `tools`; None without any."""
    if tools and args.tools:
        raise ConfigError("tools and the setting tools: keep one of them")
    tools = [tools] if callable(tools) else tools
    tools = load_tools(args.tools) if args.tools else tools
    if tools and args.stop_tokens == "merge":
        raise ConfigError(f"stop_tokens='merge' with tools: {_ENDS}")
    answering = [answering_in_text(tool) for tool in tools or ()]
    names = [tool.__name__ for tool in answering]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two tools are called {twice[0]}: a call would reach one of them alone")
    return answering or None


def answering_in_text(tool: Callable[..., Any]) -> Callable[..., Any]:
    """The tool with text as its answer, which every chat template shows.

    TRL takes a list for parts of a message, of which templates for text show none: the answer would be empty.
    """
    name = getattr(tool, "__name__", None)
    if name is None:
        raise ConfigError(
            f"a tool is a {type(tool).__name__} without a name to call it by: give a function"
        )
    if inspect.iscoroutinefunction(tool):
        raise ConfigError(f"the tool {name} is an async function: give one that waits itself")

    @wraps(tool)
    def answered(*args: Any, **kwargs: Any) -> str:
        try:
            result = tool(*args, **kwargs)
        except SystemExit as error:
            # What the student wrote may call it; the run goes on as after any other error.
            raise RuntimeError(f"exit {error}") from error
        parts = result if isinstance(result, list) else []
        if parts and all(isinstance(part, dict) and "type" in part for part in parts):
            result = "".join(text_of_part(part, f"the answer of the tool {name}") for part in parts)
        # Half of a pair, as of a file name that is no UTF-8, is no text for a tokenizer.
        return str(result).encode("utf-8", "replace").decode()

    return answered


def load_tools(path: str) -> Tools:
    """The functions behind a dotted path: a list of them, or one."""
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
    """Refuse merged stop ids beside prompts with tools of their own."""
    if args.stop_tokens != "merge":
        return
    for number, row in enumerate(rows):
        if read_prompt(row, f"row {number}").tools:
            raise ConfigError(f"stop_tokens='merge', and row {number} has tools: {_ENDS}")
