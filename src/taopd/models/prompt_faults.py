"""Faults of prompts that show in their tokens: two BOS, no header of the assistant, an answer that is there.

What: `prompt_faults` encodes a few rows as training does and looks at both ends. Nothing is repaired: the ids
stay those of TRL's trainer.

Not here: a row that cannot be a prompt at all (`prompt_rows`).
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase as Tokenizer

from taopd.errors import DataError
from taopd.models.prompt_rows import Prompt, read_prompt, render
from taopd.models.prompts import encode_prompts

LOOKED_AT = 32
"""Rows of a dataset that are encoded."""
REFERENCES = ("answer", "completion", "response", "solution", "output", "target")
"""Columns in which datasets keep what the student should write."""
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(['"])(role|from|content|value)\1\s*:""")
"""A list of messages that JSON or Python wrote as text."""
_LONG = 20
"""Characters from which an answer within a prompt is no chance."""
_MOST = 0.8
"""Share of the rows that must hold their answer: by chance some do, as in multiple choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is wrong with some prompts, and what to do."""

    text: str
    certain: bool
    """No run could mean it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """How a chat template marks turns."""

    markers: tuple[str, ...] = ()
    """Added tokens in a rendered conversation."""
    header: str = ""
    """Opens the assistant's turn, without an opened thought."""
    ends: frozenset[int] = frozenset()
    """Tokens that close a turn or a text."""

    @staticmethod
    def of(tokenizer: Tokenizer, template: str | None, stop_ids: Collection[int]) -> "Turns":
        """Those of a tokenizer's template, read off a short conversation."""
        ends = frozenset(stop_ids)
        if template is None and tokenizer.chat_template is None:
            return Turns(ends=ends)
        try:
            asked, opened = (
                str(
                    tokenizer.apply_chat_template(
                        [{"role": "user", "content": "x"}],
                        chat_template=template,
                        add_generation_prompt=header,
                        tokenize=False,
                    )
                )
                for header in (False, True)
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError):
            return Turns(ends=ends)
        # Turns are marked by tokens that no text holds; a marker in ordinary words could not be told apart.
        added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
        header = opened.removeprefix(asked).partition("<think>")[0]
        # An opened thought is no turn, though its marker may be a token of its own.
        turns = asked + header
        markers = [token for token in added if token in turns and token != tokenizer.bos_token]
        header = header.strip()
        # What closes the user's turn ends a text just as a stop does, if a header should follow it.
        last = max(markers, key=asked.rfind, default=None)
        if header and last is not None and asked.rstrip().endswith(last):
            ends |= {added[last]}
        return Turns(markers=tuple(markers), header=header, ends=ends)


def prompt_faults(
    tokenizer: Tokenizer,
    rows: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    tools: Sequence[Any] = (),
    template: str | None = None,
    stop_ids: Collection[int] = (),
) -> list[Fault]:
    """What is wrong with the rows as the student will read them, worst first.

    Args:
        options, tools, template: see `prompt_rows.render`.
        stop_ids: at which the student stops.

    Raises:
        DataError: a row that is no prompt.
    """
    prompts = [read_prompt(row, f"row {index}") for index, row in enumerate(rows)]
    shown: dict[str, Any] = {"options": options, "tools": tools, "template": template}
    found = faults_of_ends(tokenizer, prompts, stop_ids=stop_ids, **shown)
    found += _answers(rows, prompts)
    found += _not_shown(tokenizer, prompts, shown)
    return sorted(found, key=lambda fault: not fault.certain)


def faults_of_ends(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    options: Mapping[str, Any] | None = None,
    tools: Sequence[Any] = (),
    template: str | None = None,
    stop_ids: Collection[int] = (),
    begun: str = "the student reads what it is to write",
) -> list[Fault]:
    """What is wrong with both ends of prompts as they will be read.

    Args:
        options, tools, template, stop_ids: see `prompt_faults`.
        begun: what a prompt that ends inside the assistant's turn leads to.
    """
    ids = encode_prompts(tokenizer, prompts, options=options, tools=tools, template=template)
    turns = Turns.of(tokenizer, template, {*stop_ids, tokenizer.eos_token_id} - {None})
    found = _messages_as_text(prompts) + _at_the_start(tokenizer, ids)
    return found + _at_the_end(tokenizer, prompts, ids, turns, begun)


def faults_of_kinds(
    tokenizer: Tokenizer,
    students: Sequence[Prompt],
    teachers: Sequence[Prompt],
    *,
    template: str | None = None,
    stop_ids: Collection[int] = (),
) -> list[Fault]:
    """Teacher prompts of plain text beside messages: each alone is in order, and they end differently.

    Args:
        template, stop_ids: see `prompt_faults`.
    """
    turns = Turns.of(tokenizer, template, stop_ids)
    marks = [*turns.markers, *([turns.header] if turns.header else [])]
    plain = [
        own.content
        for student, own in zip(students, teachers, strict=True)
        if isinstance(own.content, str) and not isinstance(student.content, str)
        # Text that was rendered before it was stored has turns of its own.
        if not any(mark in own.content for mark in marks)
    ]
    if not plain:
        return []
    text = (
        f"{_count(plain, teachers)} of the teacher are plain text where the student's are messages: the "
        "teacher reads no turns, and scores the completion as what goes on with the text instead of as an "
        "answer. Give it messages with role and content, or set teacher_prompt_template."
    )
    return [Fault(text=text, certain=False)]


def _messages_as_text(prompts: Sequence[Prompt]) -> list[Fault]:
    texts = [prompt.content for prompt in prompts if isinstance(prompt.content, str)]
    if not (written := [text for text in texts if _MESSAGES.match(text)]):
        return []
    text = (
        f"{_count(written, prompts)} are messages as text ({written[0][:30]!r}), read without turns"
    )
    return [Fault(text=f"{text}: store them as lists of messages.", certain=False)]


def _at_the_start(tokenizer: Tokenizer, ids: Sequence[list[int]]) -> list[Fault]:
    # Only special tokens: two equal words may begin a text.
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    twice = [x[0] for x in ids if len(x) > 1 and x[0] == x[1] and x[0] in special]
    if not twice:
        return []
    token = tokenizer.convert_ids_to_tokens(twice[0])
    text = (
        f"{_count(twice, ids)} begin with {token} (BOS) twice: their text holds it and the tokenizer adds "
        "it again. Take it out of the text, or store messages and let the template write it."
    )
    return [Fault(text=text, certain=True)]


def _at_the_end(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    turns: Turns,
    leads_to: str,
) -> list[Fault]:
    closed, begun = [], []
    for prompt, tokens in zip(prompts, ids, strict=True):
        text = prompt.content if isinstance(prompt.content, str) else ""
        _, header, after = text.rpartition(turns.header) if turns.header else (text, "", "")
        # Text that was rendered before it was stored: a header must be its last marker.
        rendered = bool(turns.header) and any(marker in text for marker in turns.markers)
        other_turn = not header or any(marker in after for marker in turns.markers)
        start = re.sub(r"^\s*<think>\s*(</think>)?", "", after).strip()
        if _last(tokenizer, tokens) in turns.ends or (rendered and other_turn):
            closed.append(tokens)
        elif rendered and start:
            begun.append(start)
    found = []
    if closed:
        end = tokenizer.decode(closed[0])[-40:]
        text = (
            f"{_count(closed, ids)} do not end where the assistant begins to write, but with {end!r}: no "
            "header of the assistant follows. Store messages up to the last user turn and let the template "
            "write the header; take an end-of-sequence token out of the text."
        )
        found.append(Fault(text=text, certain=True))
    if begun:
        text = (
            f"{_count(begun, ids)} end inside the assistant's turn, after {begun[0][-40:]!r}: {leads_to}. "
            "Cut the text after the assistant's header."
        )
        # The same few words everywhere may be a beginning that is meant.
        found.append(Fault(text=text, certain=len(set(begun)) > 1 or len(begun) == 1))
    return found


def _last(tokenizer: Tokenizer, tokens: Sequence[int]) -> int | None:
    """The last token that is not white space."""
    return next((index for index in reversed(tokens) if tokenizer.decode([index]).strip()), None)


def _answers(rows: Sequence[Any], prompts: Sequence[Prompt]) -> list[Fault]:
    """Rows that hold what their own answer column says."""
    for column in REFERENCES:
        held = known = 0
        for row, prompt in zip(rows, prompts, strict=True):
            answer = _plain(row.get(column) if isinstance(row, Mapping) else None)
            if answer:
                known += 1
                held += _holds(prompt, answer)
        if held >= 2 and held >= _MOST * known:
            text = (
                f"{held} of {known} prompts hold the text of their {column!r} column, at the end or as a "
                "whole: the student copies instead of answering. Cut it out of the prompts."
            )
            return [Fault(text=text, certain=False)]
    return []


def _plain(value: Any) -> str:
    """An answer as text; the last message of a conversation."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    return str(value).strip() if isinstance(value, str | int | float) else ""


def _holds(prompt: Prompt, answer: str) -> bool:
    if isinstance(prompt.content, str):
        parts = [prompt.content]
    else:
        parts = [message["content"] for message in prompt.content]
        assistant = [m["content"] for m in prompt.content if m["role"] == "assistant"]
        if any(text.strip() == answer for text in assistant):
            return True
    if len(answer) >= _LONG:
        return any(answer in part for part in parts)
    return bool(re.search(rf"(?<!\w){re.escape(answer)}\W*$", parts[-1]))


def _not_shown(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], shown: Mapping[str, Any]
) -> list[Fault]:
    """What rows bring along and the template does not print."""
    source = shown["template"] or tokenizer.chat_template
    source = source if isinstance(source, str) else json.dumps(source)
    changes: dict[str, Callable[[Prompt], Prompt]] = {
        "tools": lambda prompt: replace(prompt, tools=None),
        "tool_calls of their messages": _without_calls,
    }
    lost: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        names = [
            name for name in prompt.options if not re.search(rf"\b{re.escape(name)}\b", source)
        ]
        for what, change in changes.items():
            other = change(prompt)
            if other != prompt and _same(tokenizer, prompt, other, shown):
                names.append(what)
        # Compared as rendered: a template may name what it does not print.
        for name in names:
            lost.setdefault(name, []).append(prompt)
    return [
        Fault(
            text=f"The {name} of {_count(rows, prompts)} have no effect: the chat template does not use "
            "them, or the prompt is plain text. Take a template that does, or drop them.",
            certain=False,
        )
        for name, rows in lost.items()
    ]


def _same(tokenizer: Tokenizer, one: Prompt, other: Prompt, shown: Mapping[str, Any]) -> bool:
    try:
        return render(tokenizer, one, **shown) == render(tokenizer, other, **shown)
    except DataError:  # a template that cannot do without
        return False


def _without_calls(prompt: Prompt) -> Prompt:
    if isinstance(prompt.content, str):
        return prompt
    kept = [{k: v for k, v in message.items() if k != "tool_calls"} for message in prompt.content]
    return replace(prompt, content=kept)


def _count(some: Sequence[Any], everything: Sequence[Any]) -> str:
    return f"{len(some)} of {len(everything)} prompts"
