"""Runs of `taopd train` in processes that are forked from one that has imported everything.

A start then costs a fraction of a second. Several processes train under FSDP2 over gloo. accelerate starts
FSDP2 on GPUs only, so they call themselves GPU processes (`on_cpus`); nothing else is changed.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

TIMEOUT_S = 240.0
HOLD_S = 0.5
LAUNCHER_S = 0.05
"""How long the other processes live after the first was killed; launchers end them."""
FSDP2 = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}}


class ForkedRun:
    """`taopd train` in one process or several.

    Args:
        arguments: of `taopd`.
        log: takes what all processes print.
        hold_student: leave the student's folder under its partial name for `HOLD_S`: it is there for a
            millisecond otherwise, which a busy machine sleeps through.
        fsdp2: several processes may train under FSDP2; else under DDP.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        num_processes: int = 1,
        *,
        hold_student: bool = False,
        fsdp2: bool = True,
    ) -> None:
        port = free_port()
        self._processes = [
            _fork(arguments, log, rank, num_processes, port, hold_student, fsdp2)
            for rank in range(num_processes)
        ]
        self._codes: dict[int, int] = {}

    def code(self) -> int | None:
        """The highest exit code, None while a process runs; below zero for a signal."""
        for process in self._processes:
            if process not in self._codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if not found:
                    return None
                self._codes[process] = os.waitstatus_to_exitcode(status)
        return max(self._codes.values(), key=abs)

    def wait(self) -> int:
        """The exit code at the end.

        Raises:
            TimeoutError: there is none in `TIMEOUT_S`.
        """
        code = until(self.code)
        if code is None:
            self.kill(0)
            raise TimeoutError(f"no end after {TIMEOUT_S:.0f} s")
        return code

    def send(self, number: int, to: int) -> None:
        """A signal to one process."""
        os.kill(self._processes[to], number)

    def kill(self, first: int) -> bool:
        """SIGKILL to one process, and to the others as a launcher does; whether it still ran."""
        target = self._processes[first % len(self._processes)]
        for process in sorted(self._processes, key=lambda process: process != target):
            if process not in self._codes:
                os.kill(process, signal.SIGKILL)
            if process == target and len(self._processes) > 1:
                time.sleep(LAUNCHER_S)
        self.wait()
        return self._codes[target] == -signal.SIGKILL


def until(holds: Callable[[], Any]) -> Any:
    """The first value that is not None, or None after `TIMEOUT_S`."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        if (value := holds()) is not None:
            return value
        time.sleep(0.001)
    return None


def free_port() -> int:
    """A TCP port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def be_rank(rank: int, size: int, port: int) -> None:
    """Set the environment variables of one rank, as torchrun does."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in values.items()}


def leave() -> NoReturn:
    """End this rank at once, with exit code 0.

    The interpreter's own end aborts now and then: a thread of gloo may still hold a tensor, and Python before
    3.14 ends a thread that waits for its lock by an exception that C++ does not let pass.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def on_cpus() -> None:
    """Let accelerate start FSDP2 in this process."""
    import accelerate.state
    from accelerate.utils import DistributedType

    make = accelerate.state.PartialState.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    accelerate.state.PartialState.__init__ = made


def _hold_student() -> None:
    import taopd.trainer.checkpoint.resume as module

    replace = module.replace_folder

    def held(partial: Path, final: Path) -> None:
        time.sleep(HOLD_S)
        replace(partial, final)

    module.replace_folder = held


def _fork(
    arguments: list[str],
    log: Path,
    rank: int,
    num_processes: int,
    port: int,
    hold_student: bool,
    fsdp2: bool,
) -> int:
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        # As started from a terminal: a shell's background jobs ignore Ctrl-C, and so do their children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # A handler of the parent's may hold a stream that the parent has closed.
        logging.raiseExceptions = False
        if num_processes > 1:
            be_rank(rank, num_processes, port)
            if fsdp2:
                on_cpus()
        if hold_student:
            _hold_student()
        from taopd.cli import main as taopd

        code = taopd(arguments)
    finally:
        os._exit(code)
