"""Reference pages made from the code: metrics, command line, files, study files, recipes, API."""

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from scripts.site.places import ROOT
from scripts.site.settings import attribute_texts, cell, default_of, settings_page
from taopd import cli
from taopd.report.generated_part import markdown_table
from taopd.runs import schemas
from taopd.runs.validation import Leaf, Maybe, Some

FAMILIES = {
    "select": "What was kept",
    "signal": "Signals of all tokens",
    "shadow": "Other selectors on the same tokens",
    "loss": "Loss",
    "sparse": "Gradient window",
    "update": "Optimizer update",
    "guard": "Collapse guard",
    "perf": "Time and memory",
    "bank": "Fixed-context bank",
    "numerics": "Bad numbers",
    "rollout": "Rollouts",
}
FORMATS = {
    "CONFIG": ("config.json", "Every setting of a run; a file of any keys."),
    "ENV": ("env.json", "Versions, commit, seeds, device."),
    "ARM": ("arm.json", "Of a study's run: which arm and seed it is."),
    "METRICS": ("metrics.jsonl", "One line per logging step; the keys are [metrics](metrics.md)."),
    "ROLLOUT": ("rollouts.jsonl", "One line per completion; lists have one entry per token."),
    "OUTCOME": ("results.json of a run", "What one arm and seed came to."),
    "STUDY": ("results.json of a study", "All runs of a study, arms and comparisons."),
    "RATES": ("Learning rates of a study", "Within its results.json, under `rates`."),
    "QUESTION": ("results.json of a study, its question", "What was held equal and measured."),
    "VERDICTS": ("verdicts.json", "Claims of the diagnostic, with intervals."),
    "MANIFEST": ("manifest.json", "Of a bank, of gains and of a diagnostic's report."),
    "TRAINER_STATE": ("trainer_state.json", "Of a checkpoint; transformers writes it."),
}
"""Schemas of `taopd.runs.schemas` and the files they describe."""
API = {
    "trainer": (
        "Trainer and settings",
        "taopd.trainer.trainer.TeachabilityTrainer",
        "taopd.trainer.config.TeachabilityConfig",
    ),
    "signals": ("Signals", "taopd.signals"),
    "selectors": ("Selectors", "taopd.selectors"),
    "losses": ("Losses", "taopd.losses"),
    "kernels": ("Kernels", "taopd.kernels"),
    "models": (
        "Models and prompts",
        "taopd.models.prompts",
        "taopd.models.loading",
        "taopd.models.scoring",
    ),
    "teachers": ("Teachers", "taopd.teachers"),
    "diagnose": ("Diagnostic", "taopd.diagnose.bank", "taopd.diagnose.gain", "taopd.diagnose"),
    "experiments": (
        "Experiments",
        "taopd.experiments.lab",
        "taopd.experiments.study",
        "taopd.experiments.evaluation.evaluate",
    ),
    "errors": ("Errors", "taopd.errors"),
}
"""Page, its title, and the modules or classes whose docstrings it shows."""


def pages() -> Iterator[tuple[str, str]]:
    """Path and text of every page that is made from the code."""
    yield "reference/settings.md", settings_page()
    yield "reference/metrics.md", metrics_page()
    yield "reference/cli.md", cli_page()
    yield "reference/files.md", files_page()
    yield "reference/study.md", study_page()
    yield "reference/recipes.md", recipes_page()
    for name, (title, *objects) in API.items():
        yield f"reference/api/{name}.md", _api_page(title, objects)


def metrics_page() -> str:
    """Every key of `METRICS`, by family."""
    from taopd.trainer.metrics import METRICS

    lines = [
        "# Metrics",
        "",
        "What `metrics.jsonl` and trackers hold, one value per logging step. `/*` stands for the statistics"
        " that the text lists. The same key is the same definition everywhere.",
    ]
    ours = {key: text for key, text in METRICS.items() if not text.startswith("TRL's")}
    families = dict.fromkeys([*FAMILIES, *(key.split("/")[0] for key in ours)])
    for family in families:
        mine = {key: text for key, text in ours.items() if key.split("/")[0] == family}
        lines += ["", f"## {FAMILIES.get(family, family.capitalize())}", "", *_metric_rows(mine)]
    lines += [
        "",
        "## Of TRL",
        "",
        *_metric_rows({k: v for k, v in METRICS.items() if k not in ours}),
    ]
    return "\n".join(lines) + "\n"


def _metric_rows(found: dict[str, str]) -> list[str]:
    rows = ((f"`{key}`", cell(text)) for key, text in found.items())
    return markdown_table(("key", "meaning"), rows, texts=2)


def help_page(argv: list[str]) -> str:
    """What a command prints for `--help`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main([*argv, "--help"])
    assert code == 0, argv
    return printed.getvalue().rstrip()


def commands() -> list[list[str]]:
    """Every command and sub-command."""
    page = help_page(["diagnose"])
    names = re.findall(r"^  ([a-z][\w-]*)  +\w", page, re.MULTILINE)
    found: list[list[str]] = []
    for name in cli.COMMANDS:
        found.append([name])
        if name == "diagnose":
            found += [[name, sub] for sub in names if sub != "taopd"]
    return found


def cli_page() -> str:
    """The help page of every command."""
    lines = [
        "# Command line",
        "",
        "What `--help` prints. Exit codes: 0 done; 1 the command found what it looks for (a failed check,"
        " a mismatch); 2 input that you can mend, in one line; 130 interrupted; 143 terminated.",
        "",
        "```text",
        help_page([]),
        "```",
    ]
    for argv in commands():
        lines += ["", f"## taopd {' '.join(argv)}", "", "```text", help_page(argv), "```"]
    return "\n".join(lines) + "\n"


def files_page() -> str:
    """The shape of every file of a run folder that anything reads."""
    lines = [
        "# Files",
        "",
        "The shapes that readers check. Other keys may be there; a key that is not *required* may be absent."
        " What a run folder holds beside these, and what writes it:"
        " [files of a run](../guides/files.md#files-of-a-run).",
    ]
    for name in sorted(shapes(), key=[*FORMATS, *shapes()].index):
        file, text = FORMATS.get(name, (name.lower(), ""))
        shape = getattr(schemas, name)
        lines += ["", f"## {file}", "", text]
        if isinstance(shape, list):
            lines += ["", "A list of objects."]
            shape = shape[0]
        heads = ("key", "required", "value")
        lines += ["", *markdown_table(heads, _shape_rows(shape, ""), texts=3)]
    return "\n".join(lines) + "\n"


def shapes() -> list[str]:
    """Names of the shapes that `taopd.runs.schemas` defines, without that of any object."""
    body = ast.parse((ROOT / "src/taopd/runs/schemas.py").read_text(encoding="utf-8")).body
    names = [ast.unparse(node.targets[0]) for node in body if isinstance(node, ast.Assign)]
    public = [name for name in names if name.isupper() and name[0] != "_" and name != "OBJECT"]
    return [name for name in public if not isinstance(getattr(schemas, name), str)]


def _shape_rows(shape: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    for key, inner in shape.items():
        if key is ...:
            yield f"`{prefix}NAME`" if prefix else "any", "no", words(inner)
            continue
        name = f"{prefix}{key.removesuffix('?')}"
        required = "no" if key.endswith("?") else "yes"
        yield f"`{name}`", required, words(inner)
        nested, dots = _nested(inner)
        if nested is not None:
            yield from _shape_rows(nested, f"{name}{dots}.")


def _nested(shape: Any) -> tuple[dict | None, str]:
    """The object within a shape, and how a path says that there are many."""
    dots = ""
    while isinstance(shape, (Maybe, Some, list)):
        dots += "[]" if not isinstance(shape, Maybe) else ""
        shape = shape.shape if isinstance(shape, Maybe) else shape[0]
    return (shape if isinstance(shape, dict) and ... not in shape else None), dots


def words(shape: Any) -> str:
    """A shape in words."""
    if isinstance(shape, Maybe):
        return f"{words(shape.shape)}, or null"
    if isinstance(shape, Leaf):
        return shape.words
    if isinstance(shape, (Some, list)):
        least = "at least one of: " if isinstance(shape, Some) else ""
        return f"a list; {least}each {words(shape[0])}"
    if isinstance(shape, tuple):
        return f"[{', '.join(words(each) for each in shape)}]"
    if ... in shape:
        return (
            "an object"
            if words(shape[...]) == "anything"
            else f"an object; each value {words(shape[...])}"
        )
    return "an object"


def study_page() -> str:
    """Every key of a study file."""
    from taopd.experiments.study.file import StudyFile

    source = (ROOT / "src/taopd/experiments/study/file.py").read_text(encoding="utf-8")
    texts = attribute_texts(source, "StudyFile")
    rows = [
        (f"`{each.name}`", default_of(each), _type(each.type), cell(texts.get(each.name, "")))
        for each in fields(StudyFile)
    ]
    return "\n".join(
        [
            "# Study files",
            "",
            "Keys of the YAML that `taopd compare` reads ([what they ask](../guides/comparing.md)).",
            "",
            *markdown_table(("key", "default", "type", "meaning"), rows, texts=4),
            "",
        ]
    )


def _type(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind) if isinstance(kind, type) else kind).replace(
        "|", "or"
    )


def recipes_page() -> str:
    """Every file below recipes/, as it is."""
    lines = ["# Recipes", "", "The files below `recipes/` of the repository."]
    folder = ROOT / "recipes"
    for path in sorted(folder.rglob("*"), key=lambda path: (len(path.parts), str(path))):
        if path.suffix not in (".yaml", ".sh"):
            continue
        kind = {".yaml": "yaml", ".sh": "bash"}[path.suffix]
        text = path.read_text(encoding="utf-8").rstrip()
        lines += ["", f"## {path.relative_to(folder)}", "", f"```{kind}", text, "```"]
    return "\n".join(lines) + "\n"


def _api_page(title: str, objects: list[str]) -> str:
    lines = [f"# {title}"]
    for name in objects:
        lines += ["", f"::: {name}"]
        if name.endswith("Config"):
            # Its fields are the page of settings; the signature would repeat them all.
            lines += ["    options:", "      show_signature: false"]
        if not name.rpartition(".")[2][0].isupper():
            lines += [
                "    options:",
                "      show_submodules: false",
                "      members: " + _members(name),
            ]
    return "\n".join(lines) + "\n"


def _members(module: str) -> str:
    """Classes and functions that a module offers: those of its `__all__`, or those it defines."""
    path = ROOT / "src" / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    listed = [
        ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    defined = [node.name for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    names = listed[0] if listed else [name for name in defined if not name.startswith("_")]
    return f"[{', '.join(name for name in names if not name.isupper())}]"
