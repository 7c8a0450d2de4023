"""Lengths of prompts in tokens, without transformers and torch: what `taopd plan` needs of a dataset.

Loading a tokenizer through transformers takes 3.5 s of CPU, most of it imports. The usual case needs none of
that: a parquet file of text or of messages with role and content, and a `tokenizer.json`. Whatever is not
certain to give the same count is left to `prompts.encode_prompts` (None), errors included.
"""

import json
from pathlib import Path
from typing import Any

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Tokenizers that are their `tokenizer.json`; other classes may add tokens of their own around a text."""
_UNUSUAL = ("generation %", "tojson", "strftime_now", "mask_token")
"""In a chat template: what only transformers' environment knows."""


OTHER_COLUMNS = frozenset(
    {
        *("messages", "conversations", "conversation", "tools", "chat_template_kwargs"),
        *("image", "images", "video", "videos", "audio", "audios", "teacher_prompt"),
    }
)
"""That make a prompt too, or are refused: a set with one of them is no usual case."""


def longest_prompt(model: Path, dataset: Path, split: str, *, most: int) -> int | None:
    """Tokens of the longest of about `most` prompts, evenly over the file; None: not a usual case."""
    rows = _prompts(dataset, split, most)
    if rows is None:
        return None
    tokenizer = _Tokenizer.read(model)
    return None if tokenizer is None else tokenizer.longest(rows)


class _Tokenizer:
    """A `tokenizer.json` and the chat template beside it."""

    def __init__(self, core: Any, settings: dict[str, Any], template: str | None) -> None:
        self._core, self._settings, self._template = core, settings, template

    @classmethod
    def read(cls, folder: Path) -> "_Tokenizer | None":
        """None: a file is missing or unusual."""
        from tokenizers import Tokenizer

        if (folder / "additional_chat_templates").exists():
            return None
        try:
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            core = Tokenizer.from_file(str(folder / "tokenizer.json"))
            file = folder / "chat_template.jinja"
            beside = file.read_text(encoding="utf-8") if file.exists() else None
        # The library below raises bare exceptions; the usual path has the right message for every one.
        except Exception:
            return None
        if not isinstance(settings, dict):
            return None
        template = beside or settings.get("chat_template")
        if template is not None and not isinstance(template, str):
            return None
        # A file may ask for padding, which would make all prompts as long as the longest.
        core.no_padding()
        core.no_truncation()
        return cls(core, settings, template)

    def longest(self, rows: list[Any]) -> int | None:
        """None: not a usual case."""
        plain = all(isinstance(row, str) for row in rows)
        if plain and self._settings.get("tokenizer_class") not in _PLAIN_CLASSES:
            return None
        texts = rows if plain else self._rendered(rows)
        if texts is None:
            return None
        # A template writes the special tokens itself.
        found = self._core.encode_batch(texts, add_special_tokens=plain)
        return max(len(each.ids) for each in found)

    def _rendered(self, rows: list[Any]) -> list[str] | None:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = self._template
        if template is None or any(word in template for word in _UNUSUAL):
            return None
        names = {name: self._settings.get(name) for name in _NAMES if name in self._settings}
        if any(not isinstance(text, str) for text in names.values()):
            return None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        try:
            made = environment.from_string(template)
            return [
                made.render(
                    messages=row, tools=None, documents=None, add_generation_prompt=True, **names
                )
                for row in rows
            ]
        except (jinja2.TemplateError, ArithmeticError, LookupError, ValueError, TypeError):
            return None


def _prompts(file: Path, split: str, most: int) -> list[Any] | None:
    """About `most` prompts of a split, evenly spread, as text or as messages."""
    if file.suffix.lower() != ".parquet" or not file.is_file():
        return None
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(file).names
        if "prompt" not in columns or OTHER_COLUMNS & set(columns):
            return None
        wanted = [name for name in ("prompt", "split") if name in columns]
        table = pyarrow.parquet.read_table(file, columns=wanted)
    except (OSError, pyarrow.ArrowException):
        return None
    rows = table.column("prompt").to_pylist()
    if "split" in columns:
        splits = table.column("split").to_pylist()
        rows = [row for row, name in zip(rows, splits, strict=True) if name == split]
    elif split != "train":
        return None
    rows = rows[:: max(1, len(rows) // most)]
    kind = _is_text if rows and isinstance(rows[0], str) else _is_messages
    return rows if rows and all(map(kind, rows)) else None


def _is_text(row: Any) -> bool:
    return isinstance(row, str) and bool(row.strip())


def _is_messages(row: Any) -> bool:
    """Messages with text alone, the last one not the answer."""
    return (
        isinstance(row, list)
        and bool(row)
        and all(
            isinstance(message, dict)
            and message.keys() == {"role", "content"}
            and message["role"] in ("system", "user", "assistant")
            and _is_text(message["content"])
            for message in row
        )
        and row[-1]["role"] == "user"
    )
