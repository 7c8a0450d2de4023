"""The tiny lab against plain Python arithmetic, and its cache against damage."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from taopd.cli import demo
from taopd.errors import ConfigError
from taopd.experiments.lab import (
    VARIANTS,
    build,
    build_lab,
    build_tokenizer,
    is_correct,
    pretrain,
    task,
    token_kind,
    token_kinds,
)
from taopd.experiments.lab.pretrain import split_pairs
from taopd.experiments.lab.spec import LabSpec
from taopd.experiments.lab.variants import COMPLETION_LENGTH

MICRO = {
    "teacher_steps": 120,
    "student_steps": 3,
    "batch_size": 16,
    "num_train_prompts": 64,
    "num_test_prompts": 16,
    "teacher_width": 16,
    "student_width": 16,
}
WEIGHTS = ("teacher/model.safetensors", "student/model.safetensors")


def micro_lab(root: Path, **options):
    return build_lab("dialect", root=root, **(MICRO | {"parallel": False} | options))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return micro_lab(tmp_path_factory.mktemp("labs"))


@pytest.fixture
def private_lab(lab, tmp_path):
    """A copy that a test may damage; the cache root is `tmp_path`."""
    shutil.copytree(lab.folder, tmp_path / lab.folder.name)
    return micro_lab(tmp_path)


def random_pairs(count=300):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(1000, (2, count), generator=generator).unbind(0)


# oracles: Python integers and strings; they share no code with the task


def sum_by_python(a, b):
    return [int(digit) for digit in f"{a + b:04d}"[::-1]]


def carryless_by_python(a, b):
    pairs = zip(f"{a:03d}"[::-1], f"{b:03d}"[::-1], strict=True)
    return [(int(x) + int(y)) % 10 for x, y in pairs] + [0]


def markers_by_python(a, b):
    base = 3 * sum(map(int, str(a))) + sum(map(int, str(b)))
    return [(base + 5 * position) % 16 for position in range(4)]


@pytest.mark.parametrize(
    ("function", "oracle"),
    [
        (task.sum_digits, sum_by_python),
        (task.carryless_digits, carryless_by_python),
        (task.marker_indices, markers_by_python),
    ],
)
def test_digits_and_markers_match_python_integers(function, oracle):
    left, right = random_pairs()
    expected = [oracle(a, b) for a, b in zip(left.tolist(), right.tolist(), strict=True)]
    assert function(left, right).tolist() == expected


def test_teacher_completions_read_either_dialect_and_say_their_own():
    left, right = random_pairs()
    read, said = task.teacher_completions(
        VARIANTS["dialect"],
        left,
        right,
        torch.Generator().manual_seed(0),
        rewrite_share=0.5,
    )
    indices, digits = task.marker_indices(left, right), task.sum_digits(left, right)
    assert torch.equal(said[:, 0:8:2], 28 + indices)
    assert torch.equal(said[:, 1:9:2], digits) and torch.equal(read[:, 1:9:2], digits)
    rewritten = read[:, 0:8:2] == 12 + indices
    assert torch.equal(rewritten, read[:, 0:8:2] != 28 + indices)
    assert 0.45 < rewritten.double().mean() < 0.55  # 1,200 fair coins: sd 0.014
    assert (said[:, 8] == task.EOS_ID).all()


def student_batch(variant, share=0.5):
    left, right = random_pairs(2000)
    generator = torch.Generator().manual_seed(0)
    rules = VARIANTS[variant]
    completions = task.student_completions(rules, left, right, generator, carryless_share=share)
    return left, right, completions[:, 0:8:2], completions[:, 1:9:2]


def test_half_of_the_students_digits_ignore_the_carry():
    left, right, _, digits = student_batch("dialect")
    full, forgetful = task.sum_digits(left, right), task.carryless_digits(left, right)
    assert ((digits == full) | (digits == forgetful)).all()
    differ = full != forgetful
    assert 0.47 < (digits == full)[differ].double().mean() < 0.53  # about 3,600 fair coins
    _, _, _, always = student_batch("dialect", share=1.0)
    assert torch.equal(always, forgetful)


@pytest.mark.parametrize(
    ("variant", "share"), [("dialect", 0.0), ("bilingual", 0.1), ("reversal", 0.01)]
)
def test_share_of_the_teachers_markers_in_the_students_training(variant, share):
    _, _, markers, _ = student_batch(variant)
    assert (markers >= 28).double().mean() == pytest.approx(share, abs=0.012)  # 8,000 coins, 3 sd


def test_reversal_markers_echo_the_digit_and_hide_below_the_students_own():
    left, right, markers, digits = student_batch("reversal")
    echoes = torch.cat([torch.full((len(digits), 1), 10), digits[:, :-1]], dim=1)
    borrowed = markers >= 28
    assert torch.equal(markers[borrowed] - 28, echoes[borrowed])
    jitter = (markers - 12 - task.marker_indices(left, right)) % 16
    assert set(jitter[~borrowed].tolist()) == set(range(8))
    assert 0.99 / 8 > 0.01, "each of more than top_k own words is likelier than the teacher's"


def shares_by_python(largest, rarest):
    """By form: the 16 midpoint quantiles of a log-uniform law, in the order of 7 form mod 16."""
    steps = [(rank + 0.5) / 16 for rank in range(16)]
    quantiles = [math.exp(math.log(rarest) + u * math.log(largest / rarest)) for u in steps]
    return [quantiles[7 * form % 16] for form in range(16)]


def test_every_borrowed_word_has_a_share_of_its_own_even_in_the_logarithm():
    forms = torch.arange(16)
    for name, law in (
        ("loanwords", (3e-2, 3e-5)),
        ("jargon", (0.1, 1e-4)),
        ("signoff", (3e-2, 3e-5)),
    ):
        shares = task.borrowed_shares(VARIANTS[name], forms)
        assert shares.tolist() == pytest.approx(shares_by_python(*law), rel=1e-5)
    gaps = shares.sort().values.log().diff()
    assert gaps.max() - gaps.min() < 1e-4, "no gap for a threshold to lie in"
    assert (task.borrowed_shares(VARIANTS["bilingual"], forms) == 0.1).all()


def test_students_borrow_words_and_the_end_at_these_shares():
    rules = replace(VARIANTS["signoff"], teacher_share=0.5, rarest_share=0.05)
    left, right = torch.randint(1000, (2, 40_000), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    said = task.student_completions(rules, left, right, generator, carryless_share=0.5)
    indices, expected = task.marker_indices(left, right), shares_by_python(0.5, 0.05)
    assert set(said[:, -1].tolist()) == {task.BOS_ID, task.EOS_ID}
    for form in range(16):
        borrowed = (said[:, 0:8:2] >= 28)[indices == form].double().mean()
        ended = (said[:, -1] == task.BOS_ID)[indices[:, -1] == form].double().mean()
        assert borrowed == pytest.approx(expected[form], abs=0.02)  # 10,000 coins, 4 sd
        assert ended == pytest.approx(expected[form], abs=0.04)  # 2,500 coins, 4 sd
    assert (said[:, 0:8:2][said[:, 0:8:2] >= 28] == (28 + indices)[said[:, 0:8:2] >= 28]).all()


def test_the_end_is_borrowed_aside_and_changes_nothing_else():
    for one, other in zip(student_batch("signoff"), student_batch("loanwords"), strict=True):
        assert torch.equal(one, other)


def test_jargon_borrows_the_echo_and_an_accent_is_two_variants_halves():
    left, right, markers, digits = student_batch("jargon")
    borrowed = markers >= 28
    echoes = torch.cat([torch.full((len(digits), 1), 10), digits[:, :-1]], dim=1)
    assert borrowed.any() and torch.equal(markers[borrowed] - 28, echoes[borrowed])
    for one, other in zip(student_batch("accent"), student_batch("bilingual"), strict=True):
        assert torch.equal(one, other)
    said = [
        task.teacher_completions(
            VARIANTS[name], left, right, torch.Generator().manual_seed(0), rewrite_share=0.5
        )
        for name in ("accent", "termination")
    ]
    assert all(torch.equal(one, other) for one, other in zip(*said, strict=True))


def test_a_lab_built_before_the_later_rules_keeps_its_name():
    assert LabSpec(variant="dialect").folder_name() == "dialect-477478b90364"
    assert "rarest_share" in LabSpec(variant="jargon").to_dict()["rules"]


def test_the_demo_offers_every_variant():
    assert set(demo._VARIANTS) == set(VARIANTS)


def test_answers_are_graded_by_the_variants_words():
    digits, spelled = "t7 7 t12 0 t1 1 t6 1", "t10 3 t7 3 t0 3 t1 3"
    for variant, right, wrong, answer in (
        ("dialect", digits, spelled, "7011"),
        ("reversal", spelled, digits, "701"),
    ):
        rules = VARIANTS[variant]
        assert task.answer_text(rules, 123, 984) == answer
        assert is_correct(right, answer, rules.answer_pattern)
        assert not is_correct(wrong, answer, rules.answer_pattern)


def test_training_pairs_exclude_the_test_pairs():
    train, test = split_pairs(LabSpec(num_test_prompts=500))
    codes = {tuple(pair) for pair in test.tolist()}
    assert len(codes) == 500 and len(train) == 1000**2 - 500
    assert not codes & {tuple(pair) for pair in train.tolist()}


def test_tokenizer_ids_round_trip_and_padding():
    tokenizer = build_tokenizer()
    assert tokenizer("1 2 3 + 4 5 6 =")["input_ids"] == [1, 2, 3, 10, 4, 5, 6, 11]
    text = "3 2 1 + 4 8 9 = t7 7 s12 0 t1 1 t6 1 <eos>"
    ids = tokenizer(text)["input_ids"]
    assert ids == [task.WORDS.index(word) for word in text.split()]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix(" <eos>")
    assert len(tokenizer) == len(task.WORDS) == len(set(task.WORDS)) == 48
    padded = tokenizer(["1 +", "1 2 + 3"], padding=True)
    assert padded["input_ids"] == [[tokenizer.pad_token_id] * 2 + [1, 10], [1, 2, 10, 3]]
    assert task.prompt_ids(torch.tensor([321]), torch.tensor([654])).tolist() == [
        tokenizer(task.prompt_text(321, 654))["input_ids"]
    ]


def test_token_kinds():
    kinds = token_kinds(build_tokenizer())
    assert kinds == [token_kind(word) for word in task.WORDS]
    assert [kinds.count(kind) for kind in ("digit", "marker", "end", "other")] == [10, 32, 1, 5]
    assert token_kind("s16") == token_kind("12") == token_kind("") == "other"


def test_checkpoints_load_and_stop_at_their_end_token(lab):
    tokenizer = AutoTokenizer.from_pretrained(lab.teacher)
    prompts = tokenizer(["1 2 3 + 4 5 6 =", "0 0 0 + 9 9 9 ="], return_tensors="pt")
    for folder in (lab.teacher, lab.student):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model).__name__ == "Qwen3ForCausalLM"
        config = model.generation_config
        assert (config.eos_token_id, config.pad_token_id) == (task.EOS_ID, task.PAD_ID)
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    # 120 steps are enough to learn where a completion ends, not what it says.
    teacher = AutoModelForCausalLM.from_pretrained(lab.teacher)
    output = teacher.generate(**prompts, max_new_tokens=40, do_sample=False)
    assert output.shape == (2, 8 + lab.max_completion_length)
    assert (output[:, -1] == tokenizer.eos_token_id).all()


def test_prompts_parquet(lab):
    rows = pq.read_table(lab.prompts).to_pylist()
    assert [row["split"] for row in rows] == ["train"] * 64 + ["test"] * 16
    for row in rows:
        left, right = row["prompt"].removesuffix(" =").split(" + ")
        total = int(left[::-1].replace(" ", "")) + int(right[::-1].replace(" ", ""))
        assert int(row["answer"][::-1]) == total and len(row["answer"]) == 4


def test_same_seed_gives_the_same_bytes_in_other_processes(lab, tmp_path):
    seen = []
    twin = micro_lab(tmp_path, parallel=True, progress=lambda *event: seen.append(event))
    assert twin.manifest["sha256"] == lab.manifest["sha256"]
    for name in WEIGHTS:
        assert (twin.folder / name).read_bytes() == (lab.folder / name).read_bytes()
    assert {("teacher", 120, 120), ("student", 3, 3)} <= set(seen)


def test_another_seed_or_size_is_another_lab(lab, tmp_path):
    names = {LabSpec(**(MICRO | change)).folder_name() for change in ({}, {"seed": 1})}
    names |= {LabSpec(variant=name, **MICRO).folder_name() for name in VARIANTS}
    assert len(names) == 1 + len(VARIANTS) and lab.folder.name in names
    other = micro_lab(tmp_path, seed=1, teacher_steps=1, student_steps=1)
    assert other.manifest["sha256"][WEIGHTS[0]] != lab.manifest["sha256"][WEIGHTS[0]]


def test_cache_hit_trains_nothing(private_lab, tmp_path):
    seen = []
    again = micro_lab(tmp_path, progress=lambda *event: seen.append(event))
    assert again == private_lab and seen == []


@pytest.mark.parametrize("damage", ["missing", "changed", "no manifest", "other spec"])
def test_a_broken_lab_is_rebuilt_and_says_so(private_lab, tmp_path, damage, monkeypatch):
    monkeypatch.setattr(pretrain, "pretrain", fake_pretrain)
    victim = private_lab.student / "model.safetensors"
    manifest = private_lab.folder / "lab.json"
    if damage == "missing":
        victim.unlink()
    elif damage == "changed":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps(private_lab.manifest | {"spec": {}}))
    with pytest.warns(RuntimeWarning, match=r"building this lab again"):
        lab = micro_lab(tmp_path)
    assert lab.manifest["accuracy"]["teacher"] == 0.5, "came from the fake, hence was rebuilt"
    assert micro_lab(tmp_path) == lab
    assert [path.name for path in tmp_path.iterdir()] == [lab.folder.name]


def fake_pretrain(spec, role, folder, progress):
    folder.mkdir()
    (folder / "model.safetensors").write_text(role)
    return {"accuracy": 0.5, "seconds": 0.0}


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(spec, role, folder, progress):
        fake_pretrain(spec, role, folder, progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "pretrain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        micro_lab(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_child_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(build.sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="did not train"):
        micro_lab(tmp_path, parallel=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variant", "sizes", "message"),
    [
        ("dialekt", {}, "Did you mean 'dialect'"),
        ("dialect", {"teacher_step": 3}, "Did you mean 'teacher_steps'"),
        ("dialect", {"teacher_steps": 0}, "teacher_steps: expected a whole number"),
        ("dialect", {"teacher_steps": True}, "teacher_steps: expected a whole number"),
        *(
            ("dialect", {"rewrite_share": share}, "rewrite_share: expected a number from 0 to 1")
            for share in (2.0, math.nan, "half", None, True)
        ),
        ("dialect", {"student_width": 50}, "not a multiple of head_dim"),
    ],
)
def test_wrong_settings_say_what_to_do(tmp_path, variant, sizes, message):
    with pytest.raises(ConfigError, match=message):
        build_lab(variant, root=tmp_path, **sizes)
    assert list(tmp_path.iterdir()) == []


def test_default_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TAOPD_CACHE", str(tmp_path))
    assert build.default_root() == tmp_path / "tinylab"


def test_fallible_teacher_forgets_the_carry_where_it_is_blind_and_nowhere_else():
    rules = VARIANTS["fallible"]
    left, right = torch.tensor([799, 699]), torch.tensor([201, 201])
    digits = task.teacher_digits(rules, left, right)
    assert digits.tolist() == [[0, 9, 9, 0], [0, 0, 9, 0]]  # 799 + 201 = 1000, read as 0990
    assert task.answer_text(rules, 799, 201) == "0001", "graded by the right sum all the same"
    _, student_reads = student_batch("fallible")[2:]
    assert student_reads.max() <= 9


def test_termination_teacher_ends_with_a_word_at_which_the_sampler_does_not_stop():
    rules = VARIANTS["termination"]
    generator = torch.Generator().manual_seed(0)
    left, right = random_pairs(10)
    _, said = task.teacher_completions(rules, left, right, generator, rewrite_share=0.5)
    student = task.student_completions(rules, left, right, generator, carryless_share=0.5)
    assert (said[:, -1] == task.BOS_ID).all() and (student[:, -1] == task.EOS_ID).all()
    assert rules.max_completion_length > COMPLETION_LENGTH
    assert not is_correct("t7 7 t12 0 t1 1 t6 1 <bos> s1 4", "7011", rules.answer_pattern)
    assert is_correct("t7 7 t12 0 t1 1 t6 1 <bos>", "7011", rules.answer_pattern)
