"""What the headers of a server's answer say: how it is compressed, and when to ask again."""

import time
import zlib
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime

from taopd.errors import TeacherError

_PIECE = 1 << 16
"""Bytes that are unpacked at a time."""


def unpacker(coding: str) -> Callable[[bytes], Iterator[bytes]]:
    """The pieces, of bounded size, that a chunk of a compressed answer unpacks to."""
    # Names of codings have no case, and gzip has an older one. [RFC 9110, section 8.4.1]
    known = coding.strip().lower()
    if known in ("", "identity"):
        return lambda chunk: iter([chunk])
    if known not in ("gzip", "x-gzip", "deflate"):
        raise TeacherError(f"an answer compressed with {coding}, which was not asked for")
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)

    def unpack(chunk: bytes) -> Iterator[bytes]:
        while chunk and not decoder.eof:
            yield decoder.decompress(chunk, _PIECE)
            chunk = decoder.unconsumed_tail

    return unpack


def seconds_of(header: str | None) -> float:
    """A Retry-After, in seconds or as a date; 0 for none and for what cannot be read."""
    if header is None:
        return 0.0
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0
