"""How much of a batch `taopd check` looks at, what one completion may say, and what is printed for machines.

Oracles: products by hand, a strict JSON parser.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml

from taopd import cli
from taopd.preflight import items
from taopd.preflight.probe import CPU_WORK, LEAST_COMPLETIONS, MOST_COMPLETIONS, _num_completions
from taopd.preflight.rollout_checks import check_truncation
from taopd.preflight.verdict import judge


def pair(width):
    """Two models of width^2 parameters, without memory."""
    return [torch.nn.Linear(width, width, bias=False, device="meta") for _ in range(2)]


@pytest.mark.parametrize(
    ("width", "tokens", "batch", "device", "expected"),
    [
        (100, 50, 8, "cpu", 8),
        (100, 50, 500, "cpu", MOST_COMPLETIONS),
        (11_600, 48, 16, "cpu", LEAST_COMPLETIONS),  # 135 M parameters each
        (11_600, 48, 16, "cuda", 16),
        (11_600, 48, 2, "cpu", 2),
        (5_000, 100, 32, "cpu", 10),
    ],
)
def test_a_large_pair_on_a_cpu_is_measured_on_fewer_completions(
    width, tokens, batch, device, expected
):
    accelerator = SimpleNamespace(device=torch.device(device))
    found = _num_completions(pair(width), tokens, batch, accelerator)
    assert found == expected
    if device == "cpu" and LEAST_COMPLETIONS < found < min(batch, MOST_COMPLETIONS):
        assert found * tokens * 2 * width**2 <= CPU_WORK < (found + 1) * tokens * 2 * width**2


@pytest.mark.parametrize(
    ("ended", "level"),
    [
        ([True] * 3 + [False], "pass"),
        ([True] * 2 + [False] * 2, "warn"),
        ([False], "warn"),
        ([True] * 30 + [False] * 2, "pass"),
        ([True] * 28 + [False] * 4, "warn"),
    ],
)
def test_a_single_cut_completion_of_few_is_no_warning(ended, level):
    measured = SimpleNamespace(ended=torch.tensor(ended), max_tokens=9)
    subject = SimpleNamespace(trainer=SimpleNamespace(max_completion_length=9))
    assert check_truncation(subject, measured).level == level


def test_json_is_json_whatever_was_measured(micro_lab, tmp_path, monkeypatch, capsys):
    """An infinite KL or error: JSON has no word for it, and check.json holds null too."""
    names = {"model_name_or_path": micro_lab.student, "dataset_name": micro_lab.prompts}
    names |= {"teacher_model_name_or_path": micro_lab.teacher, "output_dir": tmp_path / "run"}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({name: str(path) for name, path in names.items()}))
    measured = judge("teacher KL", "inf", [], figures={"nats": math.inf, "error": math.nan})
    monkeypatch.setattr(items, "verdicts", lambda subject: iter([measured]))
    assert cli.main(["check", str(config), "--use_cpu", "true", "--bf16", "false", "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["items"][0]["figures"] == {"nats": None, "error": None}
