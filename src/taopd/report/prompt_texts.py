"""Prompts as a reader wants them: without the words of the chat template that all of them share."""

from collections.abc import Sequence

LEAST = 12
"""Characters; a shorter beginning or end in common is no template, unless it holds a control token."""


def bare(prompts: Sequence[str]) -> tuple[list[str], str, str]:
    """Prompts without the beginning and the end that all share, and these two.

    Both are cut at the end of a line or of a control token, so that no word of a prompt goes with them; with
    fewer than three different prompts nobody can say what is shared.

    Example:
        >>> bare(["<u>1 + 1<end>", "<u>1 + 2<end>", "<u>2<end>"])
        (['1 + 1', '1 + 2', '2'], '<u>', '<end>')
    """
    if len(set(prompts)) < 3:
        return list(prompts), "", ""
    start = _shared(prompts)
    start = start[: max(start.rfind("\n"), start.rfind(">")) + 1]
    # A shared beginning leaves each prompt something of its own, and so must a shared end.
    rest = [prompt[len(start) :] for prompt in prompts]
    end = _shared([prompt[::-1] for prompt in rest])[::-1]
    cuts = [place for place in (end.find("\n"), end.find("<")) if place >= 0]
    end = end[min(cuts) :] if cuts else ""
    start, end = (part if len(part) >= LEAST or "<" in part else "" for part in (start, end))
    return [prompt[len(start) : len(prompt) - len(end)] for prompt in prompts], start, end


def _shared(texts: Sequence[str]) -> str:
    """The longest beginning that all have."""
    # What the first and the last in order share, all between them share too.
    low, high = min(texts), max(texts)
    size = next(
        (at for at, letter in enumerate(low) if at >= len(high) or letter != high[at]), len(low)
    )
    return low[:size]
