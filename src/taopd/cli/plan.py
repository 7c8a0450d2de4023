"""`taopd plan`: memory, FLOPs and the ratio to full distillation, from configs alone.

Settings come from a training config (the parser of `taopd train`, so the same keys and flags), from flags, or
from both; flags win. The prompts are read where they are on this disk.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taopd.cli import Parser
from taopd.errors import ConfigError

if TYPE_CHECKING:
    from taopd.trainer.cost import ModelShape, Plan, PlanSettings
    from taopd.trainer.settings_file import TrainSettings

_NOTES = """one, several: micro-batches in a generation batch.
update: all but sampling and the teacher's backbone.
FLOPs of matmuls, not seconds: sampling takes more time than its FLOPs.
Random selection; clustered ones cost less."""

_OF_THE_RUN = ("budget", "anchor_fraction")
"""Flags that are settings of `taopd train`: other settings of the run follow from them."""


def run(argv: Sequence[str]) -> int:
    """Parse, compute, print a table or JSON; the heavy imports come after `--help`."""
    options, rest = _parser().parse_known_args(argv)
    if options.config is None and rest:
        if rest[0].endswith((".yaml", ".yml")):
            raise ConfigError(f"a file is given as --config {rest[0]}")
        raise ConfigError(
            f"unknown argument {rest[0]!r}: `taopd plan --help` lists them; settings of `taopd train` go "
            "with --config FILE"
        )
    others = ("config", "student", "teacher", "json")
    given = {n: v for n, v in vars(options).items() if n not in others and v is not None}
    of_the_run = {name: given.pop(name) for name in _OF_THE_RUN if name in given}

    from taopd.trainer.cost import load_shape, plan
    from taopd.trainer.cost.plain_config import default_settings

    student, teacher = options.student, options.teacher
    if options.config is None:
        if student is None or teacher is None:
            raise ConfigError("name the models with --student and --teacher, or give --config FILE")
        names = {"model_name_or_path": student, "teacher_model_name_or_path": teacher}
        settings = replace(default_settings(names | of_the_run), **given)
    else:
        rest += [f"--{name}={value}" for name, value in of_the_run.items()]
        read = _from_plain_config(options.config, rest)
        known, config_student, shape, unread = read or _from_config(options.config, rest)
        settings = replace(known, **given)
        if unread and "prompt_length" not in given:
            _say_assumed(settings, unread)
        student = student or config_student
    if teacher is not None:
        shape = load_shape(teacher)
    _check_used(settings, given | of_the_run)
    result = plan(load_shape(student), shape, settings)
    if options.json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        _print(result)
    return 0


def _check_used(settings: "PlanSettings", given: dict[str, Any]) -> None:
    """Refuse flags that would change nothing.

    Raises:
        ConfigError: names the flag that is missing beside it.
    """
    if "keep_prefix" in given and settings.window is None:
        raise ConfigError(
            "--recompute-prefix is about the prefix of a gradient window, and there is none: drop it or add "
            "--window N"
        )
    if given.get("sharding", "ddp") != "ddp" and settings.num_ranks == 1:
        raise ConfigError(
            f"--sharding {settings.sharding} does nothing with one process: drop it or add --num-ranks N"
        )
    if "anchor_fraction" in given and settings.anchored_share == 0:
        raise ConfigError(
            "--anchor-fraction is of the tokens that are held, and this run holds none: drop it, or take "
            "method: anchored or reach and a budget below 1"
        )


def _parser() -> Parser:
    parser = Parser(
        prog="taopd plan",
        usage="(--config FILE | --student S --teacher T) [options]",
        description="What one optimizer step on one device costs, from configs alone: memory, FLOPs of "
        "matmuls, ratio to full distillation in TRL, traffic. Not counted: elementwise work and buffers. "
        "Sequences have full length. What is not given is as `taopd train` has it.",
        epilog="example:\n"
        "  taopd plan --student Qwen3-1.7B --teacher Qwen3-4B --completion-length 2048 --window 4",
    )
    add = parser.flag
    add("--config FILE", "YAML of `taopd train`; its flags are accepted here too")
    add("--student S", "folder with config.json, or a public name (Qwen3-0.6B, Qwen3-8B, ...)")
    add("--teacher T", "likewise")
    for name, words in (
        ("batch", "completions at a time (8)"),
        ("micro-batches", "per optimizer step (1)"),
        ("prompt-length", "tokens (256); --config: of its longest prompt"),
        ("teacher-prompt-length", "tokens, if it differs"),
        ("completion-length", "tokens (512)"),
        ("window", "gradient window"),
        ("top-k", "tokens of a list (16)"),
        ("lora-rank", "of an adapter (on q_proj, v_proj)"),
        ("num-ranks", "processes (1)"),
    ):
        add(f"--{name} N", words, type=int)
    add("--budget B", "share that trains (0.1)", type=float)
    add("--anchor-fraction F", "share of tokens held", type=float)
    for name, words in (
        ("dtype", "of matmuls (bfloat16)"),
        ("student-dtype", "of weights (float32)"),
        ("teacher-dtype", "of weights (float32)"),
        ("device", "gpu, cpu (gpu)"),
        ("sharding", "ddp, fsdp2, zero3 (ddp)"),
    ):
        add(f"--{name} NAME", words)
    for flag, name, value, words in (
        ("no-gradient-checkpointing", "gradient_checkpointing", False, "keep activations"),
        ("recompute-prefix", "keep_prefix", False, "compute the prefix again per micro-batch"),
        ("no-padding", "padded", False, "equal lengths: no mask"),
    ):
        add(f"--{flag}", words, dest=name, action="store_const", const=value)
    add("--json", "for machines")
    return parser


def _from_plain_config(
    path: str, flags: Sequence[str]
) -> "tuple[PlanSettings, str, ModelShape, str] | None":
    """As `_from_config`, in a tenth of its time; None: not a plain config."""
    from taopd.cli.lab_paths import lab_settings
    from taopd.models.plain_prompts import longest_prompt
    from taopd.runs.limits import MOST_PROMPTS
    from taopd.runs.paths import one_place
    from taopd.trainer.cost import load_shape
    from taopd.trainer.cost.plain_config import plain_config
    from taopd.trainer.cost.planned_teachers import with_teachers

    if (config := plain_config(path, flags, lab=lab_settings)) is None:
        return None
    settings, unread = config.settings, ""
    if os.path.exists(config.dataset) and os.path.isdir(config.student):
        names = Path(config.student), Path(config.dataset)
        length = longest_prompt(*names, config.split, most=MOST_PROMPTS)
        if length is None:
            return None
        settings = replace(settings, prompt_length=length)
    else:
        unread = config.dataset
    # A plain config has no other setting that tells the weights of one teacher from those of another.
    shapes = [(load_shape(each), settings, one_place(each)) for each in config.teachers]
    teacher, settings = with_teachers(shapes)
    return settings, config.student, teacher, unread


def _from_config(path: str, flags: Sequence[str]) -> tuple["PlanSettings", str, "ModelShape", str]:
    """Plan settings of a training config, its student, its teacher (of several the largest), and the
    dataset if its prompts could not be read.
    """
    from taopd.trainer.build.from_settings import shared_options
    from taopd.trainer.build.loaded_teacher import weights_of
    from taopd.trainer.cost import load_shape
    from taopd.trainer.cost.planned_teachers import with_teachers
    from taopd.trainer.cost.settings import plan_settings

    parsed, device = _parsed(path, flags)
    student = parsed.model.model_name_or_path
    teachers = []
    for one in parsed.of_each_teacher().values():
        name = one.training.teacher_model_name_or_path
        known = replace(plan_settings(one), device=device)
        name = student if known.own_teacher else name
        elsewhere = known.teacher_elsewhere
        shape = None if name is None else load_shape(str(name), elsewhere=elsewhere)
        teachers.append((shape, known, weights_of(one.training, shared_options(parsed))))
    teacher, settings = with_teachers(teachers)
    # As `taopd check` does. What is not on this disk stays where it is: a plan needs no network.
    dataset, unread = str(parsed.script.dataset_name), ""
    if os.path.exists(dataset) and os.path.isdir(str(student)):
        from taopd.preflight.subject import Subject

        subject = Subject(settings=parsed)
        longest: dict[str, Any] = {"prompt_length": subject.longest_prompt}
        if subject.has_teacher_prompts:
            longest["teacher_prompt_length"] = subject.longest_teacher_prompt
        settings = replace(settings, **longest)
    else:
        unread = dataset
    return settings, str(student), teacher, unread


def _say_assumed(settings: "PlanSettings", dataset: str) -> None:
    print(
        f"prompts of {settings.prompt_length} tokens are assumed, because {dataset} or the student's "
        "tokenizer is not on this disk; --prompt-length N sets another length",
        file=sys.stderr,
    )


def _parsed(path: str, flags: Sequence[str]) -> tuple["TrainSettings", str]:
    """The settings, and the device that they train on: the one that `taopd check` would look at."""
    import torch

    from taopd.cli.lab_paths import check_lab, lab_settings
    from taopd.trainer.settings_file import parse_settings

    try:
        own = _parser().flags()
        parsed = parse_settings(path, flags, lab=lab_settings, check_lab=check_lab, own=own)
    except ConfigError as error:
        # transformers refuses bf16 on a machine without a GPU: then the plan is for another machine.
        if "use_cpu" not in str(error):
            raise
        return parse_settings(path, _on_cpu(flags), lab=lab_settings), "gpu"
    on_gpu = torch.cuda.is_available() and not parsed.training.use_cpu
    return parsed, "gpu" if on_gpu else "cpu"


def _on_cpu(flags: Sequence[str]) -> list[str]:
    """The flags with `--use_cpu true` in place of what they say of it."""
    name = "--use_cpu"
    rest = [flag for flag in flags if not flag.startswith(f"{name}=")]
    if name in rest:
        at = rest.index(name)
        value = at + 1 < len(rest) and not rest[at + 1].startswith("--")
        del rest[at : at + 1 + value]
    return [*rest, name, "true"]


def _short(size: float) -> str:
    """Whole MiB; two digits of a few, which a small model has."""
    return f"{size:,.0f}" if size >= 10 else f"{size:.2g}"


def _parameters(count: int) -> str:
    """Billions; millions of a small model."""
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _print(result: "Plan") -> None:
    from rich.table import Table

    from taopd.report.console import plain_console

    answer, settings, console = result.as_dict(), result.settings, plain_console()

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            made.add_column(column, justify="left" if index == 0 else "right")
        return made

    shapes = ", ".join(
        f"{role} {shape.name} ({_parameters(shape.num_parameters)})"
        for role, shape in (("student", result.student), ("teacher", result.teacher))
    )
    steps = settings.num_iterations
    shared = f", {steps} steps on a batch: means of these" if steps > 1 else ""
    console.print(
        f"{shapes}\n{settings.micro_batches} x {settings.batch} completions of {settings.prompt_length} + "
        f"{settings.completion_length} tokens, budget {settings.budget:g}, window {settings.window}, "
        f"{settings.dtype}{shared}",
        highlight=False,
    )
    memory = table("Memory of one device", "part", "MiB")
    for name, size in answer["memory_mib"].items():
        if size > 0:
            memory.add_row(name.replace("_", " "), _short(size))
    memory.add_section()
    for name, size in answer["phase_mib"].items():
        memory.add_row(f"peak in {name.replace('_', ' ')}", _short(size))
    console.print(memory)
    if settings.num_ranks > 1:
        title = f"Sent in a step, {settings.num_ranks} ranks, {settings.sharding}"
        volume = table(title, "what", "moved, MiB", "sent by one rank, MiB")
        for name, size in answer["moved_mib"].items():
            volume.add_row(name, f"{size:,.4g}", f"{answer['sent_mib'][name]:,.4g}")
        console.print(volume)
    stages = table("Compute of one step, TFLOP", "stage", "taopd", "full (TRL)")
    for name, cost in answer["tflop"].items():
        if name == "update":
            stages.add_section()
        shown = "student update" if name == "update" else name.replace("_", " ")
        stages.add_row(shown, f"{cost:,.4g}", f"{answer['full_tflop'][name]:,.4g}")
    console.print(stages)
    heads = ("window", "gradient\nshare", "activations\nMiB", "update,\none", "update,\nseveral")
    windows = table("Ratio to full distillation in TRL", *heads, "step,\none", "step,\nseveral")
    for row in result.windows:
        update = (row.update_ratio_one, row.update_ratio_several)
        ratios = (*update, row.step_ratio_one, row.step_ratio_several)
        windows.add_row(
            "none" if row.window is None else str(row.window),
            f"{row.gradient_share:.3f}",
            _short(row.activations_mib),
            *(f"{ratio:.2f}" for ratio in ratios),
        )
    console.print(windows)
    console.print(_NOTES, highlight=False)
    if settings.several_teachers:
        console.print(
            f"Several teachers: {result.teacher.name}, the largest here, is taken to score every completion, "
            "the most that a step can take; of the others the weights are counted.",
            highlight=False,
        )
