r"""Numbers in a text, written as math-verify reads them.

What: `plainly` for completions and answers, `apart` for completions, `bare_latex` for formulas without
dollars. Not here: what is compared with what (`grading`).
"""

import re
import unicodedata
from decimal import Decimal

LATEX = re.compile(r"\\|\$|\^\{")
DOLLARS = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")
"""What math-verify finds LaTeX by; the dollar of a price (\\$10) is none."""
_MIXED = re.compile(r"(?<![\w.,/+*^-])(-?)(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\w/])")
_POWER_OF_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\^)")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d{1,3})(?![\w.]*\w)")
_FULL_STOP = re.compile(r"(?<=\d)\.(?=\s|$)")
_THIN_SPACE = re.compile(r"(?<=\d)(?:\\,|\{,\})(?=\d{3}(?!\d))")
_NO_ZERO = re.compile(r"(?<![\w.])\.(?=\d)")
_RAISED = re.compile(r"(?<=[\d)])[⁰¹²³⁴-⁹]+")
_SIGNS = str.maketrans(
    "\N{MINUS SIGN}\N{MULTIPLICATION SIGN}÷\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}",
    "-*/   ",
)
_FRACTION = re.compile("[¼-¾⅐-⅞]")
_TAG = re.compile(r"</?[A-Za-z]\w*(?:\s+[\w-]+=[^<>]*)?\s*/?>|<\|[^<>|]*\|>")
_GLUED = re.compile(
    r"(?:[-=]>|[→~≈#“„«`\N{EM DASH}]|(?<![\d\s]):|(?<!\w)\*(?=[-+\d.,/]+\*)|[A-Z]\$|(?<=[A-Za-z])\."
    r"|(?<=[A-Za-z:] )\+)(?=[-+]?\.?\d)"
    r"|(?<=\d)[`”“»]"
    r"|(?:(?<=[:=] )|(?<=\bis ))(?:\((?=[-+]?[\d.,]+\))|\[(?=[-+]?[\d.,]+\])|'(?=[-+]?[\d.,]+'))"
)
"""What stands at a number without a space, so that math-verify does not see the number."""
_RAISED_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_BARE = re.compile(
    r"(?<![\w\\}.^])-?(?:(?:\d+(?:,\d{3})*(?:\.\d+)?|\\[dt]?frac(?:\{[^{}]*\}\{[^{}]*\}|\d\d)"
    r"|\\sqrt(?:\[\d+\])?\{[^{}]*\}|\\(?:pi|times|cdot)(?![a-zA-Z])|\^(?:\{[^{}]*\}|-?\d+)"
    r"|[-+*/](?=[ ]?[\d\\])) ?)++(?=\D*\Z)"
)
"""The last numbers of a text with LaTeX between them; of 2\\sqrt{3} math-verify would read the 2."""
_PRICE = re.compile(r"\\\$(?= ?\.?\d)")


def plainly(text: str) -> str:
    """Numbers written as math-verify reads them.

    It takes 2e3, 2 1/2, 2½, 10² and 53/5 before a full stop for other numbers, and knows no minus sign
    but the hyphen.
    """
    text = _FRACTION.sub(_spelled, text)
    text = _RAISED.sub(lambda m: f"^{m.group().translate(_RAISED_DIGITS)}", text.translate(_SIGNS))
    text = _FULL_STOP.sub("", _THIN_SPACE.sub("", _POWER_OF_TEN.sub("*", text)))
    text = _NO_ZERO.sub("0.", text)
    text = _SCIENTIFIC.sub(lambda m: f"{Decimal(m.group()):f}", text)
    return _MIXED.sub(_improper, text)


def bare_latex(text: str) -> str:
    r"""LaTeX without dollars at the end of a text, and prices (\$5), as math-verify reads them.

    Example:
        >>> bare_latex(r"It is 2 \times 10^{-3}."), bare_latex(r"It costs \$5.")
        ('It is $2 \\times 10^{-3}$.', 'It costs 5.')
    """
    if DOLLARS.search(text):
        return text
    text = _PRICE.sub("", text)
    found = _BARE.search(text)
    if found is None or not LATEX.search(found.group()):
        return text
    return f"{text[: found.start()]}${found.group().rstrip()}${text[found.end() :]}"


def _improper(mixed: re.Match[str]) -> str:
    """2 1/2 as 5/2. In "in 2024 3/2" the two are no mixed number."""
    sign, whole, top, bottom = mixed[1], int(mixed[2]), int(mixed[3]), int(mixed[4])
    return f"{sign}{whole * bottom + top}/{bottom}" if top < bottom else mixed[0]


def _spelled(fraction: re.Match[str]) -> str:
    return " " + unicodedata.normalize("NFKC", fraction[0]).replace("\N{FRACTION SLASH}", "/")


def apart(text: str) -> str:
    """A completion with spaces where tags, arrows and quotes stand at its numbers.

    Example:
        >>> apart("<b>12</b> ->7"), apart("3:30")
        (' 12    7', '3:30')
    """
    return _GLUED.sub(" ", _TAG.sub(" ", text))
