"""Whole processes against a scripted server, an interrupted one and two ranks: seconds to start each."""

import os
import signal
import subprocess
import sys
import time

import torch
from transformers import AutoModelForCausalLM

from tests.conftest import write_config
from tests.scripted_server import ScriptedServer, slow
from tests.unit.test_teacher_transport import Echo


def test_a_process_with_requests_in_flight_ends_at_once():
    """Ctrl-C while the teacher is waited for: the interpreter must not wait for the patience to end."""
    with Echo() as server:
        server.always = slow(60.0)
        code = (
            # A shell's background jobs ignore SIGINT, and so do their children.
            "import signal\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from taopd.teachers import Transport\n"
            f"future = Transport({server.url!r}).submit('/score', {{}}, lambda d: d)\n"
            "print('waiting', flush=True)\n"
            "future.result()\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    assert child.returncode != 0 and "KeyboardInterrupt" in errors
    assert "Task was destroyed" not in errors


def test_a_teacher_that_refuses_one_rank_stops_both(micro_lab, tmp_path):
    """One prompt's sequences are refused: its rank says why, the other does not wait for it."""
    teacher = AutoModelForCausalLM.from_pretrained(micro_lab.teacher, dtype=torch.float32)
    refused = []

    class Picky(ScriptedServer):
        def post(self, path, body):
            if len(body["prompt"]) > 4 and not refused:
                refused.append(body["prompt"])
                return 400, {"error": {"message": "not this one"}}
            return super().post(path, body)

    with Picky(teacher) as server:
        settings = {
            "teacher_url": server.url,
            "loss": "sampled_reverse_kl",
            "score_top_k": 4,
            "max_steps": 1,
            "max_completion_length": 6,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
        }
        config = write_config(micro_lab, tmp_path, **settings)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", "-m", "taopd", "train", "--config", str(config)]
        # A rank that waits for ever would be a TimeoutExpired.
        done = subprocess.run(
            [*command, "--skip-check"],
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    assert refused and done.returncode != 0
    assert "not this one" in done.stderr or "failed on another process" in done.stderr
