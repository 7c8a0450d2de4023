"""`taopd leaderboard`: every selector on every variant of the tiny lab, ranked."""

from collections.abc import Sequence
from pathlib import Path

from taopd.cli import Parser, positive
from taopd.cli.progress import CountedProgress
from taopd.errors import ConfigError


def run(argv: Sequence[str]) -> int:
    """Parse the flags, run what is missing, write the tables; heavy imports come after `--help`."""
    parser = Parser(
        prog="taopd leaderboard",
        description="Train every selector at 2, 5, 10 and 30 % on all variants of the tiny lab, with "
        "sampled and exact reverse KL and five seeds, and rank them. Finished jobs are kept: "
        "a second call goes on, and a new selector runs its own rows alone.",
        epilog="example:\n"
        "  taopd leaderboard\n"
        '  taopd leaderboard --selector "teachability*compatible" --selector mypackage.scores:mine',
    )
    parser.flag(
        "--selector NAME", "only this one; repeatable (default: all)", action="append", default=[]
    )
    parser.flag(
        "--variant NAME", "only this lab; repeatable (default: all)", action="append", default=[]
    )
    parser.flag("--seeds N", "training seeds", default=5)
    parser.flag("--workers N", "processes (default: one per core)", type=positive)
    parser.flag("--jobs FOLDER", "finished jobs", default=Path("runs/leaderboard"))
    parser.flag(
        "--into FILE",
        "the leaderboard; rows of other selectors stay",
        default=Path("docs/results/tinylab.json"),
    )
    options = parser.parse_args(argv)

    from taopd.experiments.lab.leaderboard import run_leaderboard
    from taopd.report.figures.leaderboard import draw, write_page
    from taopd.runs.folder import refuse_file

    refuse_file(options.jobs, f"--jobs {options.jobs}")
    if options.into.is_dir():
        raise ConfigError(f"--into {options.into} is a folder; the leaderboard is a file")
    refuse_file(options.into.parent, f"--into {options.into}: {options.into.parent}")
    kept = f"finished jobs are kept in {options.jobs}; the same command goes on"
    with CountedProgress(kept) as advance:
        board = run_leaderboard(
            folder=options.jobs,
            path=options.into,
            names=options.selector,
            variants=options.variant,
            num_seeds=options.seeds,
            num_workers=options.workers,
            progress=advance,
        )
    picture = options.into.with_suffix(".png")
    draw(board, picture)
    page = options.into.with_suffix(".md")
    write_page(board, page, picture.name)
    for path in (options.into, page, picture):
        print(path)
    return 0
