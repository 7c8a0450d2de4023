"""Whole processes against a scripted server, an interrupted one and two ranks: seconds to start each."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.test_ranks import launch
from tests.scripted_server import ScriptedServer, slow
from tests.unit.test_teacher_transport import Echo


def test_a_process_with_requests_in_flight_ends_at_once():
    """Ctrl-C while the teacher is waited for: the interpreter must not wait for the patience to end."""
    with Echo() as server:
        server.always = slow(60.0)
        code = (
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
        settings = {"teacher_url": server.url, "loss": "sampled_reverse_kl"}
        # A rank that waits for ever would be a TimeoutExpired.
        with pytest.raises(AssertionError, match=r"not this one|failed on another process"):
            launch(micro_lab, tmp_path / "two", 2, settings | {"per_device_train_batch_size": 4})
    assert refused
