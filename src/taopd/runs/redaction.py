"""Secrets taken out of what is written or shown: settings, command lines, addresses, messages.

What counts: the value under a name that says so (hub_token, api_key, password; not eos_token or max_tokens),
user and password in a URL, and words of the forms that hubs and services give out. Text of models and data
is never touched.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"
SECRET_NAME = re.compile(
    r"(^|[-_.])((hub|hf|access|auth|bearer|private|api|session|wandb)[-_]?(token|key)s?)$|^token$"
    r"|secret|passw|credential",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_WORD = re.compile(r"\b(hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}")


def redact(text: str) -> str:
    """Text without the user part of URLs and without words that look like tokens.

    Example:
        >>> redact("http://me:pw@host:1/v1 refuses")
        'http://***@host:1/v1 refuses'
    """
    return _WORD.sub(HIDDEN, _IN_URL.sub(HIDDEN, text))


def redact_document(value: Any, name: str = "") -> Any:
    """Plain values of settings, those under secret names hidden, all text redacted."""
    if isinstance(value, dict):
        return {key: redact_document(held, str(key)) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_document(held, name) for held in value]
    if isinstance(value, str):
        return HIDDEN if value and SECRET_NAME.search(name) else redact(value)
    return value


def redact_command(arguments: Sequence[str]) -> list[str]:
    """A command line, the values of secret flags hidden.

    Example:
        >>> redact_command(["taopd", "--hub_token", "x", "--eos_token", "y"])
        ['taopd', '--hub_token', '***', '--eos_token', 'y']
    """
    cleaned: list[str] = []
    hide_next = False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        secret = flag.startswith("--") and SECRET_NAME.search(flag[2:]) is not None
        if hide_next and not argument.startswith("--"):
            cleaned.append(HIDDEN)
        else:
            cleaned.append(f"{flag}={HIDDEN}" if secret and equals else redact(argument))
        hide_next = secret and not equals
    return cleaned


class RedactingFormatter(logging.Formatter):
    """Log lines without secrets, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted line, redacted."""
        return redact(super().format(record))
