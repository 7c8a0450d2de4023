"""`taopd demo`: the tiny lab, trains teacher and student, distills, draws a table and a picture."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taopd.cli import Parser, positive
from taopd.cli.progress import CountedProgress
from taopd.errors import ConfigError

PAIR = Path("runs/smollm2")
"""Where `recipes/studies/smollm2.yaml` looks for the models too."""
_VARIANTS = (
    *("dialect", "bilingual", "reversal", "termination", "fallible"),
    *("accent", "loanwords", "jargon", "signoff"),
)


def run(argv: Sequence[str]) -> int:
    """Parse the flags and run the demo; the heavy imports come after `--help`."""
    parser = Parser(
        prog="taopd demo",
        description="Make a tiny teacher and student, distill the student four ways, and show what happened: "
        "on every token, and on a tenth of the tokens that the published selector, the default method or "
        "chance selects.",
        epilog="example:\n  taopd demo --output runs/demo --overwrite",
    )
    parser.flag("--all", "every selector and three seeds (much longer)")
    parser.flag("--real", "SmolLM2-135M and word problems in place of the tiny lab (long)")
    parser.flag("--output FOLDER", "run folder (default: runs/demo, runs/real)", type=Path)
    parser.flag("--overwrite", "start anew in a folder that holds a run")
    parser.flag("--resume", "go on with the run in the folder")
    parser.flag(
        "--steps N", "optimizer steps per arm (default: 300; with --real 24)", type=positive
    )
    parser.flag(
        "--variant NAME",
        "dialect, the default: the method should win; reversal: the published selector must lose",
        choices=_VARIANTS,
    )
    options = parser.parse_args(argv)
    options.output = options.output or Path("runs/real" if options.real else "runs/demo")
    if options.real:
        for name in ("all", "variant"):
            if getattr(options, name):
                raise ConfigError(
                    f"--{name} is for the tiny lab, and would do nothing with --real: drop it"
                )
        return _run_real(options)

    from taopd.experiments.lab.demo import run_demo
    from taopd.report.figures.demo import draw, markdown, table
    from taopd.runs.jsonl import write_text

    kept = f"finished arms are kept in {options.output}; go on with --resume"
    with CountedProgress(kept) as advance:
        results = run_demo(
            output_dir=options.output,
            variant=options.variant or "dialect",
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


def _run_real(options: Any) -> int:
    """Make the pair if there is none, then run the four arms as `taopd compare` runs a study."""
    from taopd.cli.compare import run_plan
    from taopd.experiments.smollm2 import make_pair
    from taopd.experiments.smollm2.real import arms_that_fit, real_study
    from taopd.experiments.study.run import OWNED, plan_study
    from taopd.runs.folder import RunFolder

    RunFolder.check(
        options.output,
        command="compare",
        resume=options.resume,
        overwrite=options.overwrite,
        also_owns=OWNED,
    )
    options.workers = arms_that_fit()
    with CountedProgress("the pair is made anew by the next run") as advance:
        pair = make_pair(PAIR, progress=advance)
    teacher = pair.teacher_accuracy
    print(f"teacher: {100 * teacher['accuracy']:.1f} % ± {100 * teacher['standard_error']:.1f}")
    plan = plan_study(real_study(pair, steps=options.steps))
    command = shlex.join(["taopd", "demo", "--real", "--output", str(options.output), "--resume"])
    return run_plan(plan, options.output, command, options)
