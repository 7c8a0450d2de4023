"""Prepares `recipes/studies/smollm2-self.yaml`: SmolLM2-135M-Instruct as its own teacher.

    python -m scripts.smollm2_self                 the pair in runs/smollm2, made on first use, and the prompts
    python -m scripts.smollm2_self --measure 60    and greedy accuracy with and without the teacher's prompt

The models are those of `taopd demo --real`. The prompts are theirs with a column `teacher_prompt`: the teacher
has been asked the same question three times before, and each time answered with the worked solution. Told the
solution within the question, in any of ten wordings, the model gives the number and not the worked form.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from taopd.experiments.evaluation.evaluate import evaluate
from taopd.experiments.smollm2 import word_problems
from taopd.experiments.smollm2.pair import Pair, make_pair
from taopd.models.loading import load_model, load_tokenizer
from taopd.models.prompts import load_prompts
from taopd.models.teacher_prompts import COLUMN

STUDY = Path(__file__).parents[1] / "recipes/studies/smollm2-self.yaml"
PROMPTS = "prompts-self.parquet"
TIMES = 3
"""Times that the teacher has answered before. Greedy worked forms in 20 problems: 1 after one, 9 after two, 17."""


def teacher_prompt(row: dict[str, Any]) -> list[dict[str, str]]:
    """The question, answered with the worked solution, `TIMES` times; then the question."""
    question = list(row["prompt"])
    answered = [*question, {"role": "assistant", "content": row["solution"]}]
    return [*answered * TIMES, *question]


def write_prompts(pair: Pair) -> Path:
    """The pair's prompts with the teacher's beside them, in the pair's folder."""
    rows = pq.read_table(pair.prompts).to_pylist()
    table = pa.Table.from_pylist([row | {COLUMN: teacher_prompt(row)} for row in rows])
    path = pair.folder / PROMPTS
    # A study that is running reads the file: it is replaced whole, and only by another one.
    if not path.exists() or not pq.read_table(path).equals(table):
        partial = path.with_name(f".{path.name}")
        pq.write_table(table, partial)
        partial.replace(path)
    return path


def accuracies(model_folder: Path, prompts: Path, count: int) -> dict[str, float]:
    """Share of the first test problems that greedy answers solve, without and with the teacher's prompt."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(model_folder, dtype=torch.float32).to(device)
    rows = list(load_prompts(prompts, split="test").select(range(count)))
    found = {}
    for name, asked in (
        ("without", rows),
        ("with", [row | {"prompt": row[COLUMN]} for row in rows]),
    ):
        result = evaluate(
            model,
            load_tokenizer(model_folder),
            asked,
            greedy=True,
            match=word_problems.MATCH,
            max_new_tokens=word_problems.MAX_NEW_TOKENS,
            batch_size=min(count, 100),
        )
        found[name] = result.accuracy
        for seen in result.transcripts[:3]:
            print(f"  {name}: {seen['completion']!r}, right is {seen['answer']}")
    return found


def main() -> None:
    """Make pair and prompts; measure if asked to; say what comes next."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--pair", type=Path, default=Path("runs/smollm2"), help="folder of the pair"
    )
    parser.add_argument("--measure", type=int, default=0, help="test problems to answer")
    options = parser.parse_args()
    pair = make_pair(options.pair)
    prompts = write_prompts(pair)
    if options.measure:
        for name in ("instruct", "student"):
            found = accuracies(pair.folder / name, prompts, options.measure)
            shown = ", ".join(f"{how} {share:.1%}" for how, share in found.items())
            print(f"{name}, greedy, {options.measure} problems: {shown}", flush=True)
    print(f"taopd compare {os.path.relpath(STUDY)} --workers 1")


if __name__ == "__main__":
    main()
