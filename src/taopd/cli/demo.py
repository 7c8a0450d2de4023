"""`taopd demo`: the tiny lab, trains teacher and student, distills, draws a table and a picture."""

from collections.abc import Sequence
from pathlib import Path

from taopd.cli import Parser
from taopd.cli.progress import CountedProgress

_VARIANTS = ("dialect", "bilingual", "reversal", "termination", "fallible")


def run(argv: Sequence[str]) -> int:
    """Parse the flags and run the demo; the heavy imports come after `--help`."""
    parser = Parser(
        prog="taopd demo",
        description="Make a tiny teacher and student, distill the student on its own rollouts at "
        "a 10 % budget next to full distillation and a random control, and show what happened.",
        epilog="example:\n  taopd demo --output runs/demo --overwrite",
    )
    parser.flag("--all", "every selector and three seeds (much longer)")
    parser.flag("--output FOLDER", "run folder", default=Path("runs/demo"))
    parser.flag("--overwrite", "start anew in a folder that holds a run")
    parser.flag("--resume", "go on with the run in the folder")
    parser.flag("--steps N", "optimizer steps per arm (default: about 300)", type=_steps)
    parser.flag(
        "--variant NAME",
        "dialect: the method should win; reversal: it must lose",
        choices=_VARIANTS,
        default="dialect",
    )
    options = parser.parse_args(argv)

    from taopd.experiments.lab.demo import run_demo
    from taopd.report.figures.demo import draw, markdown, table
    from taopd.runs.jsonl import write_text

    kept = f"finished arms are kept in {options.output}; go on with --resume"
    with CountedProgress(kept) as advance:
        results = run_demo(
            output_dir=options.output,
            variant=options.variant,
            all_arms=options.all,
            steps=options.steps,
            overwrite=options.overwrite,
            resume=options.resume,
            progress=advance,
        )
    from taopd.report.console import plain_console

    plain_console().print(table(results))
    pictures = draw(results, options.output)
    write_text(options.output / "summary.md", markdown(results))
    print(f"results: {options.output / 'results.json'}")
    print(f"picture: {pictures[0]}")
    print(f"student: {options.output / 'best-student'} (arm {results['best_student']})")
    return 0


def _steps(text: str) -> int:
    steps = int(text)
    if steps < 1:
        raise ValueError(text)
    return steps
