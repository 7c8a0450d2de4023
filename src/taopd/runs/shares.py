"""Shares in per cent, and differences, as a person reads them: rounded, but never to nothing."""

_EXACT = 1e-9
"""Below this a share is as good as 0, or as 1: the rounding of a mean."""
_MORE = 2
"""Places that are added before only a bound is given."""


def per_cent(share: float, digits: int = 1) -> str:
    """A share in per cent, with more places, or as a bound, where it would read 0 or 100 and is neither.

    Args:
        digits: places where that does not happen.

    Example:
        >>> per_cent(0.05), per_cent(0.0004), per_cent(0.996, 0), per_cent(1.0), per_cent(1e-7)
        ('5.0', '0.04', '99.6', '100.0', '<0.001')
    """
    whole = f"{100 * share:.{digits}f}"
    if min(abs(share), abs(1.0 - share)) < _EXACT:
        return whole
    texts = (f"{100 * share:.{places}f}" for places in range(digits, digits + _MORE + 1))
    least = 10.0 ** -(digits + _MORE)
    bound = f"<{least:g}" if share < 0.5 else f">{100 - least:g}"
    return next((text for text in texts if float(text) not in (0.0, 100.0)), bound)


def signed(value: float, digits: int) -> str:
    """A difference with its sign; two digits of what would read 0 and is not.

    Example:
        >>> signed(0.25, 4), signed(-3e-6, 4), signed(0.0, 4)
        ('+0.2500', '-3e-06', '+0.0000')
    """
    text = f"{value:+.{digits}f}"
    return f"{value:+.2g}" if value and float(text) == 0.0 else text
