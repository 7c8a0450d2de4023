"""Evaluation.

Oracles: counting by hand, enumeration of subsets, and greedy decoding one prompt at a time.
"""

import itertools
import math
import statistics
import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import binomtest
from transformers import GenerationConfig

from taopd.cli import evaluate as cli_evaluate
from taopd.errors import ConfigError, DataError
from taopd.experiments.evaluation.accuracy import pass_at_k, summarize
from taopd.experiments.evaluation.evaluate import evaluate
from taopd.experiments.evaluation.grading import (
    LAB_FILE,
    Grader,
    answer_text,
    grading_of,
    is_mathematical,
)
from taopd.experiments.lab.build import MANIFEST
from taopd.experiments.study.statistics import wilson
from taopd.models.output_head import inside_peft
from taopd.models.prompts import load_model, load_prompts, load_tokenizer
from taopd.models.stop_tokens import sampler_stop_ids
from tests.conftest import make_model, make_rows, make_tokenizer

SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 16, "match": "regex:[0-9]"}


@pytest.fixture(scope="module")
def student(micro_lab):
    return load_model(micro_lab.student), load_tokenizer(micro_lab.student)


@pytest.fixture(scope="module")
def rows(micro_lab):
    return load_prompts(micro_lab.prompts, split="test")


def run(student, rows, **settings: Any):
    """`evaluate` with (model, tokenizer) as one argument."""
    model, tokenizer = student
    return evaluate(model, tokenizer, rows, **settings)


class Scripted(torch.nn.Module):
    """Stands in for a model: `generate` returns completions written by hand (<eos> 2, <pad> 0)."""

    def __init__(self, model, completions):
        super().__init__()
        self.config, self.generation_config = model.config, model.generation_config
        self.device = torch.device("cpu")
        self.completions = itertools.cycle(completions)

    def generate(self, input_ids, attention_mask, generation_config):
        new = torch.tensor([next(self.completions) for _ in input_ids])
        return torch.cat([input_ids, new], dim=1)


def test_accuracy_errors_and_counts_by_hand():
    """Two problems, four samples: 3 of 4 and 1 of 4 right."""
    right, wrong, long = [5, 2, 0], [6, 2, 0], [7, 7, 7]
    scripted = Scripted(make_model(seed=0), [right, right, right, wrong, right, wrong, wrong, long])
    rows: list[dict[str, Any]] = [{"prompt": "1", "answer": "1"}, {"prompt": "1 + 1", "answer": 1}]
    result = evaluate(
        scripted, make_tokenizer(), rows, num_samples=4, max_new_tokens=3, batch_size=3
    )
    assert result.accuracy == 0.5
    assert result.standard_error == pytest.approx(statistics.stdev([0.75, 0.25]) / math.sqrt(2))
    assert result.pass_at_k == {1: 0.5, 2: pytest.approx((1.0 + 0.5) / 2), 4: 1.0}
    # pass@2 of the two problems is 1 and 0.5, pass@4 is 1 for both.
    spread = statistics.stdev([1.0, 0.5]) / math.sqrt(2)
    assert result.pass_at_k_standard_error == {
        1: result.standard_error,
        2: pytest.approx(spread),
        4: 0.0,
    }
    assert (result.num_problems, result.num_samples, result.num_truncated) == (2, 4, 1)
    assert [t["correct"] for t in result.transcripts] == [True] * 3 + [False, True] + [False] * 3
    assert [t["completion"] for t in result.transcripts[-2:]] == ["2", "3 3 3"]
    assert [t["num_tokens"] for t in result.transcripts[-2:]] == [1, 3]
    assert "transcripts" not in result.summary()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_equals_enumeration_of_subsets(n):
    for right in range(n + 1):
        outcomes = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(outcomes, k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_one_problem_has_no_standard_error():
    transcript = {"problem": 0, "correct": True, "truncated": False, "parsed": True}
    result = summarize([transcript] * 3, num_problems=1, num_samples=3, settings={})
    assert result.standard_error is None and set(result.pass_at_k) == {1, 2, 3}


def test_greedy_equals_one_prompt_at_a_time_without_padding(student, rows):
    model, tokenizer = student
    result = evaluate(model, tokenizer, rows, greedy=True, **SETTINGS)
    for row, transcript in zip(rows, result.transcripts, strict=True):
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        expected = ids
        for _ in range(SETTINGS["max_new_tokens"]):
            token = model(expected).logits[0, -1].argmax().reshape(1, 1)
            if token.item() == tokenizer.eos_token_id:
                break
            expected = torch.cat([expected, token], dim=1)
        text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
        assert transcript["completion"] == text


def test_top_k_of_one_is_greedy_and_the_cut_is_recorded(student, rows):
    greedy = run(student, rows, greedy=True, **SETTINGS)
    cut = run(student, rows, top_k=1, top_p=0.9, **SETTINGS)
    assert [t["completion"] for t in cut.transcripts] == [
        t["completion"] for t in greedy.transcripts
    ]
    assert (cut.settings["top_k"], cut.settings["top_p"]) == (1, 0.9)
    for bad in ({"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}):
        with pytest.raises(ConfigError, match="top_p="):
            run(student, rows, **bad, **SETTINGS)


def test_nothing_outside_is_disturbed(student, rows):
    model, tokenizer = student
    model.train()
    tokenizer.padding_side = "right"
    torch.manual_seed(5)
    before = torch.get_rng_state()
    evaluate(model, tokenizer, rows, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and tokenizer.padding_side == "right"
    model.eval()
    tokenizer.padding_side = "left"


def test_seed_fixes_the_samples(student, rows):
    def sample(seed):
        result = run(student, rows, num_samples=2, seed=seed, **SETTINGS)
        return [t["completion"] for t in result.transcripts]

    assert sample(1) == sample(1) != sample(2)


def test_sampling_ignores_the_checkpoint_generation_config(student, rows):
    """With top_k=1 in force, two samples of one prompt would always agree."""
    model, _ = student
    model.generation_config.top_k, model.generation_config.do_sample = 1, True
    model.generation_config.repetition_penalty = 5.0
    try:
        result = run(student, rows, num_samples=2, **SETTINGS)
    finally:
        model.generation_config.top_k, model.generation_config.do_sample = 50, False
        model.generation_config.repetition_penalty = 1.0
    pairs = zip(result.transcripts[::2], result.transcripts[1::2], strict=True)
    assert any(a["completion"] != b["completion"] for a, b in pairs)
    assert result.settings["top_k"] == 0 and result.settings["repetition_penalty"] == 1.0


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize(
    "own",
    [
        {"suppress_tokens": list(range(4, 30))},
        {"forced_eos_token_id": 2},
        {"return_dict_in_generate": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"stop_strings": ["w3"]},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda own: next(iter(own)),
)
def test_nothing_of_a_checkpoints_generation_config_changes_the_completions(micro_lab, own, peft):
    model, tokenizer = make_model(seed=0), load_tokenizer(micro_lab.student)
    if peft:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    rows = make_rows(4, "test")
    expected = evaluate(model, tokenizer, rows, **SETTINGS).transcripts
    held = inside_peft(model)
    held.generation_config = found = GenerationConfig(eos_token_id=2, pad_token_id=0, **own)
    assert evaluate(model, tokenizer, rows, **SETTINGS).transcripts == expected
    assert held.generation_config is found


def test_every_eos_id_stops():
    model, tokenizer = make_model(seed=0), make_tokenizer()
    model.generation_config.eos_token_id = [2, 14]
    assert sampler_stop_ids(tokenizer, model) == [2, 14]
    scripted = Scripted(model, [[5, 14, 9]])
    result = evaluate(scripted, tokenizer, make_rows(1, "test"), max_new_tokens=3, match="exact")
    assert result.transcripts[0]["completion"] == "1" and not result.num_truncated


@pytest.mark.parametrize(
    ("match", "completion", "answer", "correct", "parsed"),
    [
        ("exact", " 12\n", "12", True, True),
        ("exact", "1 2", "12", False, True),
        ("regex:[0-9]", "a 1 b 2", "12", True, True),
        ("regex:[0-9]", "a b", "12", False, False),
        ("regex:x(.)", "x1 y3 x2", "1 2", True, True),
        ("regex:[0-9]*", "a b", "12", False, False),
        ("regex:[0-9]*", "a 12", "12", True, True),
        ("math", r"so \boxed{\frac{1}{2}}", "0.5", True, True),
        ("math", "the answer is 12", "12", True, True),
        ("math", "the answer is 13", "12", False, True),
        ("math", "no idea", "12", False, False),
        ("auto", r"It is $\frac{2}{4}$.", r"\frac{1}{2}", True, True),
        ("auto", "it is yes", "yes", False, True),
        ("auto", "yes ", "yes", True, True),
        ("auto", "the result is 1,024", "1024", True, True),
    ],
)
def test_grading_examples(match, completion, answer, correct, parsed):
    verdict = Grader(match)(completion, answer)
    assert (verdict.correct, verdict.parsed) == (correct, parsed)


def test_a_labs_prompts_are_graded_by_its_pattern(tmp_path):
    """Its answers are digits without spaces, which "auto" would take for one number."""
    prompts = tmp_path / "prompts.parquet"
    prompts.write_bytes(b"")
    assert grading_of(prompts) == grading_of("hub/name") == grading_of(None) == "auto"
    (tmp_path / "lab.json").write_text('{"answer_pattern": "[0-9]"}')
    assert grading_of(str(prompts)) == "regex:[0-9]"
    assert Grader(grading_of(prompts))("a 1 b 2", "12").correct
    assert MANIFEST == LAB_FILE


def test_grading_works_in_a_thread():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(Grader("math")("it is 7", "7")))
    thread.start()
    thread.join()
    assert verdicts[0].correct


@pytest.mark.parametrize(
    ("text", "expected"), [("12", True), ("-3.5", True), ("1/2", True), ("x", False)]
)
def test_is_mathematical(text, expected):
    assert is_mathematical(text) is expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"match": "mat"}, "match='mat' is unknown. Did you mean 'math'"),
        ({"match": "regex:("}, "does not compile"),
        ({"match": "regex:"}, "match='regex:': the pattern is empty"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"greedy": True, "num_samples": 2}, "same completion 2 times"),
        ({"greedy": True, "top_p": 0.5}, "top_p=0.5 is of sampling"),
    ],
)
def test_settings_out_of_range(student, rows, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(student, rows, **settings)


def test_bad_rows(student):
    for bad, message in (
        ([], "no rows"),
        ([{"prompt": "1"}], "row 0 of the evaluation set has no 'answer'"),
        ([{"prompt": "1", "answer": None}], "row 0 .* has null as its answer; fill it in"),
        ([{"prompt": None, "answer": "1"}], "row 0 .* has null as its prompt; fill it in"),
        (
            [{"prompt": "1", "answer": ["2", "3"]}],
            r"row 0 .* has \['2', '3'\] as its answer, which",
        ),
        ([{"prompt": "1", "answer": {"value": "2"}}], "row 0 .* neither text nor a number"),
        ([{"prompt": "1", "answer": math.nan}], "row 0 .* has nan as its answer, which is neither"),
        ([{"prompt": "1", "answer": b"2"}], "row 0 .* has b'2' as its answer, which is neither"),
        ([{"prompt": "1", "answer": " "}], "row 0 of the evaluation set has an empty answer"),
        ([{"prompt": "1 " * 60, "answer": "1"}], "row 0 has 60 tokens.*exceeds the context of 64"),
    ):
        with pytest.raises(DataError, match=message):
            run(student, bad, max_new_tokens=10)


@pytest.mark.parametrize(
    ("answer", "text"), [(3.0, "3"), (-0.5, "-0.5"), (3, "3"), ("3.0", "3.0"), (1e300, "1e+300")]
)
def test_a_whole_number_of_a_table_of_floats_is_written_without_a_point(answer, text):
    """A table has them where an answer was missing; under a pattern every "3" was wrong for 3.0."""
    assert answer_text(answer) == text


def test_progress_reaches_the_total(student, rows):
    calls: list[tuple[int, int]] = []
    run(
        student,
        rows,
        num_samples=2,
        progress=lambda done, total: calls.append((done, total)),
        **SETTINGS | {"batch_size": 5},
    )
    assert calls == [(5, 16), (10, 16), (15, 16), (16, 16)]


def test_500_problems_are_one_batch():
    """Greedy and sampled: as many forward passes as one problem takes, a token each."""
    model, tokenizer, rows = (
        make_model(seed=0, hidden_size=48),
        make_tokenizer(),
        make_rows(500, "test"),
    )
    settings: dict[str, Any] = {"max_new_tokens": 10, "batch_size": 500, "match": "regex:[0-9]"}
    sizes = []
    model.register_forward_hook(lambda module, args, output: sizes.append(len(output.logits)))
    evaluate(model, tokenizer, rows, greedy=True, **settings)
    evaluate(model, tokenizer, rows, **settings)
    assert max(sizes) == 500 and 2 <= len(sizes) <= 20


@pytest.mark.parametrize("n", [1, 2, 64, 500])
def test_wilson_intervals_equal_scipys_and_are_wide_at_the_ends(n):
    for right in {0, 1, n // 3, n - 1, n}:
        exact = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert wilson(0.0, n)[0] == 0.0 < wilson(0.0, n)[1]


def test_an_interval_is_no_shorter_than_of_as_many_independent_samples():
    """Ten problems of four samples, 2 right in each but one: the shares differ less than samples do."""
    transcripts = [
        {"problem": p, "sample": s, "correct": s < 2 + (p == 0), "truncated": False, "parsed": True}
        for p in range(10)
        for s in range(4)
    ]
    found = summarize(transcripts, num_problems=10, num_samples=4, settings={})
    assert found.standard_error == pytest.approx(0.025)
    independent = binomtest(21, 40).proportion_ci(method="wilson")
    assert found.intervals[1] == pytest.approx((independent.low, independent.high), abs=1e-9)


def test_none_right_of_64_is_an_interval_and_not_plus_minus_nothing(capsys):
    """4 samples of each of 64 problems: at 0 the problems count, elsewhere the clustered error."""
    rows = [
        {"problem": i // 4, "correct": False, "truncated": False, "parsed": True}
        for i in range(256)
    ]
    none = summarize(rows, num_problems=64, num_samples=4, settings={})
    assert none.intervals[1] == pytest.approx((0.0, 0.0566), abs=1e-4)
    cli_evaluate._print_table("m", none)
    printed = capsys.readouterr().out
    assert "0.0000 [0.0000, 0.0566] (95 % interval)" in printed and "+-" not in printed
    # All four samples of a problem agree: as wide as 64 problems with one sample each.
    agreed = [row | {"correct": row["problem"] < 16} for row in rows]
    found = summarize(agreed, num_problems=64, num_samples=4, settings={})
    assert found.intervals[1] == pytest.approx(wilson(0.25, 64), abs=2e-3)
    assert found.summary()["intervals"]["1"] == found.intervals[1]


def test_a_suites_metrics_have_intervals_too():
    assert cli_evaluate._of_suite(0.0, 0.0, 30) == wilson(0.0, 30)
    assert cli_evaluate._of_suite(12.0, 1.0, 30) == pytest.approx((10.04, 13.96))
