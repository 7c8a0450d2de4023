"""The fixed-context bank.

Oracles: features from whole-sequence logits of each rollout alone, in float64 and from the definition; the
bytes on disk; a peak resident set measured in a process of its own.
"""

import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from taopd.diagnose.bank import FixedContextBank, Rollouts, read_completions, sample_rollouts
from taopd.diagnose.bank.bank import _support_sizes
from taopd.diagnose.bank.fingerprints import model_fingerprint, tokenizer_fingerprint
from taopd.diagnose.bank.token_features import BANK_TOP_K, features_from_logprobs
from taopd.errors import ConfigError, DataError, NumericsError
from taopd.models.loading import load_model, load_tokenizer
from taopd.signals import signals_from_logprobs
from tests.conftest import WORDS, make_model, make_rows, make_tokenizer

KS = (2, 4, 8)
PROMPTS = [row["prompt"] for row in make_rows(5, "train")]


def models(dtype=torch.float32):
    return (
        make_model(seed=0).to(dtype),
        make_model(seed=1, hidden_size=32).to(dtype),
        make_tokenizer(),
    )


def make_rollouts(num_completions=9, **settings: Any) -> Rollouts:
    student, _, tokenizer = models()
    settings = {"max_tokens": 6, "seed": 3, "batch_size": 4} | settings
    return sample_rollouts(student, tokenizer, PROMPTS, num_completions=num_completions, **settings)


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> FixedContextBank:
    folder = tmp_path_factory.mktemp("bank") / "bank"
    return FixedContextBank.freeze(*models(), make_rollouts(), folder, k=KS)


@pytest.fixture
def copy(bank, tmp_path) -> Path:
    return Path(shutil.copytree(bank.folder, tmp_path / "moved" / "bank"))


def kl(p, q) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def oracle(student: list[float], teacher: list[float], token: int) -> dict[str, float]:
    """Every feature of one position from two lists of probabilities, by the text of docs/math.md."""

    def entropy(p):
        return -sum(x * math.log(x) for x in p if x > 0)

    row = {
        "entropy": entropy(student),
        "teacher_entropy": entropy(teacher),
        "forward_kl": kl(teacher, student),
        "reverse_kl": kl(student, teacher),
        "student_logprob": math.log(student[token]),
        "teacher_logprob": math.log(teacher[token]),
        "student_rank": sorted(student, reverse=True).index(student[token]) + 1,
        "teacher_rank": sorted(teacher, reverse=True).index(teacher[token]) + 1,
    }
    for k in KS:
        own, other = (
            set(sorted(range(len(p)), key=lambda i, p=p: -p[i])[:k]) for p in (student, teacher)
        )
        union = sorted(own | other)
        p, q = ([d[i] / sum(d[j] for j in union) for i in union] for d in (student, teacher))
        row |= {
            f"disagreement_k{k}": kl(q, p),
            f"compatibility_k{k}": sum(teacher[i] for i in own),
            f"bound_k{k}": sum(teacher[i] for i in own & other),
            f"overlap_k{k}": len(own & other) / k,
            f"jaccard_k{k}": len(own & other) / len(union),
            f"bc_k{k}": sum(math.sqrt(a * b) for a, b in zip(p, q, strict=True)),
        }
    return row


def whole_sequence(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Probabilities [T, V] from one forward without padding, in float64."""
    logits = model.double().eval()(torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].softmax(-1)


def test_features_equal_the_definitions_on_whole_sequences_in_float64(bank):
    student, teacher, _ = models(torch.float64)
    rows = []
    for prompt, completion in zip(
        bank.rollouts.prompt_ids, bank.rollouts.completion_ids, strict=True
    ):
        with torch.no_grad():
            p, q = (whole_sequence(model, prompt, completion) for model in (student, teacher))
        rows += [oracle(p[i].tolist(), q[i].tolist(), token) for i, token in enumerate(completion)]
    assert len(rows) == len(bank.tokens) > 30
    for name in rows[0]:
        truth = np.array([row[name] for row in rows])
        assert np.linalg.norm(truth) > 0, f"{name}: vacuous"
        np.testing.assert_allclose(bank.tokens[name], truth, atol=3e-6, rtol=1e-5, err_msg=name)


def test_quadrants_are_by_the_medians_with_the_median_high(bank):
    entropy = bank.tokens["entropy"]
    for k in KS:
        divergence = bank.tokens[f"disagreement_k{k}"]
        # The normalized columns clip 5 % at each end, which no median sees.
        high_h, high_d = entropy >= entropy.median(), divergence >= divergence.median()
        expected = np.select([high_h & high_d, high_h, high_d], [1, 2, 3], 4)
        assert (bank.tokens[f"quadrant_k{k}"] == expected).all()


def test_bookkeeping_columns_by_hand(bank):
    flat = [
        (index, prompt, place, token)
        for index, (prompt, ids) in enumerate(
            zip(bank.rollouts.prompts, bank.rollouts.completion_ids, strict=True)
        )
        for place, token in enumerate(ids)
    ]
    columns = ["completion", "prompt", "position", "token_id"]
    assert bank.tokens[columns].to_numpy().tolist() == [list(row) for row in flat]
    assert bank.rollouts.prompts == [0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_teacher_topk_is_the_teachers_best(bank):
    _, teacher, _ = models(torch.float64)
    prompt, completion = bank.rollouts.prompt_ids[0], bank.rollouts.completion_ids[0]
    with torch.no_grad():
        best = whole_sequence(teacher, prompt, completion).topk(max(KS), dim=-1)
    assert bank.teacher_topk_ids.shape == (len(bank.tokens), max(KS))
    assert torch.equal(bank.teacher_topk_ids[: len(completion)].long(), best.indices)
    torch.testing.assert_close(
        bank.teacher_topk_logprobs[: len(completion)], best.values.log().float()
    )


@pytest.mark.parametrize("k", [1, 3, 16, 40])
def test_features_equal_signals_from_logprobs(k):
    generator = torch.Generator().manual_seed(k)
    student, teacher = (
        (3 * torch.randn(20, 40, generator=generator, dtype=torch.float64)).log_softmax(-1)
        for _ in range(2)
    )
    target = torch.randint(0, 40, (20,), generator=generator)
    ours, _ = features_from_logprobs(student, teacher, target, ks=sorted({2, k}))
    theirs = signals_from_logprobs(student, teacher, target, k=k, full_kl=True)
    for column, field in {
        "entropy": "entropy",
        "teacher_entropy": "teacher_entropy",
        "forward_kl": "forward_kl",
        "reverse_kl": "reverse_kl",
        "student_logprob": "student_logprobs",
        "teacher_logprob": "teacher_logprobs",
        f"disagreement_k{k}": "disagreement",
        f"compatibility_k{k}": "compatibility",
        f"bound_k{k}": "compatibility_bound",
        f"overlap_k{k}": "overlap",
        f"jaccard_k{k}": "jaccard",
        f"bc_k{k}": "bhattacharyya",
    }.items():
        torch.testing.assert_close(ours[column], getattr(theirs, field), msg=column)


def test_freezing_twice_gives_the_same_bytes_wherever_it_lies(bank, tmp_path):
    again = FixedContextBank.freeze(
        *models(), make_rollouts(), tmp_path / "deep" / "er" / "x", k=KS
    )
    names = sorted(path.name for path in bank.folder.iterdir())
    assert names == sorted(path.name for path in again.folder.iterdir())
    assert len(names) == 4
    for name in names:
        assert (bank.folder / name).read_bytes() == (again.folder / name).read_bytes(), name
    text = (bank.folder / "manifest.json").read_text()
    assert str(bank.folder.parent) not in text and "/" not in text


def test_a_moved_bank_opens_and_says_the_same(bank, copy):
    opened = FixedContextBank.open(copy)
    assert opened.tokens.equals(bank.tokens)
    assert opened.rollouts == bank.rollouts
    assert (opened.k, opened.temperature, opened.vocab_size) == (list(KS), 1.0, len(WORDS))


FILES = ("tokens.parquet", "rollouts.safetensors", "teacher_topk.safetensors", "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_by_name(copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=rf"{name}.*truncated"):
        FixedContextBank.open(copy)


@pytest.mark.parametrize("name", FILES[:3])
def test_an_edited_or_missing_file_is_refused_by_name(copy, name):
    path = copy / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} was edited: its sha256 is"):
        FixedContextBank.open(copy)
    path.unlink()
    with pytest.raises(DataError, match=rf"incomplete: .*{name} is missing"):
        FixedContextBank.open(copy)


def test_an_edited_manifest_is_refused(copy):
    path = copy / "manifest.json"
    document = json.loads(path.read_text())
    document["temperature"] = 0.5
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"manifest.json was edited"):
        FixedContextBank.open(copy)


def test_what_is_no_bank_is_refused(copy, tmp_path, bank):
    (tmp_path / "empty").mkdir()
    for path, message in (
        (copy / "manifest.json", "is a file; a bank is a folder"),
        (tmp_path / "nowhere", "no such bank folder"),
        (tmp_path / "empty", "is no bank: it has no readable manifest.json"),
    ):
        with pytest.raises(DataError, match=message):
            FixedContextBank.open(path)
    (copy / "manifest.json").write_text('{"format": "taopd-gain-1"}')
    with pytest.raises(DataError, match="is no bank: its manifest says format 'taopd-gain-1'"):
        FixedContextBank.open(copy)


def test_another_model_or_tokenizer_is_refused_with_what_differs(bank):
    student, teacher, tokenizer = models()
    bank.check_model("student", student)
    bank.check_model("teacher", teacher)
    bank.check_tokenizer(tokenizer)
    with pytest.raises(DataError, match=r"this teacher is not .*num_parameters is 6000 and was"):
        bank.check_model("teacher", student)
    with torch.no_grad():
        student.lm_head.weight[3, 3] += 1e-4
    with pytest.raises(DataError, match=r"bank was frozen with: weights is \w{12}\.\.\. and was"):
        bank.check_model("student", student)
    with pytest.raises(DataError, match="dtype is bfloat16 and was float32"):
        bank.check_model("teacher", teacher.bfloat16())
    with pytest.raises(DataError, match=r"this tokenizer is not .*vocabulary is"):
        bank.check_tokenizer(make_tokenizer((*WORDS[:-1], "other")))


def test_fingerprints_survive_a_save_and_use(micro_lab, tmp_path):
    model, tokenizer = load_model(micro_lab.student), load_tokenizer(micro_lab.student)
    first = model_fingerprint(model), tokenizer_fingerprint(tokenizer)
    tokenizer(["1 + 2", "3"], padding=True)
    model.config.use_cache, model.config.pad_token_id = False, 2
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again"), load_tokenizer(tmp_path / "again")
    assert (model_fingerprint(again[0]), tokenizer_fingerprint(again[1])) == first


def test_an_output_that_holds_something_else_is_kept(bank, copy, tmp_path):
    arguments = (*models(), make_rollouts(2))
    with pytest.raises(DataError, match="already holds a bank"):
        FixedContextBank.freeze(*arguments, copy)
    replaced = FixedContextBank.freeze(*arguments, copy, k=KS, overwrite=True)
    assert replaced.manifest["num_completions"] == 2
    (copy / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds notes.txt beside the bank"):
        FixedContextBank.freeze(*arguments, copy, overwrite=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="holds files that are no bank"):
            FixedContextBank.freeze(*arguments, foreign, overwrite=overwrite)
    with pytest.raises(DataError, match="is a file"):
        FixedContextBank.freeze(*arguments, foreign / "thesis.tex")


def test_a_failure_leaves_nothing_behind(tmp_path):
    student, teacher, tokenizer = models()
    with torch.no_grad():
        teacher.lm_head.weight[0] = torch.nan
    with pytest.raises(NumericsError, match=r"teacher's logits .* completion 0 of the bank, pos"):
        FixedContextBank.freeze(student, teacher, tokenizer, make_rollouts(2), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_support_sizes_fit_the_vocabulary_of_which_padding_rows_are_no_part(tmp_path):
    """The teacher's head has 8 more rows; the bank is that of the shared ids."""
    student, _, tokenizer = models()
    padded = make_model(seed=1, hidden_size=32, vocab_size=len(WORDS) + 8)
    frozen = FixedContextBank.freeze(
        student, padded, tokenizer, make_rollouts(2), tmp_path / "x", k=(4, 40)
    )
    assert frozen.k == [4, 40] and frozen.vocab_size == 40
    np.testing.assert_allclose(frozen.tokens["compatibility_k40"], 1.0, atol=1e-6)
    with pytest.raises(ConfigError, match="k=41: larger than the vocabulary of 40 ids"):
        FixedContextBank.freeze(
            student, padded, tokenizer, make_rollouts(2), tmp_path / "y", k=(4, 41)
        )
    assert _support_sizes(BANK_TOP_K, 20) == [8, 16, 20]  # the default is for any vocabulary


def test_a_bank_without_a_token_that_both_know_is_refused(tmp_path):
    student, _, tokenizer = models()
    smaller = make_model(seed=1, vocab_size=20)
    rollouts = Rollouts(prompt_ids=[[5]], completion_ids=[[19, 30]])
    with pytest.raises(DataError, match="holds token id 30"):
        FixedContextBank.freeze(student, smaller, tokenizer, rollouts, tmp_path / "x")
    longer = make_tokenizer((*WORDS, "x", "y"))
    models_of_42 = (make_model(seed=seed, vocab_size=42) for seed in (0, 1))
    rollouts = Rollouts(prompt_ids=[[5], [5]], completion_ids=[[41, 40], [7, 41]])
    frozen = FixedContextBank.freeze(
        *models_of_42, longer, rollouts, tmp_path / "y", teacher_tokenizer=tokenizer, k=(4,)
    )
    assert frozen.tokens["token_id"].tolist() == [7]
    assert frozen.manifest["num_outside_vocabulary"] == 3
    rollouts = Rollouts(prompt_ids=[[5]], completion_ids=[[41, 40]])
    models_of_42 = (make_model(seed=seed, vocab_size=42) for seed in (0, 1))
    with pytest.raises(DataError, match="the bank would be empty"):
        FixedContextBank.freeze(
            *models_of_42, longer, rollouts, tmp_path / "z", teacher_tokenizer=tokenizer
        )


def test_models_are_left_in_the_mode_they_had(tmp_path):
    student, teacher, tokenizer = models()
    student.train(), teacher.eval()
    FixedContextBank.freeze(student, teacher, tokenizer, make_rollouts(2), tmp_path / "x")
    assert student.training and not teacher.training
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": ()}, "k="),
        ({"k": (0,)}, "k="),
        ({"temperature": 0.0}, "temp"),
        ({"batch_size": 0}, "b"),
    ],
)
def test_settings_out_of_range(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        FixedContextBank.freeze(*models(), make_rollouts(2), tmp_path / "x", **settings)


def test_rollouts_end_at_eos_and_reproduce_by_seed():
    first, again, other = make_rollouts(), make_rollouts(), make_rollouts(seed=4)
    assert first == again != other
    assert any(ids[-1] == 2 for ids in make_rollouts(40, max_tokens=20).completion_ids)
    for ids in make_rollouts(40, max_tokens=20).completion_ids:
        assert 1 <= len(ids) <= 20 and 2 not in ids[:-1]


def test_completions_from_a_file(tmp_path):
    tokenizer, path = make_tokenizer(), tmp_path / "completions.jsonl"
    path.write_text(
        '{"prompt": "1 + 2 =", "completion": "3 <eos>"}\n'
        '{"prompt": [5, 14, 6, 15], "completion": [7, 2]}\n'
        '{"prompt": "w1", "completion": [9, 9, 9]}\n'
    )
    rollouts = read_completions(path, tokenizer, max_tokens=2)
    assert rollouts.prompt_ids == [[5, 14, 6, 15], [5, 14, 6, 15], [17]]
    assert rollouts.completion_ids == [[7, 2], [7, 2], [9, 9]]
    assert rollouts.prompts == [0, 0, 1]
    assert len(read_completions(path, tokenizer, num_completions=1)) == 1
    # As an editor on Windows saves it.
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig", newline="\r\n")
    assert len(read_completions(path, tokenizer)) == len(rollouts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no completions"),
        ('{"prompt": "1"}\n', "line 1: expected an object with a prompt and a completion"),
        ('{"prompt": "1", "completion": ""}\n', "line 1"),
        ('{"prompt": "1", "completion": 3.5}\n', "line 1: a completion is text or a list"),
        (
            '{"prompt": "1", "completion": "2"}\n\n{"prompt": 7, "completion": "2"}\n',
            "the prompt of line 3 of .*completions.jsonl is int",
        ),
    ],
)
def test_bad_completions(tmp_path, text, message):
    path = tmp_path / "completions.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_completions(path, make_tokenizer())
    with pytest.raises(DataError, match="is a folder"):
        read_completions(tmp_path, make_tokenizer())


def test_bad_rollouts(tmp_path):
    student, teacher, tokenizer = models()
    with pytest.raises(DataError, match="no completions"):
        Rollouts(prompt_ids=[], completion_ids=[])
    with pytest.raises(DataError, match="completion of rollout 1 has no tokens"):
        Rollouts(prompt_ids=[[1], [1]], completion_ids=[[1], []])
    for rollouts, message in (
        (Rollouts(prompt_ids=[[1]], completion_ids=[[99]]), "holds token id 99"),
        (Rollouts(prompt_ids=[[5] * 60], completion_ids=[[5] * 9]), "69 tokens, more than"),
    ):
        with pytest.raises(DataError, match=message):
            FixedContextBank.freeze(student, teacher, tokenizer, rollouts, tmp_path / "x")
    with pytest.raises(DataError, match="no prompts"):
        sample_rollouts(student, tokenizer, [])


def test_rollouts_on_disk_hold_ids_and_masks(bank):
    stored = load_file(bank.folder / "rollouts.safetensors")
    assert set(stored) == {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"}
    digest = hashlib.sha256((bank.folder / "tokens.parquet").read_bytes()).hexdigest()
    assert bank.manifest["files"]["tokens.parquet"]["sha256"] == digest


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_scoring_memory_is_a_few_chunks_whatever_the_number_of_positions():
    """1,152 positions of the published vocabulary, in a process of its own.

    All log-probs of both models would be 1,335 MiB. Measured: 367 MiB, and 426 MiB for all
    57,600 positions; a version that kept small tensors of every chunk took 634 MiB here.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_bank", "--completions", "6"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"peak above the models: {result['peak_above_models_mib']:.0f} MiB")
    assert result["positions"] == 6 * 192 and result["vocab_size"] == 151_936
    assert result["peak_above_models_mib"] < 520
