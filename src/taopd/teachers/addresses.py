"""What an address of a teacher's server may look like; nothing is asked."""

from typing import Any
from urllib.parse import urlsplit

from taopd.errors import ConfigError, require
from taopd.teachers.transport import KEY, server_of

_PORTS = {"http": 80, "https": 443}


def check_addresses(urls: Any) -> None:
    """Refuse a value of `teacher_url` that is neither an address nor several of them.

    Raises:
        ConfigError: another type, one address twice, or see `check_address`.
    """
    if isinstance(urls, str):
        check_address(urls)
        return
    texts = isinstance(urls, list) and all(isinstance(url, str) for url in urls)
    require(bool(urls) and texts, "teacher_url", urls, "a URL, or a list of them")
    for url in urls:
        check_address(url)
    servers = {_place(url) for url in urls}
    require(len(servers) == len(urls), "teacher_url", urls, "without the same URL twice")


def _place(url: str) -> tuple[Any, ...]:
    """What two addresses of one server have in common."""
    parts = urlsplit(server_of(url))
    return parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme], parts.path


def check_address(url: str) -> None:
    """Refuse what is no address of a server.

    Raises:
        ConfigError: not http or https, no host, a port that does not exist, or a password.
    """
    # First, and without the address: it would be in the message.
    if "@" in url:
        raise ConfigError(
            f"teacher_url holds a name or password, which logs would show: set {KEY} instead"
        )
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"teacher_url={url!r}: must begin with http:// or https://")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # how a bracket without its partner or a port of letters is answered
        host, port = None, None
    spaced = any(character.isspace() for character in url)
    if not host or port == 0 or spaced or parts.query or parts.fragment:
        raise ConfigError(
            f"teacher_url={url!r}: must be http://HOST:PORT, with a port from 1 to 65535"
        )
