"""A row of a dataset as the prompt that the student reads: text or messages, tools, template options.

What: `read_prompt` takes one row in any form that is in use (text; messages with role and content, or from
and value as in ShareGPT; content as text, as parts or null; null columns that another row filled) and gives
a `Prompt`; `render` puts messages through a chat template.

Why row by row: a set may mix text and messages, and every row may bring its own tools.

Not here: images, audio and video, which are refused by name. Null columns of them are ignored.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from taopd.errors import DataError
from taopd.models.damage import root_cause
from taopd.models.loading import UNREADABLE
from taopd.runs.validation import parse_json

Messages = list[dict[str, Any]]

TURNS = ("messages", "conversations", "conversation")
"""Columns that hold whole conversations, the answer included."""
COLUMNS = ("prompt", *TURNS, "tools", "chat_template_kwargs")
"""Columns that a prompt is made of."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns that are refused where they hold something."""
_READS = (
    "the student would read the answer that it is to write. Name the column 'messages', of which what comes "
    "before the answer is taken, or cut the last message off"
)
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Of ShareGPT and its relatives; any other name stays as it is."""
_LONE = re.compile("[\ud800-\udfff]")
_KNOWN = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a student is asked, before it is tokens."""

    content: str | Messages
    """Text is encoded as it is; messages go through the chat template."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas that the template shows."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords for the template, of this row alone."""
    where: str = field(default="a row", compare=False)
    """Its row, for messages: a part of a set is encoded at a time."""


def read_prompt(row: Any, where: str) -> Prompt:
    """The prompt of a row: a mapping of columns, or the bare value of a `prompt` column.

    Without a `prompt` column the turns of a conversation count, up to its last user turn.

    Args:
        where: names the row in messages, such as "row 3".

    Raises:
        DataError: no prompt, an empty one, one that ends with the answer, or images.
    """
    columns = row if isinstance(row, Mapping) else {"prompt": row}
    for name in MEDIA:
        # A column that is null here is there because another row has one, or none has.
        if any(part is not None for part in _as_list(columns.get(name))):
            raise DataError(f"{where} has {name}: taopd trains on text alone; drop the row")
    value = columns.get("prompt")
    # A prompt wins: sets with both keep the whole conversation beside it.
    turns = next((name for name in TURNS if columns.get(name) is not None), None)
    if "prompt" not in columns and turns is not None:
        content: str | Messages = split_turns(columns[turns], where)[0]
        _check(content, f"the prompt of {where}")
    else:
        content = read_content(value, f"the prompt of {where}", where)
    options = _decoded(columns.get("chat_template_kwargs"), f"chat_template_kwargs of {where}")
    tools = _decoded(columns.get("tools"), f"tools of {where}") or None
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"tools of {where} is {type(tools).__name__}; it must be a list")
    if options is not None and not isinstance(options, dict):
        raise DataError(f"chat_template_kwargs of {where} must be a mapping")
    return Prompt(content=content, tools=tools, options=options or {}, where=where)


def read_content(value: Any, what: str, where: str, *, fault: str = _READS) -> str | Messages:
    """The content of a prompt: text, or messages in any form that is in use.

    Args:
        what, where: name the prompt and its row in messages.
        fault: what would happen with an answer at the end.

    Raises:
        DataError: another type, an empty prompt, or one that ends with the answer.
    """
    if isinstance(value, list):
        content: str | Messages = [_message(message, where) for message in value]
    elif isinstance(value, str) or value is None:
        content = value or ""
    else:
        raise DataError(
            f"{what} is {type(value).__name__}; it must be text, or a list of messages with role and content"
        )
    _check(content, what, fault)
    return content


def split_turns(turns: Any, where: str) -> tuple[Messages, str | None]:
    """A conversation up to its last user turn, and the assistant's last text after it.

    Raises:
        DataError: no list of messages, or none of the user.
    """
    if not isinstance(turns, list):
        raise DataError(
            f"{where}: a conversation is a list of messages, not {type(turns).__name__}"
        )
    messages = [_message(message, where) for message in turns]
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise DataError(f"the conversation of {where} has no user turn; drop the row")
    # Between them may be tool calls and results: the last text is what a user was given.
    replies = [
        message["content"]
        for message in messages[users[-1] + 1 :]
        if message["role"] == "assistant" and message.get("content")
    ]
    return messages[: users[-1] + 1], replies[-1] if replies else None


def render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    options: Mapping[str, Any] | None = None,
    tools: Sequence[Any] = (),
    template: str | None = None,
) -> str:
    """The prompt as text; messages through the chat template, with the assistant's header at the end.

    Args:
        options: of the template, for every row; a row's own win.
        tools: of the trainer, which a row without its own is shown.
        template: instead of the tokenizer's.

    Raises:
        DataError: messages without a chat template, a template that fails, or text that cannot be encoded.
    """
    if isinstance(prompt.content, str):
        return prompt.content
    if template is None and tokenizer.chat_template is None:
        raise DataError(
            "the prompts are lists of messages but the tokenizer has no chat template; use plain "
            "text"
        )

    try:
        text = str(
            tokenizer.apply_chat_template(
                prompt.content,
                tools=prompt.tools or list(tools) or None,
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
                **(dict(options or {}) | dict(prompt.options)),
            )
        )
    # The sandbox refuses with a TemplateError, ranges beyond its limit with an OverflowError.
    except (jinja2.TemplateError, ArithmeticError, LookupError, *UNREADABLE) as error:
        why = root_cause(error)
        raise DataError(f"the chat template cannot be used for {prompt.where}: {why}") from error
    # Messages have been looked at; a call, a tool, an option of the template may hold one too.
    check_text(text, "what the chat template makes of a row")
    return text


def check_text(text: str, what: str) -> None:
    """Refuse half of a surrogate pair: JSON can write it, and no tokenizer takes it.

    Raises:
        DataError: names `what` holds it.
    """
    if not text.isascii() and (lone := _LONE.search(text)):
        raise DataError(
            f"{what} holds half of a surrogate pair, {lone[0]!a}, which is no text: drop the row, or "
            "write it again as UTF-8"
        )


def _check(content: str | Messages, what: str, fault: str = _READS) -> None:
    """Something to answer, and no answer yet."""
    texts = [content] if isinstance(content, str) else [m["content"] for m in content]
    for text in texts:
        check_text(text, what)
    if isinstance(content, str):
        empty = not content.strip()
    else:
        # An empty system message is usual; a conversation without anything else asks nothing.
        said = [m for m in content if m["role"] not in ("system", "developer")]
        if content and not said:
            raise DataError(
                f"{what} has a system message alone: add a user message, or drop the row"
            )
        empty = not any(m["content"].strip() or m.get("tool_calls") for m in said)
    if empty:
        raise DataError(f"{what} is empty; drop the row")
    if not isinstance(content, str) and content[-1]["role"] == "assistant":
        raise DataError(f"{what} ends with an assistant message: {fault}")


def _message(message: Any, where: str) -> dict[str, Any]:
    """One message with role and content; content is text, empty where it is null or missing."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: a message is {type(message).__name__}, not role and content")
    # A table fills the keys that other messages have with nulls, which templates take for values.
    kept = _without_nulls(message)
    if "role" not in kept and "from" in kept:
        kept["content"] = kept.pop("value", None)
        kept["role"] = kept.pop("from")
    role, content = kept.get("role"), kept.get("content")
    if not isinstance(role, str) or not role:
        raise DataError(f"{where} has a message without a role")
    if isinstance(content, list):
        content = "".join(text_of_part(part, where) for part in content)
    # Null is how a tool call without text is written; a template would print it, or fail.
    content = "" if content is None else content
    if not isinstance(content, str):
        raise DataError(f"{where}: the content of a message is {type(content).__name__}, not text")
    return {**kept, "role": _role(role), "content": content}


def _role(role: str) -> str:
    """The usual name of a role, also where it is written "User": a template drops or prints another one."""
    name = _ROLES.get(role.lower(), role.lower())
    return name if name in _KNOWN else role


def text_of_part(part: Any, where: str) -> str:
    """The text of one part of a message's content.

    Raises:
        DataError: a picture or another kind of part.
    """
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    # "text", and OpenAI's "input_text" and "output_text".
    if (
        isinstance(part, Mapping)
        and str(kind).endswith("text")
        and isinstance(part.get("text"), str)
    ):
        return str(part["text"])
    raise DataError(
        f"{where} has a message with {kind!r}: taopd trains on text alone; drop the row"
    )


def _decoded(value: Any, what: str) -> Any:
    """A column of JSON values, which some datasets hold as text."""
    if isinstance(value, str):
        value = parse_json(value, what) if value.strip() else None
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
