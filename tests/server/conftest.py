"""Tests against a real vLLM, in its own environment: `make test-vllm`. Plain pytest leaves them out."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.vllm_server import PYTHON, VllmServer
from taopd.experiments.lab import build_lab

collect_ignore_glob = [] if PYTHON in os.environ else ["test_*.py"]


@pytest.fixture(scope="session")
def lab():
    """The tiny lab with heads of 32, the least that vLLM's attention on the CPU takes."""
    return build_lab("dialect", head_dim=32, student_width=64, teacher_steps=300, student_steps=300)


@pytest.fixture(scope="session")
def vllm(lab, tmp_path_factory):
    """A running server with the lab's teacher."""
    with VllmServer(lab.teacher, tmp_path_factory.mktemp("vllm") / "log") as server:
        yield server


@pytest.fixture(scope="session")
def models(lab):
    """Student and teacher."""
    return [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (lab.student, lab.teacher)
    ]
