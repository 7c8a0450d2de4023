"""Documents that somebody else may have written: read once, their shape checked once, one message if not.

A shape is written as the document looks: `{"seed": WHOLE, "loss?": TEXT}` (? = may be absent, other keys are
free), `[NUMBER]`, `(WHOLE, NUMBER)` for a list of exactly these, `{...: TEXT}` for an object of anything.
What has passed can be read without a second thought; a reader checks no types of its own.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from taopd.errors import ConfigError, DataError

MOST_NODES = 100_000
"""Values of a YAML file with its aliases written out: a few lines of them can stand for billions."""
LIMIT = 1e30
"""What is larger is no measurement, and overflows where it is squared."""


class Leaf(NamedTuple):
    """A single value: what it must be in words, and the test."""

    words: str
    fits: Callable[[Any], bool]


class Maybe(NamedTuple):
    """A shape, or null."""

    shape: Any


class Some(NamedTuple):
    """A list of at least one."""

    shape: Any


def number(low: float = -LIMIT, high: float = LIMIT) -> Leaf:
    """A finite number in [low, high]; true and false are none."""
    inside = "" if high == LIMIT else f" from {low:g} to {high:g}"
    return Leaf(f"a number{inside}", lambda v: type(v) in (int, float) and low <= v <= high)


def whole(low: int = 0, high: int = 2**53) -> Leaf:
    """A whole number in [low, high]."""
    return Leaf(f"a whole number of at least {low}", lambda v: type(v) is int and low <= v <= high)


ANY = Leaf("anything", lambda v: True)
MARK = Leaf("true, false, 0 or 1", lambda v: type(v) in (bool, int) and v in (0, 1))
NUMBER, SHARE, WHOLE = number(), number(0.0, 1.0), whole()
TEXT = Leaf("text", lambda v: isinstance(v, str) and _encodes(v))
WORD = Leaf("text", lambda v: isinstance(v, str))
"""Text of a model's, lone surrogates and all: for what is made visible before it is shown."""


def fit(value: Any, shape: Any, place: str) -> None:
    """Check a value against a shape.

    Raises:
        DataError: at the first place that differs: which, what is expected, what is there.

    Example:
        >>> fit({"steps": [1, 2]}, {"steps": [WHOLE], "loss?": NUMBER}, "x.json")
    """
    if isinstance(shape, Maybe):
        if value is not None:
            fit(value, shape.shape, place)
        return
    if isinstance(shape, Leaf):
        if not shape.fits(value):
            raise DataError(f"{place}: expected {shape.words}, got {shown(value)}")
        return
    kind, words = (dict, "an object") if isinstance(shape, dict) else (list, "a list")
    if not isinstance(value, kind):
        raise DataError(f"{place}: expected {words}, got {shown(value)}")
    if ... in shape or isinstance(shape, (list, Some)):
        inner = shape[...] if isinstance(shape, dict) else shape[0]
        if isinstance(shape, Some) and not value:
            raise DataError(f"{place}: expected a list of at least one, got []")
        if _all_fit(value.values() if isinstance(value, dict) else value, inner):
            return
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [(shown(key), held, inner) for key, held in items]
    elif isinstance(shape, dict):
        names = {key.removesuffix("?"): key for key in shape}
        for name, key in names.items():
            if name == key and name not in value:
                raise DataError(f"{place}: {name!r} is missing")
        parts = [(name, value[name], shape[key]) for name, key in names.items() if name in value]
    elif len(value) != len(shape):
        raise DataError(f"{place}: expected {len(shape)} values, got {shown(value)}")
    else:
        parts = [(str(i), *pair) for i, pair in enumerate(zip(value, shape, strict=True))]
    for name, held, inner in parts:
        fit(held, inner, f"{place}, {name}" if kind is dict else f"{place}[{name}]")


def _all_fit(values: Iterable[Any], shape: Any) -> bool:
    """Whether many values surely fit: plain ones, null or not, and lists of such.

    Logs hold millions; only where one does not fit is it worth the words that say which. False: look closer.
    """
    if isinstance(shape, Leaf):
        return all(map(shape.fits, values))
    if isinstance(shape, Maybe) and isinstance(shape.shape, Leaf):
        fits = shape.shape.fits
        return all(value is None or fits(value) for value in values)
    if type(shape) is list:
        return all(isinstance(value, list) and _all_fit(value, shape[0]) for value in values)
    return False


def shown(value: Any, most: int = 60) -> str:
    """A value for a message, cut to so many characters, in those that any terminal takes."""
    text = ascii(value) if not isinstance(value, (list, dict)) else type(value).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def read_document(path: Path, shape: Any = ANY) -> Any:
    """A JSON document of a given shape.

    Raises:
        DataError: unreadable, not JSON, nested too deeply, or of another shape.
    """
    document = parse_json(read_text(path), str(path))
    fit(document, shape, str(path))
    return document


def is_there(path: Path) -> bool:
    """Whether a folder has a file of this name.

    Raises:
        DataError: what bears the name is no file, such as a folder, a pipe or a link that leads nowhere.
    """
    if path.is_file():
        return True
    if os.path.lexists(path):
        what = "a folder" if path.is_dir() else "no file that can be read"
        raise DataError(f"{path} is {what}; a file of this name is expected: move it away")
    return False


def read_text(path: Path, *, torn: bool = False) -> str:
    """The text of a UTF-8 file, without the byte order mark that Windows writes.

    Args:
        torn: the last line may end within a character, as a kill leaves it, and is then left out.

    Raises:
        DataError: it cannot be read, or is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        # Other bytes that are no text are no trace of a kill.
        if torn and error.reason == "unexpected end of data":
            return error.object[: error.object.rfind(b"\n") + 1].decode("utf-8")
        raise DataError(f"{path} is no text: {error}") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DataError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error


def parse_json(text: str, place: str) -> Any:
    """A JSON text; `place` opens the message.

    Raises:
        DataError: not JSON, nested too deeply, or a key that stands twice, of which Python takes the last.
    """
    try:
        return json.loads(text, object_pairs_hook=keys_once)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{place}: not JSON (nested too deeply)") from error
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error})") from error


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON from its pairs, for a decoder's `object_pairs_hook`.

    Raises:
        DataError: a key that stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"the key {twice!r} stands twice: remove one")
    return found


class _Strict(yaml.SafeLoader):
    """Refuses what would be read otherwise than meant, without a word: a key that stands twice in one
    mapping, of which the second wins; 012, which is 10 in YAML, and 1:30, which is 90.
    """

    def construct_yaml_int(self, node: Any) -> int:
        value = int(super().construct_yaml_int(node))
        digits = node.value.replace("_", "")
        if digits.lstrip("+-").isdecimal() and int(digits) != value:
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: {node.value} is octal in YAML, {value}: write "
                f"{int(digits)} or {value}"
            )
        if ":" in digits:
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: {node.value} is a number to base 60 in YAML, {value}: "
                f"write {value}, or put a text between quotes"
            )
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        first: dict[Any, Any] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            # Merged mappings ("<<") may be given twice, and are what a key may override.
            if not isinstance(key.value, str) or key.value == "<<":
                continue
            if first.setdefault(key.value, key) is not key:
                lines = [each.start_mark.line + 1 for each in (first[key.value], key)]
                where = "in lines {} and {}" if lines[0] != lines[1] else "in line {}"
                raise yaml.YAMLError(
                    f"the key {key.value!r} stands twice, {where.format(*lines)}: remove one"
                )
        return super().construct_mapping(node, deep)


_Strict.add_constructor("tag:yaml.org,2002:int", _Strict.construct_yaml_int)
_VARIABLE = re.compile(r"\$\{[A-Za-z_]\w*\}|\$[A-Za-z_]\w*(?=/|$)")


def read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    """A YAML mapping, by the safe loader: no tags that make Python objects.

    Raises:
        ConfigError: unreadable, not YAML, not a mapping, or one whose aliases unfold without end.
    """
    try:
        loaded = _parsed(Path(path).read_text(encoding="utf-8"), Path(path).suffix)
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        at = f"byte {error.object[error.start]:#04x} in position {error.start}"
        raise ConfigError(
            f"{path} is not YAML: it is no text in UTF-8 ({at}); save it in this encoding"
        ) from error
    # The loader's constructors answer an impossible date or number with whatever Python raised.
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        RecursionError,
    ) as error:
        told = str(error).replace('in "<unicode string>", ', "in ")
        raise ConfigError(f"{path} is not YAML: {told}") from error
    if not isinstance(loaded, dict):
        kinds: dict[Any, str] = {type(None): "nothing", list: "a list", str: "a text"}
        found = kinds.get(type(loaded), shown(loaded))
        raise ConfigError(f"{path} must hold a YAML mapping (key: value), and holds {found}")
    _check_yaml(loaded, str(path))
    return loaded


def _parsed(text: str, suffix: str) -> Any:
    if suffix == ".json":  # YAML but for its escapes beyond 16 bits; a comment in it is YAML alone
        with suppress(DataError):
            return parse_json(text, "")
    return _Strict(text).get_single_data()  # a subclass of the safe loader


def _check_yaml(loaded: dict, place: str) -> None:
    """Names are text; text can be encoded and has no NUL; aliases unfold to a bounded number of values."""
    open_: list[tuple[Any, int, str]] = [(loaded, 0, "")]
    count = 0
    while open_:
        value, depth, name = open_.pop()
        count += 1
        if count > MOST_NODES or depth > 100:
            raise ConfigError(f"{place}: too many values, or aliases that contain themselves")
        if isinstance(value, str):
            if "\0" in value or not _encodes(value):
                raise ConfigError(f"{place}: {shown(value)} holds a character that no text has")
            if (variable := _VARIABLE.search(value)) is not None:
                raise ConfigError(
                    f"{place}: {shown(value)} holds {variable.group()}: variables of the shell are not "
                    "replaced in files; write the value, or give the setting as a flag"
                )
        elif isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ConfigError(f"{place}: the key {shown(key)} is not text; quote it")
            open_ += [(key, depth + 1, name) for key in value]
            open_ += [(part, depth + 1, f"{key}: ") for key, part in value.items()]
        elif isinstance(value, (list, set, tuple)):
            open_ += [(part, depth + 1, name) for part in value]
        elif isinstance(value, (int, float)) and not abs(value) < 2**63 and abs(value) != math.inf:
            raise ConfigError(f"{place}: {name}{shown(value)} is no number below 2**63")


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
