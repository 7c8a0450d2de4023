"""Functions that tests name by a dotted path, as a setting does."""


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


TOOLS = [multiply]
NUMBERS = [1, 2]
UNDOCUMENTED = [undocumented]
