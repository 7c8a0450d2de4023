"""Functions that tests name by a dotted path, as a setting does."""

from functools import partial


def multiply(a: int, b: int) -> int:
    """
    Multiplies two numbers.

    Args:
        a: One number.
        b: The other.
    """
    return a * b


def undocumented(a):
    return a


async def waits(a: int) -> int:
    """
    Gives a number back, later.

    Args:
        a: A number.
    """
    return a


TOOLS = [multiply]
ASYNC = [waits]
TWICE = [multiply, multiply]
NAMELESS = [partial(multiply, b=2)]
NUMBERS = [1, 2]
UNDOCUMENTED = [undocumented]
