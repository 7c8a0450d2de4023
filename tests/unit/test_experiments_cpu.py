"""Threads and number format of an arm on a CPU."""

import pytest
import torch

from taopd.experiments import cpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_small_model_keeps_to_one_thread_and_float32_whatever_the_machine(monkeypatch):
    monkeypatch.setenv("TAOPD_THREADS", "4")
    monkeypatch.setattr(cpu, "bf16_speedup", lambda: 3.0)
    assert cpu.num_threads(100_000) == 1 and not cpu.use_bf16(100_000)
    assert cpu.num_threads(135_000_000) == 4 and cpu.use_bf16(135_000_000)
    monkeypatch.setattr(cpu, "bf16_speedup", lambda: 1.1)
    assert not cpu.use_bf16(135_000_000)


def test_the_speedup_is_that_of_the_two_products():
    speedup = cpu.bf16_speedup()
    print(f"bfloat16 is {speedup:.2f} times as fast as float32")
    assert 0.001 < speedup < 100
