"""`taopd compare`: arms x seeds from a study file, in processes of their own, with error bars at the end."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taopd.cli import Parser, exit_code, positive
from taopd.errors import ConfigError
from taopd.runs.paths import expanded

if TYPE_CHECKING:
    from taopd.experiments.study.run import StudyPlan


def run(argv: Sequence[str]) -> int:
    """Check, run, analyse, draw; or analyse a folder of finished arms."""
    options = _parser().parse_args(argv)
    if (folders := _folders(options.study)) is not None:
        for name in ("resume", "workers", "list"):
            if getattr(options, name):
                raise ConfigError(
                    f"--{name} is for a study file; folders are read, and nothing is run"
                )
        if len(folders) == 1:
            return _compare_folder(folders[0], options.output, overwrite=options.overwrite)
        return _side_by_side(folders, options.output, overwrite=options.overwrite)
    (options.study,) = options.study

    from taopd.experiments.study.file import load_study_file
    from taopd.experiments.study.run import OWNED, plan_study

    study = load_study_file(options.study)
    output = options.output or expanded(study.output or Path("runs") / Path(options.study).stem)
    if options.list:
        _print_arms(study)
        return 0
    from taopd.runs.folder import RunFolder

    RunFolder.check(
        output,
        command="compare",
        resume=options.resume,
        overwrite=options.overwrite,
        also_owns=OWNED,
        reads=(options.study, study.student, study.teacher, study.prompts, study.test_prompts),
    )
    from taopd.cli.progress import CountedProgress

    with CountedProgress() as advance:
        plan = plan_study(study, progress=advance)
    command = shlex.join(["taopd", "compare", options.study, "--output", str(output), "--resume"])
    return run_plan(plan, output, command, options)


def _parser() -> Parser:
    parser = Parser(
        prog="taopd compare",
        description="Every arm of a study with every seed, each in its own process: mean, median, interval "
        "over seeds, collapsed seeds, paired differences to full distillation and to random tokens with "
        "corrected p, a picture, and the smallest difference that the seeds can detect.",
        epilog="The file: student, teacher, prompts (or lab: dialect), config (settings of all arms), arms\n"
        "(a list) and/or grid (setting: list of values), seeds, rates (learning rates, each arm at each),\n"
        "equal (steps, update_norm, selected_tokens or seconds), evaluate_every, num_test_prompts,\n"
        "random_control, full_control, output, ...\n\n"
        "example:\n  taopd compare recipes/studies/tiny.yaml --output runs/tiny-study\n"
        "  taopd compare runs/a runs/b runs/a-eval runs/b-eval",
    )
    add = parser.flag
    parser.add_argument(
        "study",
        nargs="+",
        metavar="STUDY",
        help="study file (YAML); or folders of train, evaluate, compare and diagnose: nothing is run",
    )
    add(
        "--output FOLDER",
        "where to write (default: output of the study, or runs/<name of the file>)",
        type=Path,
    )
    add("--resume", "continue: finished arms are kept, long ones go on from their checkpoints")
    add("--overwrite", "start anew in a folder that holds a run")
    add("--workers N", "arms at a time (default: one per GPU or core)", type=positive)
    add("--list", "show the arms, controls included, and stop")
    return parser


def _folders(names: Sequence[str]) -> list[Path] | None:
    """The arguments as folders; None: one study file.

    Raises:
        ConfigError: several arguments, of which one is no folder.
    """
    paths = [expanded(name) for name in names]
    for path in paths:
        if len(paths) > 1 and not path.is_dir():
            raise ConfigError(
                f"{path} is no folder: compare takes one study file, or folders that have finished"
            )
    return paths if paths[0].is_dir() else None


def run_plan(plan: "StudyPlan", output: Path, command: str, options: Any) -> int:
    """Run a study and show its results; `command` is what goes on with it after an interruption."""
    from taopd.cli.study_progress import StudyProgress
    from taopd.experiments.study.run import run_study

    try:
        with StudyProgress(plan, output) as shown:
            results = run_study(
                plan,
                output=output,
                resume=options.resume,
                overwrite=options.overwrite,
                num_workers=options.workers,
                progress=shown,
            )
    except KeyboardInterrupt as error:
        done = sum((plan.folder_of(r, output) / "results.json").exists() for r in plan.runs)
        print(
            f"taopd compare: interrupted; {done} of {len(plan.runs)} arms are finished and kept in "
            f"{output}. Go on with:\n  {command}",
            file=sys.stderr,
        )
        return exit_code(error)
    _show(results, output)
    return 0


def _compare_folder(folder: Path, output: Path | None, *, overwrite: bool) -> int:
    """Analyse what has finished, with the study's own question and controls if it left them there.

    A study that has all its results has its tables too: they are shown, and nothing is written.
    """
    from taopd.experiments.study.finished import SO_FAR, WRITTEN, analyse_finished, whole_results
    from taopd.runs.folder import RunFolder, cannot_write_to, unclaimed_on_error
    from taopd.runs.jsonl import write_json

    if output is None and (results := whole_results(folder)) is not None:
        _print_tables(results)
        _say_where(folder, folder / "accuracy.png")
        return 0
    results, timings = analyse_finished(folder)
    target = output or folder / SO_FAR
    if output is None:  # Part of the study's own folder, written anew by every call.
        with cannot_write_to(target):
            target.mkdir(parents=True, exist_ok=True)
    else:
        RunFolder.check(output, overwrite=overwrite, also_owns=WRITTEN, reads=(folder,))
        RunFolder.create(output, overwrite=overwrite, also_owns=WRITTEN)
    with unclaimed_on_error(target, ("results.json", "timings.json")):
        write_json(target / "results.json", results)
        write_json(target / "timings.json", timings)
        _show(results, target)
    return 0


def _side_by_side(folders: Sequence[Path], output: Path | None, *, overwrite: bool) -> int:
    """Finished runs, evaluations and studies side by side: a table of arms and one of paired differences,
    printed, and written where `output` is given; nothing is run.

    Raises:
        ConfigError: a folder twice, also as an arm of another one; `output` without anything to write.
        DataError: folders that are missing, hold nothing to compare, or do not fit together.
    """
    from taopd.report import comparison
    from taopd.report.console import plain_console
    from taopd.report.folders import read_folders
    from taopd.runs.folder import RunFolder
    from taopd.runs.jsonl import write_json, write_text
    from taopd.runs.schemas import check_study

    if output is not None:
        RunFolder.check(output, overwrite=overwrite, reads=folders)
    sources, console = read_folders(list(folders)), plain_console()
    whole = [study for study in sources.studies if "comparisons" in study.results]
    # A study has an outcome of its own: beside one, evaluations are welcome and not needed.
    compared = None
    if not whole or len(sources.evaluations) > 1:
        compared = comparison.compare(sources)
    elif output is not None:
        raise ConfigError(
            f"--output {output}: there is nothing to write, each of these studies has its table in its own "
            "folder; drop --output, or name two evaluations as well"
        )
    for study in whole:
        check_study(study.results, str(study.path / "results.json"))
        _print_tables(study.results)
    if compared is not None:
        for each in comparison.tables(compared):
            console.print(each)
        console.print(f"{comparison.UNIT}. p: Holm-corrected.", highlight=False)
        for name in compared["without_evaluation"]:
            print(f"without an evaluation: {name}")
    else:
        studies = [study.path for study in sources.studies]
        beside = [r.name for r in sources.runs if not any(map(r.path.is_relative_to, studies))]
        beside += [evaluation.name for evaluation in sources.evaluations]
        if beside:
            print(f"not compared, which takes two evaluations: {', '.join(beside)}")
    others = [*sources.banks, *sources.gains, *sources.diagnostics, *sources.one_steps]
    if others:
        print(f"shown by the report: {', '.join(map(str, dict.fromkeys(others)))}")
    if output is not None:
        assert compared is not None  # Else it was refused above.
        output = RunFolder.create(output, overwrite=overwrite).path
        write_json(output / "comparison.json", compared)
        write_text(output / "comparison.md", comparison.markdown(compared))
        print(f"table:    {output / 'comparison.md'}")
    print(f"more:     taopd report {shlex.join(map(str, folders))}")
    return 0


def _show(results: dict[str, Any], output: Path) -> None:
    import json

    from taopd.report.figures.rates import draw as draw_rates
    from taopd.report.figures.study import draw
    from taopd.report.study_table import markdown
    from taopd.runs.jsonl import write_text

    _print_tables(results)
    if "rates" in results:
        draw_rates(results, output)
    seconds = json.loads((output / "timings.json").read_text(encoding="utf-8"))
    picture = draw(results, output)[0]
    write_text(output / "summary.md", markdown(results, seconds))
    _say_where(output, picture)


def _print_tables(results: dict[str, Any]) -> None:
    from taopd.report.console import plain_console
    from taopd.report.rates_table import shared_words
    from taopd.report.rates_table import table as rates_table
    from taopd.report.study_table import table

    console = plain_console()
    console.print(table(results))
    console.print(results["noise_floor"]["words"], highlight=False)
    if "rates" in results:
        console.print(rates_table(results))
        console.print(shared_words(results), highlight=False)


def _say_where(folder: Path, picture: Path) -> None:
    """Name the files of a study that are there: its owner may have moved one."""
    found = {"results": folder / "results.json", "table": folder / "summary.md", "picture": picture}
    for what, path in found.items():
        if path.exists():
            print(f"{what + ':':<9} {path}")
    print(f"more:     taopd report {shlex.quote(str(folder))}")


def _print_arms(study: Any) -> None:
    from taopd.experiments.study.expand import expand
    from taopd.experiments.study.run import base_config

    arms = expand(study, base_config(study))
    for arm in arms:
        settings = ", ".join(f"{key}={value}" for key, value in arm.settings.items())
        print(f"{arm.name:<36} {settings}{'  (added control)' if arm.added else ''}")
    rates = f" (learning rates: {len(study.rates)})" if study.rates else ""
    print(f"{len(arms)} arms{rates} x {len(study.seeds)} seed(s), equal {study.equal}")
