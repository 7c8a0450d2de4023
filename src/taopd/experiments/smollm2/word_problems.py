"""Two-step word problems in chat form, with worked steps and a number to grade."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NUM_TRAIN, NUM_TEST = 4000, 300
MATCH = r"regex:(?<=Answer: )\d+"
"""How a completion is graded: the number after "Answer: "."""
MAX_NEW_TOKENS = 48
"""A solution has about 23."""
_NAMES = ("Tom", "Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Zoe", "Max", "Ida")
_BOXES = ("boxes", "bags", "jars", "trays", "crates")
_THINGS = ("pens", "apples", "coins", "books", "stamps", "shells", "cards", "marbles")


@dataclass(frozen=True, slots=True)
class Problem:
    """One question, the completion that solves it, and its answer."""

    question: str
    solution: str
    answer: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The question as chat messages."""
        return [{"role": "user", "content": self.question}]


def draw(rng: random.Random) -> Problem:
    """A problem with one product and one sum or difference.

    Example: "Tom has 4 boxes with 7 pens each and finds 5 more pens. How many pens now?" and
    "4*7=28. 28+5=33. Answer: 33".
    """
    name, box, thing = rng.choice(_NAMES), rng.choice(_BOXES), rng.choice(_THINGS)
    count, each, change = rng.randint(2, 9), rng.randint(3, 19), rng.randint(2, 29)
    product = count * each
    start = f"{name} has {count} {box} with {each} {thing} each"
    if change < product and rng.random() < 0.5:
        question = f"{start} and loses {change} {thing}."
        total, sign = product - change, "-"
    else:
        question = f"{start} and finds {change} more {thing}."
        total, sign = product + change, "+"
    return Problem(
        question=f"{question} How many {thing} now?",
        solution=f"{count}*{each}={product}. {product}{sign}{change}={total}. Answer: {total}",
        answer=str(total),
    )


def splits(seed: int, *, sft: int, train: int, test: int) -> dict[str, list[Problem]]:
    """Problems for "sft", "train" and "test"; no question is in two of them, or twice in one."""
    rng, seen = random.Random(seed), set[str]()
    found: dict[str, list[Problem]] = {}
    # The test split first: it stays the same when the others grow.
    for name, count in (("test", test), ("sft", sft), ("train", train)):
        rows = found[name] = []
        while len(rows) < count:
            problem = draw(rng)
            if problem.question not in seen:
                seen.add(problem.question)
                rows.append(problem)
    return found


def write_prompts(path: Path, problems: dict[str, list[Problem]]) -> None:
    """Write "train" and "test" as Parquet: prompt (messages), answer, solution, split."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": problem.prompt,
            "answer": problem.answer,
            "solution": problem.solution,
            "split": split,
        }
        for split in ("train", "test")
        for problem in problems[split]
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
