"""Tools of recipes/tools.yaml."""


def multiply(a: int, b: int) -> int:
    """
    Multiplies two whole numbers.

    Args:
        a: One number.
        b: The other.
    """
    return a * b


def add(a: int, b: int) -> int:
    """
    Adds two whole numbers.

    Args:
        a: One number.
        b: The other.
    """
    return a + b


TOOLS = [multiply, add]
