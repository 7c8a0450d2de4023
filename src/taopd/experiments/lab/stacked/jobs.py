"""A pool of worker processes for jobs (stacks of arms); a job whose file exists, of the same arms, is done.

Why processes that take one job after the other, and not one process a job: importing torch and
transformers costs as much as a small job.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taopd.errors import DataError
from taopd.experiments.arm_settings import Arm
from taopd.experiments.kept_arms import digest_of
from taopd.experiments.pool import ONE_THREAD
from taopd.runs.jsonl import write_json
from taopd.runs.validation import NUMBER, TEXT, WHOLE, Some, read_document

JOB = {
    "digest?": TEXT,
    "arms": [{"name": TEXT, "seed": WHOLE, "accuracy_curve": Some((WHOLE, NUMBER))}],
}
WORKER_ENVIRONMENT = ONE_THREAD | {
    # Fresh pages for every large tensor cost as much as the arithmetic; glibc is told to keep them.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The arms of one stack and the path of their results."""

    path: Path
    arms: list[Arm]
    about: dict[str, Any]
    """Written next to the results."""
    trace_every: int = 0
    """Steps between two rows of `stacked.trace`; 0: none. With it come the guard's warnings."""


def run_jobs(
    jobs: list[Job],
    *,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run every job whose file does not exist yet.

    A file says which arms it is of, so that the results of fewer seeds or of other settings are not taken for
    those that are asked for.

    Args:
        num_workers: processes; default one per CPU core.
        progress: called with (finished jobs, all jobs), finished ones of earlier calls included.

    Raises:
        DataError: a file is of other arms, or a job fails; jobs that had finished keep their files.
    """
    waiting = [job for job in jobs if not _is_finished(job)]
    done = len(jobs) - len(waiting)
    progress(done, len(jobs))
    if not waiting:
        return
    before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    os.environ.update(WORKER_ENVIRONMENT)  # Read by libraries when a worker starts.
    pool = ProcessPoolExecutor(
        num_workers or os.cpu_count() or 1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_leave_with_parent,
    )
    try:
        running = {pool.submit(run_job, job): job for job in waiting}
        for future in as_completed(running):
            if error := future.exception():
                name = running[future].path.stem
                raise DataError(f"job {name}: {type(error).__name__}: {error}") from error
            done += 1
            progress(done, len(jobs))
    finally:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _is_finished(job: Job) -> bool:
    """Whether a job's file is there; one of other arms is refused."""
    if not job.path.exists():
        return False
    found = read_document(job.path, JOB)
    asked = [(arm.name, arm.seed, arm.config.get("max_steps")) for arm in job.arms]
    # Files of earlier versions have no digest.
    rows = [(row["name"], row["seed"], row["accuracy_curve"][-1][0]) for row in found["arms"]]
    digest = digest_of(job.arms)
    if rows != asked or found.get("digest", digest) != digest:
        raise DataError(
            f"{job.path} holds a finished job of other seeds or settings than these: use another folder, or "
            "delete the file, and its job runs again"
        )
    return True


def _leave_with_parent() -> None:
    """End this worker when its parent does, even by SIGKILL: a job of an hour would run on for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_job(job: Job) -> None:
    """Run one job in this process and write its file."""
    from taopd.experiments.lab.stacked.run_stack import run_stack
    from taopd.experiments.lab.stacked.trace import COLUMNS, Trace

    started = time.process_time()
    trace = Trace(job.arms[0].token_kinds or [], len(job.arms), every=max(1, job.trace_every))
    observers = [trace] if job.trace_every else []
    rows = run_stack(job.arms, output_dir=str(job.path.parent), observers=observers)
    if job.trace_every:
        for arm, row in enumerate(rows):
            columns = zip(COLUMNS, zip(*trace.rows[arm], strict=True), strict=True)
            row["trace"] = {name: [round(v, 5) for v in values] for name, values in columns}
            row["warned"] = trace.watches[arm].fired
    seconds = round(time.process_time() - started, 1)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        job.path, job.about | {"digest": digest_of(job.arms), "cpu_seconds": seconds, "arms": rows}
    )
