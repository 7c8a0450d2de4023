"""Prepares `recipes/studies/smollm2-self.yaml`: SmolLM2-135M-Instruct as its own teacher.

    python -m scripts.smollm2_self                 the pair in runs/smollm2, made on first use
    python -m scripts.smollm2_self --measure 60    and greedy accuracy with and without the teacher's prompt

The models and prompts are those of `taopd demo --real`; a pair of an older version gets a column `solution`.
"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from taopd.experiments.evaluation.evaluate import evaluate
from taopd.experiments.smollm2 import word_problems
from taopd.experiments.smollm2.pair import Pair, make_pair
from taopd.models.loading import load_model, load_tokenizer
from taopd.models.prompts import load_prompts
from taopd.models.teacher_prompts import TeacherPrompts
from taopd.runs.validation import read_yaml

STUDY = Path(__file__).parents[1] / "recipes/studies/smollm2-self.yaml"


def template() -> str:
    """The study's `teacher_prompt_template`."""
    return str(read_yaml(STUDY, "the study")["config"]["teacher_prompt_template"])


def as_the_teacher_reads(rows: Iterable[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Rows whose prompt is the teacher's."""
    kept = list(rows)
    prompts = TeacherPrompts(text).of_rows(kept)
    assert prompts is not None
    return [row | {"prompt": own.content} for row, own in zip(kept, prompts, strict=True)]


def accuracies(model_folder: Path, prompts: Path, *, count: int, text: str) -> dict[str, float]:
    """Share of the first test problems that greedy answers solve, without and with the teacher's prompt."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(model_folder, dtype=torch.float32).to(device)
    rows = list(load_prompts(prompts, split="test").select(range(count)))
    found = {}
    for name, asked in (("without", rows), ("with", as_the_teacher_reads(rows, text))):
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
    return found


def main() -> None:
    """Make the pair; measure if asked to; say what comes next."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--pair", type=Path, default=Path("runs/smollm2"), help="folder of the pair"
    )
    parser.add_argument("--measure", type=int, default=0, help="test problems to answer")
    options = parser.parse_args()
    pair: Pair = make_pair(options.pair)
    if options.measure:
        for name in ("instruct", "student"):
            found = accuracies(
                pair.folder / name, pair.prompts, count=options.measure, text=template()
            )
            shown = ", ".join(f"{how} {share:.1%}" for how, share in found.items())
            print(f"{name}, greedy, {options.measure} problems: {shown}")
    print(f"taopd compare {os.path.relpath(STUDY)}")


if __name__ == "__main__":
    main()
