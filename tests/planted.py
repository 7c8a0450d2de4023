"""Mismatches planted into copies of the tiny lab's files, and what `taopd check` must say of each.

`python -m tests.planted` writes the list in docs/check.md, with the printed results, and its picture.
"""

import contextlib
import copy
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from taopd import cli
from taopd.experiments.lab import Lab, build_lab

Settings = dict[str, Any]
TEMPLATE = (
    "{% for message in messages %}<bos> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
"""A turn begins with <bos>, and the answer after "="."""
DOCS = Path(__file__).parents[1] / "docs"


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def in_json(file: str, **values: Any) -> Callable[[Path, Settings], None]:
    """Set keys of a JSON file of the lab; None removes one."""

    def plant(folder: Path, settings: Settings) -> None:
        edit_json(folder / file, lambda content: content.update(values))

    return plant


def set_to(**values: Any) -> Callable[[Path, Settings], None]:
    return lambda folder, settings: settings.update(values)


def rename_token(folder: Path, settings: Settings) -> None:
    def change(content: Any) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["x3"] = vocabulary.pop("s3")

    edit_json(folder / "teacher" / "tokenizer.json", change)


def resize_student(folder: Path, settings: Settings) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    model.resize_token_embeddings(47)
    model.save_pretrained(folder / "student")


def scramble_teacher(folder: Path, settings: Settings) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    generator = torch.Generator().manual_seed(0)
    weight = model.get_output_embeddings().weight.data
    weight.copy_(weight[torch.randperm(len(weight), generator=generator)])
    model.save_pretrained(folder / "teacher")


ASKED = [{"role": "user", "content": "{i} 2 1 + 4 8 9"}]


def messages(
    teacher: str | None = TEMPLATE,
    student: str | None = TEMPLATE,
    rows: Settings | None = {"prompt": ASKED},  # noqa: B006 (read only)
):
    """Prompts as messages, `{i}` a digit; None: the lab's own text. And a chat template for each model."""

    def plant(folder: Path, settings: Settings) -> None:
        path = folder / "messages.jsonl"
        path.write_text("".join(json.dumps(rows).replace("{i}", str(i)) + "\n" for i in range(10)))
        settings |= {} if rows is None else {"dataset_name": str(path)}
        for owner, template in (("student", student), ("teacher", teacher)):
            if template is not None:
                (folder / owner / "chat_template.jinja").write_text(template)

    return plant


@contextlib.contextmanager
def stale_sampler() -> Iterator[None]:
    """The student has moved on, the sampler still holds the weights of the checkpoint."""
    import torch

    from taopd.trainer.build import from_settings as build

    original = build.make_trainer

    def make(*args: Any, **options: Any) -> Any:
        trainer = original(*args, **options)
        trainer.model.generate = copy.deepcopy(trainer.model).generate
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
        return trainer

    build.make_trainer = make
    try:
        yield
    finally:
        build.make_trainer = original


@dataclass(frozen=True, kw_only=True)
class Planted:
    """One mismatch and every item that must not pass."""

    plant: Callable[[Path, Settings], None]
    caught: dict[str, str]
    variant: str = "dialect"
    during: Callable[[], AbstractContextManager[None]] = nullcontext


THINKING = TEMPLATE.replace("%}={% endif", "%}={% if enable_thinking %} <think>{% endif %}{% endif")
NOT_LOADED = dict.fromkeys(
    (
        *("drift", "kept tokens", "off support", "precision", "scoring path", "situation"),
        *("stop audit", "teacher KL", "truncation"),
    ),
    "fail",
)
"""What follows where the models are refused."""
NOT_MADE = {name: "fail" for name in NOT_LOADED if name != "precision"}
"""What follows where the models are loaded, and the trainer refuses the prompts."""

PLANTED = {
    "renamed token": Planted(plant=rename_token, caught={"tokenizers": "fail"} | NOT_LOADED),
    "head without rows for all tokens": Planted(
        plant=resize_student, caught={"tokenizers": "fail"}
    ),
    "teacher's tokenizer ends with another token": Planted(
        plant=in_json("teacher/tokenizer_config.json", eos_token="<bos>"),
        caught={"special tokens": "warn", "generation config": "warn"},
    ),
    "no padding token": Planted(
        plant=in_json("student/tokenizer_config.json", pad_token=None),
        caught={"special tokens": "warn"},
    ),
    "generation config with another end": Planted(
        plant=in_json("student/generation_config.json", eos_token_id=45),
        caught={"generation config": "fail"},
    ),
    "teacher that ends with another token, method: anchored": Planted(
        plant=set_to(method="anchored"),
        caught={"generation config": "warn", "stop audit": "fail"},
        variant="termination",
    ),
    "different chat template": Planted(
        plant=messages(teacher=TEMPLATE.replace("<bos>", "<eos>")), caught={"chat template": "fail"}
    ),
    "default system prompt in one template": Planted(
        plant=messages(teacher="1 + 1 " + TEMPLATE), caught={"chat template": "warn"}
    ),
    "no chat template for messages": Planted(
        plant=messages(student=None),
        caught={"prompts": "fail", "chat template": "fail", "context": "fail", "memory": "fail"}
        | NOT_MADE,
    ),
    "conversations that end with the answer": Planted(
        plant=messages(rows={"prompt": [*ASKED, {"role": "assistant", "content": "4 2"}]}),
        caught=dict.fromkeys(
            ("prompts", "chat template", "thinking mode", "context", "memory"), "fail"
        )
        | NOT_MADE,
    ),
    "tools that the chat template does not show": Planted(
        plant=messages(rows={"prompt": ASKED, "tools": [{"type": "function"}]}),
        caught={"prompts": "warn"},
    ),
    "plain text for two chat models": Planted(
        plant=messages(rows=None), caught={"prompts": "warn"}
    ),
    "thinking flag on one side": Planted(
        plant=messages(teacher=THINKING), caught={"thinking mode": "fail"}
    ),
    "thinking flag that nobody reads": Planted(
        plant=lambda folder, settings: (
            messages()(folder, settings),
            settings.update(chat_template_kwargs={"enable_thinking": False}),
        )[1],
        caught={"thinking mode": "fail"},
    ),
    "context too short": Planted(
        plant=set_to(max_completion_length=60), caught={"context": "fail"} | NOT_MADE
    ),
    "more memory than the machine has": Planted(
        plant=set_to(per_device_train_batch_size=20_000_000), caught={"memory": "fail"}
    ),
    "teacher in another dtype": Planted(
        plant=set_to(teacher_model_init_kwargs={"dtype": "bfloat16"}), caught={"precision": "warn"}
    ),
    "student trained in bfloat16 weights": Planted(
        plant=set_to(dtype="bfloat16"), caught={"precision": "warn"}
    ),
    "stale sampler": Planted(plant=set_to(), caught={"drift": "fail"}, during=stale_sampler),
    "completions cut short": Planted(
        plant=set_to(max_completion_length=4),
        caught={"stop audit": "warn", "truncation": "warn", "kept tokens": "warn"},
    ),
    "teacher and student are one model": Planted(
        plant=lambda folder, settings: settings.update(
            teacher_model_name_or_path=settings["model_name_or_path"]
        ),
        caught={"teacher KL": "fail", "kept tokens": "warn"},
    ),
    "teacher with another tokenizer's head": Planted(
        plant=scramble_teacher, caught={"off support": "warn", "stop audit": "warn"}
    ),
    "budget below one token a completion": Planted(
        plant=set_to(budget=0.01), caught={"kept tokens": "warn"}
    ),
}


def write_config(lab: Lab, folder: Path) -> tuple[Path, Settings]:
    """A copy of the lab below `folder`, and the settings of a run on it."""
    for name in ("student", "teacher"):
        shutil.copytree(lab.folder / name, folder / name)
    recipe = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
    settings = yaml.safe_load(recipe.read_text()) | {
        "model_name_or_path": str(folder / "student"),
        "teacher_model_name_or_path": str(folder / "teacher"),
        "dataset_name": str(lab.prompts),
        "output_dir": str(folder / "run"),
        "max_completion_length": lab.max_completion_length,
    }
    del settings["lab"]
    return folder / "config.yaml", settings


def check(name: str, lab: Lab, folder: Path, **more: Any) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and items of `taopd check --json` on a mismatch planted into a copy of the lab."""
    planted = PLANTED[name]
    path, settings = write_config(lab, folder)
    planted.plant(folder, settings)
    path.write_text(yaml.safe_dump(settings | more))
    printed = io.StringIO()
    with planted.during(), contextlib.redirect_stdout(printed):
        status = cli.main(["check", str(path), "--json"])
    return status, json.loads(printed.getvalue())["items"]


def page_rows() -> list[str]:
    """One row per planted mismatch, with what is printed for it; items that could not run are left out."""
    rows = []
    for name, planted in PLANTED.items():
        with tempfile.TemporaryDirectory() as folder:
            _, items = check(name, build_lab(planted.variant), Path(folder))
        said = [
            f"**{item['level']}** {item['item']}: {item['measured']}. {item['advice']}"
            for item in items
            if item["level"] != "pass" and item["measured"] != "not run"
        ]
        text = "<br>".join(line.replace("|", "\\|") for line in said)
        rows.append(f"| {name} | {re.sub(r'<(?!br>)', '&lt;', text)} |")
    return rows


def main() -> None:
    """Write the list into docs/check.md and the picture beside it."""
    from rich.console import Console

    from taopd.cli.check import show
    from taopd.preflight.verdict import Verdict, Verdicts

    page = DOCS / "check.md"
    table = "\n".join(["| planted | printed |", "|---|---|", *page_rows()])
    begin, end = "<!-- planted -->", "<!-- end -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}")
    with tempfile.TemporaryDirectory() as folder:
        name = "default system prompt in one template"
        _, items = check(name, build_lab("termination"), Path(folder), method="anchored")
    console = Console(record=True, width=120, file=io.StringIO())
    console.print("$ taopd check config.yaml", highlight=False)
    show(Verdicts(Verdict(**item) for item in items), console)
    picture = console.export_svg(title="taopd check")
    # rich fetches a font from elsewhere; the reader's own monospace font does.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    (DOCS / "check.svg").write_text(picture.replace("Fira Code, monospace", "monospace"))


if __name__ == "__main__":
    main()
