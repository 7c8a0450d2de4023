"""The page of all settings: default, unit, help and source of every field, read from the dataclasses."""

import ast
import inspect
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

from trl import DistillationConfig, ModelConfig, ScriptArguments

from taopd.report.generated_part import markdown_table
from taopd.trainer.config import TeachabilityConfig

UNITS = {
    "share of the tokens": ("budget", "budget_end", "split_gamma", "anchor_fraction", "draw_floor"),
    "share of the completions": ("anchor_responses",),
    "tokens": ("score_top_k", "min_keep", "gradient_window", "gather_limit"),
    "token ids": ("stop_token_ids",),
    "optimizer steps": (
        *("budget_steps", "guard_every", "gradient_check_every", "max_skipped_steps"),
        "num_iterations",
    ),
    "completions": ("log_rollouts", "num_generations"),
    "requests": ("teacher_concurrency",),
    "L2 norm": ("match_update_norm", "max_update_norm"),
    "ratio": (
        "draw_clip",
        "ppo_clip_low",
        "ppo_clip_high",
        "anchor_coef",
        "beta",
        "teacher_ema_decay",
    ),
}
"""Units that the name does not tell."""
SUFFIXES = {"_s": "seconds", "_mib": "MiB"}
PAPER, CODE = "2605.26844", "released code of 2605.26844"
SOURCES = {
    PAPER: (
        *("selector", "budget", "score_top_k", "signals", "compatibility", "normalization"),
        *("loss", "reduction", "denominator", "split_gamma"),
    ),
    CODE: ("min_keep", "ppo_clip_low", "ppo_clip_high", "num_iterations"),
    "2603.06619": ("draw", "draw_floor", "draw_clip"),
    "TRL": ("beta", "num_generations"),
}
"""Where a setting, or its default, is from; all others are taopd's own."""
OTHERS = "Others"
_LINE = re.compile(r"^    (?:# (.+)\n$|(\w+): )", re.MULTILINE)
"""A comment before an empty line, which is a group's title; or a declaration."""


def settings_page() -> str:
    """Every setting of `taopd train` and of `TeachabilityConfig`, ours first, in the order of the source."""
    theirs = {each.name for each in fields(DistillationConfig)}
    ours = [
        each
        for each in fields(TeachabilityConfig)
        if each.name not in theirs or each.name == "beta"
    ]
    lines = [
        "# Settings",
        "",
        "Fields of `TeachabilityConfig`. In YAML and as a flag they have the same names: `budget: 0.05`,"
        " `--budget 0.05`. A value out of range or an unknown name is one message at the start.",
        "",
        "*Source*: where the setting or its default is from; without one it is taopd's own.",
    ]
    groups = group_of_settings()
    for group in dict.fromkeys([*groups.values(), OTHERS]):
        rows = [_row(each) for each in ours if groups.get(each.name, OTHERS) == group]
        if rows:
            heads = ("setting", "default", "unit", "meaning", "source")
            lines += ["", f"## {group}", "", *markdown_table(heads, rows, texts=5)]
    lines += _inherited(theirs)
    return "\n".join(lines) + "\n"


def unit_of(field: Field) -> str:
    """The unit of a setting, or "" where its value is a name or a switch."""
    for unit, names in UNITS.items():
        if field.name in names:
            return unit
    for suffix, unit in SUFFIXES.items():
        if field.name.endswith(suffix):
            return unit
    kind = re.search(r"\b(int|float)\b", str(field.type))
    return {"int": "count", "float": "number"}[kind[1]] if kind else ""


def default_of(field: Field) -> str:
    """The default as it is written in YAML."""
    made = field.default_factory
    value = field.default if made is MISSING else made()
    if value is MISSING:
        return "required"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(getattr(value, "value", value))
    return text if text else '""'


def group_of_settings() -> dict[str, str]:
    """The group of every setting of ours, from the comments of the classes that declare them."""
    found: dict[str, str] = {}
    for kind in TeachabilityConfig.__mro__:
        if not kind.__module__.startswith("taopd."):
            continue
        name_of_class = kind.__name__.removesuffix("Settings")
        subject = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name_of_class).capitalize()
        group = subject
        for title, name in _LINE.findall(inspect.getsource(kind)):
            if title:
                # Of a part of the settings a title may need its subject: "Teacher: behind a server".
                whole = kind is TeachabilityConfig or "teacher" in title.lower()
                group = title if whole else f"{subject}: {title[0].lower()}{title[1:]}"
            if name:
                found[name] = group
    return found


def _row(field: Field) -> tuple[str, ...]:
    source = next((source for source, names in SOURCES.items() if field.name in names), "")
    return (
        f"`{field.name}`",
        default_of(field),
        unit_of(field),
        cell(str(field.metadata.get("help", ""))),
        source,
    )


def cell(text: str) -> str:
    """Text for a cell of a table: one line, nothing in it read as markup."""
    text = re.sub(r"\s+", " ", text.replace("%%", "%")).strip()
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(
        piece if piece.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", piece)
        for piece in pieces
    ).replace("|", "\\|")


def _inherited(theirs: Iterable[str]) -> list[str]:
    """Tables of the settings that other libraries declare."""
    lines = [
        "",
        "## Settings of TRL and transformers",
        "",
        "All of `trl.DistillationConfig`, with the texts of the installed versions.",
        "",
    ]
    lines += _plain(
        each for each in fields(TeachabilityConfig) if each.name in set(theirs) - {"beta"}
    )
    for title, kind in (("Models", ModelConfig), ("Prompts", ScriptArguments)):
        lines += ["", f"## {title}: `{kind.__name__}` of TRL", ""]
        lines += [
            f"For `taopd train`; from Python {title.lower()} are arguments of the trainer.",
            "",
        ]
        lines += _plain(fields(kind))
    return lines


def _plain(found: Iterable[Field]) -> list[str]:
    rows = [
        (f"`{each.name}`", default_of(each), cell(str(each.metadata.get("help", ""))))
        for each in found
    ]
    return markdown_table(("setting", "default", "meaning"), rows, texts=3)


def attribute_texts(source: str, name: str) -> dict[str, str]:
    """The texts below the attributes of a class, by attribute."""
    (found,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    pairs = zip(found.body, found.body[1:], strict=False)
    return {
        field.target.id: str(text.value.value)
        for field, text in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
