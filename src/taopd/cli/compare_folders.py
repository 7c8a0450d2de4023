"""`taopd compare FOLDER FOLDER ...`: finished runs, evaluations and studies side by side; nothing is run."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taopd.report.folders import Study


def compare_folders(folders: Sequence[Path], output: Path | None, *, overwrite: bool) -> int:
    """Print a table of arms and one of paired differences; write both where `output` is given.

    Raises:
        ConfigError: a folder twice, also as an arm of another one; `output` without anything to write.
        DataError: folders that are missing, hold nothing to compare, or do not fit together.
    """
    from taopd.errors import ConfigError
    from taopd.report import comparison
    from taopd.report.console import plain_console
    from taopd.report.folders import read_folders
    from taopd.report.study_table import table
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
        console.print(table(study.results))
        console.print(study.results["noise_floor"]["words"], highlight=False)
    if compared is not None:
        for each in comparison.tables(compared):
            console.print(each)
        console.print(f"{comparison.UNIT}. p: Holm-corrected.", highlight=False)
        for name in compared["without_evaluation"]:
            print(f"without an evaluation: {name}")
    else:
        beside = [run.name for run in sources.runs if not _of_one(run.path, sources.studies)]
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


def _of_one(run: Path, studies: "Sequence[Study]") -> bool:
    return any(run.is_relative_to(study.path) for study in studies)
