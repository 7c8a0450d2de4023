"""Selectors written as arithmetic on other selectors' scores: "0.5*teachability + 0.5*compatible".

Grammar: numbers, names of selectors, + - *, parentheses, `name(parameter=number)` for a selector with
parameters, and the functions

    soft_or(a, b, ...)     a + b - a b                        max, min     per token
    rank(a)                midrank in the batch, in [0, 1]    bellman(a, gamma=0.995)   look-ahead
    rank_and(a, b, ...)    product of ranks                   rank_or(a, b, ...)   soft OR of ranks

What a name means: the selector's score if it lies in [0, 1] by definition, otherwise that score
normalized over the batch as eq. 11 normalizes D; directly inside a `rank` function the score as it is,
since ranks need no scale and eq. 11 ties the upper twentieth. A selector with parameters that stands
alone is itself.

Nothing is evaluated as Python: the text is parsed with `ast`, each node is matched against this list,
and what is not on it is an error.

Source of rank fusion: IER, arXiv 2609.24432 (its OR and AND); soft OR: arXiv 2605.26844, eq. 16.
"""

import ast
import inspect
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial, reduce

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taopd.errors import ConfigError, NumericsError, suggest
from taopd.selectors.literature import bellman
from taopd.selectors.normalize import NormalizedView, normalized_view
from taopd.selectors.registry import SELECTORS, Selector, checked_scores
from taopd.signals import KNOWN_SIGNALS, TEACHER, SignalTable

MAX_LENGTH = 500
"""Characters of an expression; deeper nesting than this allows is a mistake."""

Term = Callable[[NormalizedView], Tensor | float]


def is_expression(text: str) -> bool:
    """Whether a selector's text is arithmetic and not a name or a path."""
    return re.search(r"[-+*/()<>=,]", text) is not None


def parse_expression(text: str) -> Selector:
    """The selector that an expression defines; its name is the expression.

    Raises:
        ConfigError: for anything outside the grammar, an unknown name, or a parameter out of range.
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"selector expression of {len(text)} characters; at most {MAX_LENGTH}")
    # Python's parser answers deep nesting with RecursionError or MemoryError.
    try:
        root = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = getattr(error, "msg", error)  # without the name of a file that is none
        raise ConfigError(f"selector {text!r} is not an expression: {why}") from error
    parser = _Parser(text)
    # A selector that stands alone keeps its own weights; a sum of scores has none.
    if isinstance(root, ast.Call) and not root.args and _called(root) in SELECTORS:
        selector = replace(parser.parametrized(root), name=text)
    else:
        term = parser.term(root)
        if not parser.used:
            raise ConfigError(f"selector {text!r} names no score.{suggest('', SELECTORS)}")
        needs = {need for selector in parser.used for need in selector.needs} | parser.needs
        # A rank is a place in the whole batch, which a process with a part of the rows does not know.
        local = not parser.ranks and all(used.local for used in parser.used)
        scores = partial(_evaluate, term)
        selector = Selector(name=text, scores=scores, needs=tuple(sorted(needs)), local=local)
    _probe(selector)
    return selector


def midrank(values: Float[Tensor, " N"], population: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Rank in the population scaled to [0, 1], equal values sharing their mean rank; 0 outside.

    Example:
        >>> midrank(torch.tensor([3.0, 1.0, 3.0]), torch.tensor([True, True, True]))
        tensor([0.7500, 0.0000, 0.7500], dtype=torch.float64)
    """
    ranks = torch.zeros(values.shape, dtype=torch.float64, device=values.device)
    inside = values[population]
    if inside.numel() == 0:
        return ranks
    _, group, counts = inside.unique(return_inverse=True, return_counts=True)
    # Equal values share the middle of their ranks, so that position decides nothing here.
    first = counts.cumsum(0) - counts
    middle = first.double() + (counts.double() - 1.0) / 2.0
    ranks[population] = middle[group] / max(1, inside.shape[0] - 1)
    return ranks


def soft_or(a: Tensor | float, b: Tensor | float) -> Tensor | float:
    """a + b - a b. [eq. 16]"""
    return a + b - a * b


def _evaluate(term: Term, view: NormalizedView) -> Tensor:
    """A term's value at every token, also where it is one number."""
    value = term(view)
    return value if isinstance(value, Tensor) else torch.full_like(view.h, value)


def _ranked(term: Term, view: NormalizedView) -> Tensor:
    return midrank(_evaluate(term, view), view.table.valid)


_OPERATORS: dict[type[ast.operator], Callable] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
}
_FOLDS: dict[str, Callable] = {
    "soft_or": soft_or,
    "max": torch.maximum,
    "min": torch.minimum,
    "rank_or": soft_or,
    "rank_and": lambda a, b: a * b,
    "rank": soft_or,  # of one score, which a fold leaves as it is
}
FUNCTIONS = (*_FOLDS, "bellman")


class _Parser:
    """Turns nodes into functions of a view; collects the selectors it meets."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.used: list[Selector] = []
        self.needs: set[str] = set()
        self.ranks = False

    def term(self, node: ast.expr, *, raw: bool = False) -> Term:
        """`raw`: a name stands for its score as it is."""
        if isinstance(node, ast.Constant):
            number = self._number(node)
            return lambda view: number
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            sign, inner = (-1.0 if isinstance(node.op, ast.USub) else 1.0), self.term(node.operand)
            return lambda view: sign * inner(view)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            operator = _OPERATORS[type(node.op)]
            left, right = self.term(node.left), self.term(node.right)
            return lambda view: operator(left(view), right(view))
        if isinstance(node, ast.Name):
            return self._score(self._selector(node.id), raw)
        if isinstance(node, ast.Call):
            name = _called(node)
            # `bellman` is both: the function when it is given a score, else the selector.
            if name in FUNCTIONS and (node.args or name not in SELECTORS):
                return self._function(name, node)
            return self._score(self.parametrized(node), raw)
        raise self._error(
            f"{ast.unparse(node)!r} is not allowed; use numbers, names, + - * and "
            f"{', '.join(FUNCTIONS)}"
        )

    def parametrized(self, node: ast.Call) -> Selector:
        """A selector with some of its keyword-only numbers set."""
        selector = self._selector(_called(node))
        if node.args:
            raise self._error(f"parameters of {selector.name} are given by name")
        values: dict[str, float] = {}
        for keyword in node.keywords:
            if (parameter := keyword.arg or "**") in values:
                raise self._error(f"{parameter} is given twice")
            values[parameter] = self._number(keyword.value)
        signature = inspect.signature(selector.scores).parameters.values()
        known = [p.name for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY]
        for name in values:
            if name not in known:
                hint = suggest(name, known) if known else " It has none."
                raise self._error(f"{selector.name} has no parameter {name!r}.{hint}")
        return replace(selector, scores=partial(selector.scores, **values))

    def _function(self, name: str, node: ast.Call) -> Term:
        if name == "bellman":
            return self._bellman(node)
        if node.keywords:
            raise self._error(f"{name} has no parameters")
        ranks = name.startswith("rank")
        self.ranks |= ranks
        terms = [self.term(argument, raw=ranks) for argument in node.args]
        if len(terms) < (1 if name == "rank" else 2) or (name == "rank" and len(terms) > 1):
            raise self._error(f"{name} takes {'one score' if name == 'rank' else 'two or more'}")
        value = _ranked if ranks else _evaluate
        return lambda view: reduce(_FOLDS[name], [value(term, view) for term in terms])

    def _bellman(self, node: ast.Call) -> Term:
        if len(node.args) != 1 or [k.arg for k in node.keywords] not in ([], ["gamma"]):
            raise self._error("bellman takes one score and gamma=NUMBER")
        options = {str(k.arg): self._number(k.value) for k in node.keywords}
        inner = self.term(node.args[0])
        self.needs |= {"student_logprobs", "teacher_logprobs"}
        return lambda view: bellman(_evaluate(inner, view), view, **options)

    def _selector(self, name: str) -> Selector:
        if name not in SELECTORS:
            raise self._error(f"{name!r} is unknown.{suggest(name, {*SELECTORS, *FUNCTIONS})}")
        if not SELECTORS[name].plain:
            hint = "; write 1 - teachability" if name == "bottom" else ""
            raise self._error(f"{name!r} is more than a score (candidates or order){hint}")
        return SELECTORS[name]

    def _score(self, selector: Selector, raw: bool) -> Term:
        self.used.append(selector)

        def score(view: NormalizedView) -> Tensor:
            # As where it stands alone: arithmetic would spread one number over all rows, and a scale would
            # make 0 of a NaN.
            return checked_scores(selector, view, view.rules)

        # Scores of another unit (nats, positions) would drown those in [0, 1] in a sum.
        if raw or selector.bounded:
            return score
        return lambda view: view.normalized(score(view))

    def _number(self, node: ast.expr) -> float:
        negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        inner = node.operand if isinstance(node, ast.UnaryOp) and negative else node
        value = inner.value if isinstance(inner, ast.Constant) else None
        # True is an int in Python, 1e999 parses as infinity, and an int may be larger than any float.
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        number = float(str(value)) if is_number else math.inf
        if not math.isfinite(number):
            raise self._error(f"{ast.unparse(node)!r} is not a finite number")
        return -number if negative else number

    def _error(self, message: str) -> ConfigError:
        return ConfigError(f"selector {self.text!r}: {message}")


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)


def _probe(selector: Selector) -> None:
    """Run a selector once on made-up tokens, so that a parameter out of range fails at once."""
    value = torch.linspace(0.1, 1.0, 8, dtype=torch.float64)
    number = torch.arange(8)
    table = SignalTable(
        disagreement=value,
        compatibility=value.flip(0),
        entropy=value,
        completion=number // 4,
        position=number % 4,
        valid=number >= 0,
        extra=dict.fromkeys((*KNOWN_SIGNALS, TEACHER, *selector.needs), -value),
    )
    view = normalized_view(table)
    # What these tokens score says nothing about those of a run.
    with suppress(NumericsError):
        checked_scores(selector, view, view.rules)
