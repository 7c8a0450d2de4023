"""Readable, escaped text of tokens and prompts: text of models is data and must not act or hide.

`visible` replaces what a reader cannot see or what moves other text (controls, bidirectional marks,
zero-width characters, odd spaces) by a sign or by its code point. `readable` turns vocabulary entries
into the text they stand for, with byte-level alphabets and SentencePiece's marks decoded. `embed` is
JSON that cannot leave the script element it is put in.
"""

import html
import json
import re
import unicodedata
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any

MAX_PIECE = 160
"""Characters shown of one token; degenerate tokenizers have longer ones."""
MAX_MARKS = 4
"""Combining marks on one letter that are drawn; more would cover the lines around them."""
_SIGNS = {"\n": "⏎\n", "\t": "⇥\t", "\r": "␍", "\x7f": "␡"}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def visible(text: str) -> str:
    """The text with every character visible and none that reorders its neighbours.

    Example:
        >>> visible("a\\u202eb\\x00")
        'a⟨U+202E⟩b␀'
    """
    if text.isascii() and text.isprintable():
        return text
    shown, marks = [], 0
    for character in text:
        marks = marks + 1 if unicodedata.category(character)[0] == "M" else 0
        if marks > MAX_MARKS:
            shown.append(f"⟨U+{ord(character):04X}⟩")
        elif marks and not shown:
            shown.append(f"◌{character}")
        else:
            shown.append(_sign(character))
    return "".join(shown)


def _sign(character: str) -> str:
    if character == " " or (character.isprintable() and ord(character) < 0x300):
        return character
    if character in _SIGNS:
        return _SIGNS[character]
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    category = unicodedata.category(character)
    if category[0] in "CZ":
        return f"⟨U+{ord(character):04X}⟩"
    return character


def escape(value: Any) -> str:
    """A value as HTML text or attribute: visible, and inert."""
    return html.escape(visible(str(value)), quote=True)


def embed(obj: Any) -> str:
    """JSON for the inside of a script element: without `<`, `>`, `&`, and in ASCII.

    Example:
        >>> embed("</script><!--")
        '"\\\\u003c/script\\\\u003e\\\\u003c!--"'
    """
    text = json.dumps(obj, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def tokenizer_kind(tokens: Iterable[str]) -> str:
    """How a vocabulary writes text, from its entries: "bytes", "sentencepiece" or "words"."""
    marked = False
    for token in tokens:
        if "Ġ" in token or "Ċ" in token:
            return "bytes"
        marked = marked or "▁" in token or bool(_BYTE_TOKEN.fullmatch(token))
    return "sentencepiece" if marked else "words"


@lru_cache(maxsize=2**18)
def readable(token: str | None, kind: str) -> str:
    """The text that a vocabulary entry stands for, visible; half a character as its bytes in hex.

    Words of a vocabulary without marks are followed by a space, as their tokenizer joins them.

    Example:
        >>> readable("Ġthe", "bytes"), readable("▁the", "sentencepiece"), readable("âĢ", "bytes")
        (' the', ' the', '⟨E2 80⟩')
    """
    if token is None:
        return "⟨no such id⟩"
    text = token
    if kind == "bytes":
        text = _from_bytes(token)
    elif kind == "sentencepiece":
        match = _BYTE_TOKEN.fullmatch(token)
        text = _decode(bytes([int(match[1], 16)])) if match else token.replace("▁", " ")
    elif not token.isspace():
        text = f"{token} "
    shown = visible(text)
    if len(shown) > MAX_PIECE:
        shown = f"{shown[:MAX_PIECE]}…⟨{len(shown) - MAX_PIECE} more characters⟩"
    return shown or "⟨empty⟩"


def shortened(name: str, most: int) -> str:
    """A name in at most so many characters, cut in its middle: names of arms often differ at their end.

    Example:
        >>> shortened("my_package.scores:sharp, budget 0.05", 20)
        'my_packag…udget 0.05'
    """
    if len(name) <= most:
        return name
    tail = most // 2
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"


def shared(texts: Collection[str]) -> str:
    """The longest beginning that all have."""
    # What the first and the last in order share, all between them share too.
    low, high = min(texts), max(texts)
    pairs = enumerate(zip(low, high, strict=False))
    return low[: next((at for at, (a, b) in pairs if a != b), len(low))]


def plain(tokens: Iterable[str | None], kind: str) -> str:
    """The text of a completion as its tokenizer decodes it: what is graded, not what is shown.

    Example:
        >>> plain(["Ã", "¶", "ĠĊ"], "bytes")
        'ö \\n'
    """
    if kind == "words":
        return " ".join(token for token in tokens if token)
    parts = []
    for token in tokens:
        if kind == "bytes" and token and all(character in _BYTES for character in token):
            parts.append(bytes(_BYTES[character] for character in token))
        elif kind == "sentencepiece" and token and (match := _BYTE_TOKEN.fullmatch(token)):
            parts.append(bytes([int(match[1], 16)]))
        else:
            text = (token or "").replace("▁", " ") if kind == "sentencepiece" else token or ""
            parts.append(text.encode(errors="replace"))
    return b"".join(parts).decode(errors="replace")


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of GPT-2's byte-level vocabularies, and the byte of each."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    missing = [byte for byte in range(256) if byte not in table.values()]
    return table | {chr(256 + index): byte for index, byte in enumerate(missing)}


_BYTES = _byte_alphabet()


def _from_bytes(token: str) -> str:
    if not all(character in _BYTES for character in token):
        return token  # A special token is written as it is.
    return _decode(bytes(_BYTES[character] for character in token))


def _decode(raw: bytes) -> str:
    """UTF-8, with what is no whole character as ⟨E2 80⟩."""
    text = raw.decode("utf-8", errors="surrogateescape")
    return re.sub(
        "[\udc80-\udcff]+",
        lambda match: f"⟨{' '.join(f'{ord(byte) - 0xDC00:02X}' for byte in match[0])}⟩",
        text,
    )


_CLASSES = (
    ("number", re.compile(r"[\d.,]*\d[\d.,]*")),
    ("word", re.compile(r"[^\W\d_]+(['’-][^\W\d_]+)*", re.UNICODE)),
    ("word with digits", re.compile(r"\w+", re.UNICODE)),
    ("special", re.compile(r"<[^\s<>]+>|<\|[^\s]*\|>|\[[A-Z]+\]")),
    ("operator", re.compile(r"[-+*/=<>^%×÷·±≤≥≠≈∑∫√]+")),
    ("punctuation", re.compile(r"[^\w\s]+", re.UNICODE)),
)


def token_class(text: str) -> str:
    """A coarse class of a readable token, by what it looks like.

    Example:
        >>> [token_class(text) for text in (" 12", " the", "s3 ", "⏎\\n", "<eos> ", "=")]
        ['number', 'word', 'word with digits', 'white space', 'special', 'operator']
    """
    bare = text.replace("⏎", "").replace("⇥", "").strip()
    if not bare:
        return "white space"
    for name, pattern in _CLASSES:
        if pattern.fullmatch(bare):
            return name
    return "mixed"
