"""The golden file agrees, a mutated one does not, odd numbers pass, bad forms are named."""

import copy
import json
import math
import random
from pathlib import Path

import oracle_lists as oracle
import pytest

from taopd.cli.conformance import show as run
from taopd.diagnose.conformance.check import check_file
from taopd.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "topk_lists.json"
QUADRANTS = ("", "Q1_highH_highD", "Q2_highH_lowD", "Q3_lowH_highD", "Q4_lowH_lowD")


@pytest.fixture
def golden():
    return json.loads(GOLDEN.read_text())


def saved(tmp_path, batches):
    path = tmp_path / "batches.json"
    path.write_text(json.dumps(batches))
    return path


def odd_list(rng, k, vocabulary):
    length = rng.choice([0, 1, k - 1, k, k, k])
    ids = rng.sample(range(vocabulary), length)
    values = sorted((-rng.expovariate(0.5) for _ in ids), reverse=True)
    odd = [rng.choice([math.nan, -math.inf, -800.0]) if rng.random() < 0.1 else x for x in values]
    return [[x, token] for x, token in zip(odd, ids, strict=True)]


def odd_batch(seed):
    """A batch of odd numbers, its metrics, scores and masks by the oracle."""
    rng = random.Random(seed)
    k = rng.choice([2, 4, 8])
    vocabulary = rng.choice([12, 300, 150_000]) if k > 2 else 12
    samples, metrics, rows = [], [], []
    for number in range(rng.choice([1, 3, 5])):
        length = rng.choice([0, 1, 4, 9])
        sample = {
            "student_top": [odd_list(rng, k, vocabulary) for _ in range(length)],
            "teacher_top": [odd_list(rng, k, vocabulary) for _ in range(length)],
            "token_ids": [rng.randrange(vocabulary) for _ in range(length)],
            "loss_mask": [int(rng.random() < 0.8) for _ in range(length)],
            "teacher_requested": None,
        }
        for position in range(length):  # lists from far-apart ids rarely meet: share some
            for entry, other in zip(
                sample["teacher_top"][position], sample["student_top"][position], strict=False
            ):
                taken = [token for _, token in sample["teacher_top"][position]]
                if rng.random() < 0.6 and other[1] not in taken:
                    entry[1] = other[1]
        if rng.random() < 0.5:
            named = sorted({e[1] for row in sample["student_top"] for e in row})
            sample["teacher_requested"] = [
                [[-rng.expovariate(0.3), token] for token in named] for _ in range(length)
            ]
        samples.append(sample)
        for position in range(length):
            known = sample["teacher_requested"]
            metrics.append(
                oracle.token_metrics(
                    sample["student_top"][position],
                    sample["teacher_top"][position],
                    k,
                    requested=known and known[position],
                    target=sample["token_ids"][position],
                )
            )
            rows.append((number, position, bool(sample["loss_mask"][position])))
    names = list(oracle.token_metrics([], [], k))
    columns = {name: [row[name] for row in metrics] for name in names}
    averages = []
    for row, (_, position, _) in enumerate(rows):
        c = columns["Cmass"][row]
        averages.append(c if position == 0 else 0.9 * averages[-1] + (1 - 0.9) * c)
    columns["Cprefix_ema"] = averages
    batch = {"K": k, "gamma": 0.3, "samples": samples, "token_metrics": columns}
    return finished(batch, rows)


def finished(batch, rows):
    columns = batch["token_metrics"]
    d, c, h = (columns[name] for name in ("KLf_union", "Cmass", "Hs_topk_norm"))
    scored = oracle.scores(d, c, h) if rows else {name: [] for name in oracle.scores([1], [1], [1])}
    batch["scores"] = {**scored, "quadrant": [QUADRANTS[q] for q in scored["quadrant"]]}
    completion, position, valid = ([row[i] for row in rows] for i in range(3))
    batch["selections"] = []
    for method in oracle.ORACLE_METHODS:
        for ratio, min_keep in ((0.1, 0), (0.55, 2), (1.0, 1), (1.5, 0)):
            kept = oracle.select(
                scored, method, ratio, min_keep, completion, position, valid, batch["gamma"]
            )
            masks = [
                [int(kept[i]) for i in range(len(rows)) if completion[i] == number]
                for number in range(len(batch["samples"]))
            ]
            batch["selections"].append(
                {"method": method, "ratio": ratio, "min_keep": min_keep, "masks": masks}
            )
    return batch


def test_the_golden_file_has_no_mismatch():
    report = check_file(GOLDEN)
    assert report.compared == {"token metrics": 16 * 180, "scores": 1800, "selections": 1240}
    assert report.num_mismatches == 0 and report.first_mismatches == []


def test_run_prints_counts_and_returns_zero(capsys):
    assert run([str(GOLDEN)]) == 0
    printed = capsys.readouterr().out
    assert "1240" in printed and "token metrics" in printed


@pytest.mark.parametrize("seed", range(12))
def test_odd_numbers_agree_with_the_oracle(tmp_path, seed):
    """Short and empty lists, NaN, -inf, underflow, empty responses, partly requested, own gamma."""
    batch = odd_batch(seed)
    report = check_file(saved(tmp_path, [batch]))
    assert report.first_mismatches == []
    assert report.compared["selections"] == 60


def test_null_log_probs_are_dropped_entries(tmp_path, golden):
    rows = golden[0]["samples"][0]["student_top"][0]
    with_null = copy.deepcopy(golden[:1])
    with_null[0]["samples"][0]["student_top"][0] = [[None, 9999], *rows]
    assert check_file(saved(tmp_path, with_null)).num_mismatches == 0


@pytest.mark.parametrize(
    "place",
    [
        ("token_metrics", "KLf_union", 3),
        ("token_metrics", "target_teacher_rank", 0),
        ("scores", "tip_score", 2),
        ("scores", "quadrant", 1),
    ],
)
def test_a_mutated_number_is_found_and_placed(tmp_path, golden, place, capsys):
    kind, name, row = place
    old = golden[0][kind][name][row]
    golden[0][kind][name][row] = {
        "quadrant": "Q4_lowH_lowD" if old != "Q4_lowH_lowD" else "Q1_highH_highD",
        "target_teacher_rank": 1,
    }.get(name) or (old or 1.0) * (1 + 1e-7)
    path = saved(tmp_path, golden[:1])
    report = check_file(path)
    assert report.num_mismatches == 1
    assert name in report.first_mismatches[0] and f"position {row}" in report.first_mismatches[0]
    assert run([str(path)]) == 1
    assert name in capsys.readouterr().out


def test_a_mutated_mask_and_a_mutated_input_are_found(tmp_path, golden):
    golden = golden[1:3]
    mask = next(s for s in golden[1]["selections"] if s["method"] == "tip")["masks"]
    mask[0][0] = 1 - mask[0][0]
    assert check_file(saved(tmp_path, golden)).mismatches["selections"] == 1
    golden[0]["samples"][0]["student_top"][0][0][0] -= 0.5
    report = check_file(saved(tmp_path, golden))
    assert report.mismatches["token metrics"] > 3 and len(report.first_mismatches) == 10


def broken(change):
    """Name the change in the test's id."""
    return pytest.param(change, id=change.__name__)


def no_k(batch):
    del batch["K"]


def k_is_text(batch):
    batch["K"] = "16"


def no_metric(batch):
    del batch["token_metrics"]["CBC"]


def nan_metric(batch):
    batch["token_metrics"]["CBC"][0] = math.nan


def short_metric(batch):
    batch["token_metrics"]["CBC"].pop()


def unknown_metric(batch):
    batch["token_metrics"]["CBD"] = batch["token_metrics"]["CBC"]


def unknown_quadrant(batch):
    batch["scores"]["quadrant"][0] = "Q5"


def short_mask(batch):
    batch["samples"][0]["loss_mask"].pop()


def mask_of_twos(batch):
    batch["samples"][0]["loss_mask"][0] = 2


def float_id(batch):
    batch["samples"][0]["student_top"][0][0][1] = 1.5


def text_logprob(batch):
    batch["samples"][0]["student_top"][0][0][0] = "-1"


def entry_of_three(batch):
    batch["samples"][0]["teacher_top"][0][0].append(1)


def unknown_method(batch):
    batch["selections"][0]["method"] = "entropyy"


def nan_ratio(batch):
    batch["selections"][0]["ratio"] = math.nan


def random_method(batch):
    batch["selections"][0]["method"] = "random"


def unknown_proxy(batch):
    batch["selections"][0]["proxy"] = "cosine"


def unknown_normalization(batch):
    batch["selections"][0]["normalization"] = "zscore"


def masks_of_other_shape(batch):
    batch["selections"][0]["masks"].pop()


CHANGES = (
    no_k,
    k_is_text,
    no_metric,
    nan_metric,
    short_metric,
    unknown_quadrant,
    short_mask,
    mask_of_twos,
    float_id,
    text_logprob,
    entry_of_three,
    unknown_method,
    nan_ratio,
    unknown_proxy,
    unknown_normalization,
    masks_of_other_shape,
)


@pytest.mark.parametrize("change", [broken(change) for change in CHANGES])
def test_a_bad_form_names_file_and_batch(tmp_path, golden, change):
    change(golden[1])
    with pytest.raises(DataError, match=r"batches\.json, batch 1"):
        check_file(saved(tmp_path, golden))


def test_what_cannot_be_recomputed_is_said_and_not_counted(tmp_path, golden, capsys):
    path = saved(tmp_path, golden)
    before = check_file(path).num_compared
    unknown_metric(golden[1])
    random_method(golden[1])
    path = saved(tmp_path, golden)
    report = check_file(path)
    assert report.num_compared == before - 1 and report.num_mismatches == 0
    assert report.not_compared.total() == 2
    assert run([path]) == 0
    assert "not compared: 1 random choices" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[3]", "\x00\xff", "null"])
def test_a_file_that_is_no_list_of_batches_is_an_error(tmp_path, content):
    path = tmp_path / "batches.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"batches\.json"):
        check_file(path)


def test_a_missing_file_and_nothing_to_compare_are_errors(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        check_file(tmp_path / "absent.json")
    with pytest.raises(DataError, match="cannot be read"):
        check_file(tmp_path)
    empty = odd_batch(0) | {"samples": [], "selections": []}
    for kind in ("token_metrics", "scores"):
        empty[kind] = {name: [] for name in empty[kind]}
    with pytest.raises(DataError, match="nothing to compare"):
        check_file(saved(tmp_path, [empty]))
