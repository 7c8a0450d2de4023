"""`taopd train`: from a YAML file to a distilled student in a run folder.

Order: settings, tokenizers, dataset, models and lengths are checked first; only then is the folder
claimed. So bad input leaves nothing behind. The distilled student goes to `<output_dir>/model`,
because `config.json` of the run folder is the run's own.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taopd.cli import Parser, exit_code
from taopd.cli.libraries import while_loading

if TYPE_CHECKING:
    from taopd.runs.folder import RunFolder
    from taopd.trainer.settings_file import TrainSettings
    from taopd.trainer.trainer import TeachabilityTrainer

SETTINGS = (
    ("--config FILE", "YAML file with settings; flags override it"),
    ("--model_name_or_path S", "student, a folder or hub id"),
    ("--teacher_model_name_or_path T", "teacher with the same tokenizer"),
    ("--teacher_url URL", "vLLM or SGLang server that scores instead, see docs/teachers.md"),
    ("--dataset_name X", "parquet, jsonl, json or csv file, folder or hub id"),
    ("--output_dir FOLDER", "run folder"),
    ("--budget B", "share of tokens that train"),
    ("--selector NAME", "teachability, random, full, entropy, ..., or a dotted path of your own"),
    ("--loss NAME", "reverse_kl, sampled_reverse_kl, forward_kl, jsd, ...: docs/guide.md"),
    ("--method NAME", "reach, anchored or published: which tokens may train, what is held"),
    ("--num_generations N", "completions per prompt"),
    ("--learning_rate R", "of the optimizer"),
    ("--max_completion_length N", "in tokens"),
    ("--max_steps N", "optimizer steps"),
)
"""The settings on the help page: (flag, help). `--help-all` lists all of them with their defaults."""


def run(argv: Sequence[str]) -> int:
    """Parse, check, claim the folder, train, save; prints where the files are."""
    options, flags = _parser().parse_known_args(argv)
    with while_loading():
        from taopd.cli.lab_paths import check_lab, lab_settings
        from taopd.trainer import settings_file as train_config

    if options.help_all:
        print(train_config.help_all())
        return 0
    settings = train_config.parse_settings(
        options.config, flags, lab=lab_settings, check_lab=check_lab, own=_parser().flags()
    )
    return _train(
        settings,
        resume=options.resume or options.resume_with_changes,
        changes=options.resume_with_changes,
        overwrite=options.overwrite,
        quiet=options.quiet,
        checked=not options.skip_check,
    )


def _parser() -> Parser:
    parser = Parser(
        prog="taopd train",
        usage="--config FILE [--name value ...] [options]",
        description="Distill a student on its own rollouts. Every field of TeachabilityConfig, "
        "trl.DistillationConfig, trl.ModelConfig and trl.ScriptArguments is a setting and a flag.",
        epilog="example:\n"
        "  taopd train --config recipes/tiny.yaml --budget 0.1 --output_dir runs/tiny",
        settings=SETTINGS,
    )
    add = parser.flag
    parser.add_argument("--config", help=argparse.SUPPRESS)
    add("--resume", "from the newest checkpoint")
    add("--resume-with-changes", "with other settings")
    add("--overwrite", "replace the run in output_dir")
    add("--skip-check", "start without `taopd check`")
    add("--quiet", "no line per step")
    add("--help-all", "every setting with its default")
    return parser


def _train(
    settings: "TrainSettings",
    *,
    resume: bool,
    changes: bool,
    overwrite: bool,
    quiet: bool,
    checked: bool,
) -> int:
    from taopd.runs.folder import RunFolder
    from taopd.runs.jsonl import write_json
    from taopd.trainer import step_lines
    from taopd.trainer.build.from_settings import forget, load_inputs, make_trainer
    from taopd.trainer.checkpoint import resume as train_resume
    from taopd.trainer.environment import environment

    step_lines.plain(quiet=quiet)
    args = settings.training
    path = RunFolder.check(
        args.output_dir,
        command="train",
        resume=resume,
        overwrite=overwrite,
        reads=settings.reads(),
    )
    checkpoint = train_resume.find(args, path, resume=resume)
    if checkpoint is not None and (done := train_resume.finished(args, path, checkpoint)):
        print(f"{path} {done}")
        return 0
    config = {"changed": settings.changed()} | settings.resolved()
    if checkpoint is not None:
        step = train_resume.steps_done(checkpoint)
        differ = train_resume.changed_settings(path, step, settings.resolved(), allowed=changes)
        config |= {"changes": differ} if differ else {}
    inputs = load_inputs(settings)
    existed = path.exists()
    try:
        trainer = make_trainer(settings, inputs)
        _attach(trainer, quiet)
        trainer.accepts_changes = changes
        trainer.go_on, trainer.begin_anew = "go on with --resume", "start anew (--overwrite)"
        looked: dict[str, Any] | None = None
        if checked and checkpoint is None:  # what goes on from a checkpoint has passed once
            from taopd.cli.check import before_training

            looked = before_training(settings, inputs, trainer, quiet=quiet)
    except BaseException:
        forget(path, existed)
        raise
    # Every rank has checked the folder before the first one claims it.
    args.distributed_state.wait_for_everyone()
    with contextlib.ExitStack() as held:
        if args.process_index == 0:
            held.enter_context(_claim(path, resume=resume, overwrite=overwrite))
            write_json(path / "config.json", {"command": "train"} | config)
            about = environment(seed=args.seed, data_seed=args.data_seed)
            write_json(path / "env.json", about)
            if looked is not None:
                write_json(path / "check.json", looked)
        return _run_or_say_where(trainer, RunFolder(path=path), checkpoint)


@contextlib.contextmanager
def _claim(path: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Hold the run folder; locked before it is emptied."""
    from taopd.runs.folder import RunFolder, cannot_write_to
    from taopd.runs.lock import hold

    with cannot_write_to(path):
        path.mkdir(parents=True, exist_ok=True)
    with hold(path):
        RunFolder.create(path, resume=resume, overwrite=overwrite)
        yield


def _run_or_say_where(
    trainer: "TeachabilityTrainer", folder: "RunFolder", checkpoint: Path | None
) -> int:
    """Train; after an interrupt or a full disk say where the newest checkpoint is."""
    from taopd.trainer.checkpoint import resume as train_resume

    try:
        code = _run(trainer, folder, checkpoint)
        # Together: a process that leaves first can take the connection from under another.
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
        return code
    except KeyboardInterrupt as error:
        newest = folder.newest_checkpoint()
        where = f"the newest checkpoint is {newest}; {trainer.go_on}" if newest else "no checkpoint"
        if trainer.is_world_process_zero():
            print(f"taopd train: interrupted in {folder.path}; {where}", file=sys.stderr)
        return exit_code(error)
    except Exception as error:
        if (disk := train_resume.disk_error(error, folder.path)) is None:
            raise
        raise disk from error


def _attach(trainer: "TeachabilityTrainer", quiet: bool) -> None:
    """A line per step unless quiet, and tables for a tracker that is active."""
    from taopd.trainer import tracker_tables as live
    from taopd.trainer.step_lines import StepLines

    if quiet:
        trainer.remove_callback(StepLines)
    live.attach(trainer)


def _run(trainer: "TeachabilityTrainer", folder: "RunFolder", checkpoint: Path | None) -> int:
    from taopd.runs.folder import MODEL_FOLDER
    from taopd.trainer.checkpoint import resume as train_resume
    from taopd.trainer.run_record import write_results

    started = time.perf_counter()
    metrics = train_resume.train(trainer, checkpoint)
    seconds = time.perf_counter() - started
    train_resume.save_student(trainer, folder.path)
    if not trainer.is_world_process_zero():
        return 0
    resumed_from = checkpoint.name if checkpoint else None
    results = write_results(
        trainer, metrics, seconds=seconds, resumed_from=resumed_from, model=MODEL_FOLDER
    )
    print(f"student: {folder.path / MODEL_FOLDER}\nresults: {results}")
    return 0
