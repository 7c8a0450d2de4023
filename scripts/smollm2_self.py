"""Prepares the studies of SmolLM2-135M-Instruct as its own teacher: `recipes/studies/smollm2-self.yaml`,
`smollm2-self-form.yaml` and `smollm2-system.yaml`.

    python -m scripts.smollm2_self                 pair and prompts in runs/smollm2, made on first use
    python -m scripts.smollm2_self --measure 60    and greedy answers with and without the teacher's prompt

The models are those of `taopd demo --real`. The prompts are theirs with a column `teacher_prompt`:

self      the teacher has been asked the same question three times before, and has answered each time with the
          worked solution. Told the solution within the question, in any of ten wordings, this model gives
          the number and not the worked form.
system    a system prompt with six examples of a worked form, and a column `answer` that asks for the form
          alone, whatever its numbers. Described without examples, this model follows no form.

The study `self-form` has the prompts of `self` and another student, `runs/smollm2/reader`: the untouched
model with three tenths of what the warm-up changed in every weight. It knows the form of an answer, and,
unlike the warmed-up student, it still reads its context.

What is measured goes beside the prompts, where `scripts.pages.self_teacher` reads it.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from scripts.arguments import Arguments
from taopd.experiments.evaluation.evaluate import evaluate
from taopd.experiments.smollm2.pair import Pair, make_pair
from taopd.experiments.study.file import load_study_file
from taopd.models.loading import load_model, load_tokenizer
from taopd.models.prompts import load_prompts
from taopd.models.teacher_prompts import COLUMN
from taopd.runs.jsonl import write_json

Row = dict[str, Any]
RECIPES = Path("recipes/studies")
TIMES = 3
"""Times that the teacher has answered before. In 20 problems the most likely tokens are the worked answer in
1 after one, in 9 after two, in 17 after three."""
WARMTH = 0.3
"""Share of the warm-up in the student that knows the form. Worked answers in 20 problems, without and with
the context: 2 and 17; at 0.5 it is 2 and 12, at 0.7 2 and 7."""
EXAMPLES = (
    ("Kim has 3 sacks with 14 nuts each and finds 9 more nuts.", "nuts", "3*14=42. 42+9=51", 51),
    ("Joe has 6 cups with 5 beans each and loses 12 beans.", "beans", "6*5=30. 30-12=18", 18),
    ("Amy has 2 bins with 17 balls each and loses 4 balls.", "balls", "2*17=34. 34-4=30", 30),
    ("Pat has 8 cases with 11 tiles each and finds 20 more tiles.", "tiles", "8*11=88. 88+20=108", 108),
    ("Lou has 4 cans with 7 screws each and loses 3 screws.", "screws", "4*7=28. 28-3=25", 25),
    ("Gil has 5 racks with 13 caps each and finds 8 more caps.", "caps", "5*13=65. 65+8=73", 73),
)  # fmt: skip
"""Question, its things, sums, answer; none is a question of the data, whose names and boxes are others."""
SYSTEM = "Reply with two sums and the answer.\n\n" + "\n\n".join(
    f"user\n{question} How many {things} now?\nassistant\n{sums}. Answer: {answer}"
    for question, things, sums, answer in EXAMPLES
)


def with_solution(row: Row) -> Row:
    """The question, answered with the worked solution, `TIMES` times; then the question."""
    question = list(row["prompt"])
    answered = [*question, {"role": "assistant", "content": row["solution"]}]
    return row | {COLUMN: [*answered * TIMES, *question]}


def with_system(row: Row) -> Row:
    """The system prompt and the question; what `match` of the study finds in a reply of this form."""
    system = {"role": "system", "content": SYSTEM}
    return row | {COLUMN: [system, *row["prompt"]], "answer": "Answer:"}


STUDIES: dict[str, Callable[[Row], Row]] = {
    "self": with_solution,
    "self-form": with_solution,
    "system": with_system,
}
"""Name of a study, and what makes its prompts of the pair's."""


def write_reader(pair: Pair) -> Path:
    """The student that knows the form and reads its context, in the pair's folder; made on first use."""
    folder = pair.folder / "reader"
    if folder.exists():
        return folder
    model, warm = (load_model(each, dtype=torch.float32) for each in (pair.instruct, pair.student))
    with torch.no_grad():
        for weight, other in zip(model.parameters(), warm.parameters(), strict=True):
            weight.lerp_(other, WARMTH)
    # Renamed at the end: the name exists only for a whole model.
    partial = Path(tempfile.mkdtemp(prefix=".reader-", dir=pair.folder))
    try:
        model.save_pretrained(partial)
        load_tokenizer(pair.instruct).save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_prompts(pair: Pair, name: str) -> Path:
    """The pair's prompts with the teacher's of a study beside them, in the pair's folder."""
    rows = pq.read_table(pair.prompts).to_pylist()
    table = pa.Table.from_pylist([STUDIES[name](row) for row in rows])
    path = pair.folder / f"prompts-{name}.parquet"
    # A study that is running reads the file: it is replaced whole, and only by another one.
    if not path.exists() or not pq.read_table(path).equals(table):
        partial = path.with_name(f".{path.name}")
        pq.write_table(table, partial)
        partial.replace(path)
    return path


def measure(model_folder: Path, prompts: Path, *, match: str, tokens: int, count: int) -> Row:
    """Share of the first test problems that greedy answers solve, without and with the teacher's prompt."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(model_folder, dtype=torch.float32).to(device)
    rows = list(load_prompts(prompts, split="test").select(range(count)))
    found = {}
    for how, asked in (
        ("without", rows),
        ("with", [row | {"prompt": row[COLUMN]} for row in rows]),
    ):
        result = evaluate(
            model,
            load_tokenizer(model_folder),
            asked,
            greedy=True,
            match=match,
            max_new_tokens=tokens,
            batch_size=min(count, 100),
        )
        found[how] = result.accuracy
        for seen in result.transcripts[:3]:
            print(f"  {how}: {seen['completion']!r}", flush=True)
    return {"problems": count, "model": model_folder.name, "accuracy": found}


def main() -> None:
    """Make pair and prompts; measure if asked to; say what comes next."""
    parser = Arguments(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--pair", type=Path, default=Path("runs/smollm2"), help="folder of the pair"
    )
    parser.add_argument("--measure", type=int, default=0, help="test problems to answer")
    parser.add_argument("--only", choices=sorted(STUDIES), help="one of the studies")
    options = parser.parse_args()
    pair = make_pair(options.pair)
    if options.only in (None, "self-form"):
        write_reader(pair)
    for name in [options.only] if options.only else STUDIES:
        path = write_prompts(pair, name)
        recipe = RECIPES / f"smollm2-{name}.yaml"
        if options.measure:
            study = load_study_file(recipe)
            found = measure(
                pair.folder / Path(str(study.student)).name,
                path,
                match=study.match,
                tokens=study.config["max_completion_length"],
                count=options.measure,
            )
            write_json(path.with_suffix(".json"), found)
            shares = ", ".join(f"{how} {share:.1%}" for how, share in found["accuracy"].items())
            print(f"{name}, greedy, {options.measure} problems: {shares}", flush=True)
        print(f"taopd compare {recipe}", flush=True)


if __name__ == "__main__":
    main()
