"""Scoring implementations. Oracles: plain Python from the definition; then `reference` in float64."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taopd.errors import ConfigError, ShapeError
from taopd.kernels import Head, chunked, pair_score, probabilities_at, reference, topk_score
from taopd.kernels.scores import select_top
from taopd.signals import exact_signals, foreign_mass, reach_from_states
from tests.kernels.cases import CASES, compare, make_case
from tests.kernels.oracle_scores import logits_by_definition, scores_by_definition

TILES = [chunked.Tile(2**21, 2**14), chunked.Tile(64, 64), chunked.Tile(2**9, 2**8)]


def truth_of(case, want_ids=None):
    exact = case.double()
    return reference.topk_score(
        exact.hidden,
        exact.head,
        exact.target_ids,
        k=case.k,
        temperature=case.temperature,
        want_ids=want_ids,
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_reference_matches_the_definition(softcap):
    case = make_case(4, 23, 5, 6, bias=True, scale=0.7, softcap=softcap, temperature=1.3).double()
    found = truth_of(case)
    head = case.head
    rows = logits_by_definition(
        case.hidden.tolist(), head.weight.tolist(), head.bias.tolist(), 0.7, softcap, 1.3
    )
    for row, logits in enumerate(rows):
        expected = scores_by_definition(logits, case.k, int(case.target_ids[row]))
        for name, value in expected.items():
            assert getattr(found, name)[row].tolist() == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_chunked_matches_reference_in_float64(name, tile):
    case = CASES[name]()
    want = torch.stack([case.target_ids, torch.zeros_like(case.target_ids)], dim=1)
    arguments = {"k": case.k, "temperature": case.temperature, "want_ids": want}
    found = chunked.topk_score(case.hidden, case.head, case.target_ids, tile=tile, **arguments)
    compare(found, truth_of(case, want), case)
    assert torch.equal(found.want_logprobs[:, 0], found.target_logprobs)


@pytest.mark.parametrize("name", CASES)
def test_plain_reference_is_within_tolerance_of_float64(name):
    case = CASES[name]()
    found = topk_score(
        case.hidden,
        case.head,
        case.target_ids,
        k=case.k,
        temperature=case.temperature,
        impl="reference",
    )
    compare(found, truth_of(case), case)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_chunked_in_float64_is_the_reference(tile):
    case = CASES["bias_scale_softcap_temperature"]().double()
    found = chunked.topk_score(
        case.hidden, case.head, case.target_ids, k=case.k, temperature=case.temperature, tile=tile
    )
    for name, value in truth_of(case)._asdict().items():
        if value is not None:
            torch.testing.assert_close(getattr(found, name), value, atol=1e-12, rtol=1e-12)


FLOOR = 3e-6
"""Relative error; measured 4e-7 at most on a CPU (AVX512), November 2026."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_plain_torch_in_the_same_dtype(dtype):
    case = make_case(29, 3001, 64, 16, dtype=dtype, temperature=1.3, sharpness=0.3)
    truth, plain_logits = truth_of(case), (case.hidden @ case.head.weight.T).float() / 1.3
    found = chunked.topk_score(case.hidden, case.head, case.target_ids, k=16, temperature=1.3)
    plain = reference.scores_from_logprobs(
        plain_logits.log_softmax(-1), plain_logits.logsumexp(-1), case.target_ids, k=16
    )
    for name in ("target_logprobs", "topk_logprobs", "logsumexp", "entropy"):
        expected = getattr(truth, name)
        assert expected.norm() > 0, "vacuous"
        error, base = (
            float((getattr(scores, name) - expected).norm() / expected.norm())
            for scores in (found, plain)
        )
        assert error <= 1.5 * base + FLOOR, f"{name}: chunked {error:.2e} plain {base:.2e}"


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 40), st.data())
def test_selection_is_a_stable_sort(seed, num_columns, data):
    k = data.draw(st.integers(1, num_columns))
    values = torch.randint(-3, 4, (4, num_columns), generator=torch.Generator().manual_seed(seed))
    values = torch.where(values == -3, -torch.inf, values.float())
    expected = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(select_top(values, k), expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 400), st.data())
def test_tile_size_does_not_matter(seed, vocab_size, data):
    k = data.draw(st.integers(1, min(vocab_size, 20)))
    columns = data.draw(st.sampled_from([1, 16, 64, 128, 1024]))
    elements = data.draw(st.sampled_from([1, 100, 5000]))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (3, 4), generator=generator).float()
    head = Head(weight=torch.randint(-2, 3, (vocab_size, 4), generator=generator).float())
    targets = torch.zeros(3, dtype=torch.long)
    tile = chunked.Tile(elements, columns)
    found = chunked.topk_score(hidden, head, targets, k=k, tile=tile)
    truth = reference.topk_score(hidden.double(), head.cast(torch.float64), targets, k=k)
    assert torch.equal(found.topk_ids, truth.topk_ids)
    torch.testing.assert_close(found.entropy.double(), truth.entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_pair_matches_reference_in_float64(tile):
    student = make_case(13, 997, 17, 7, scale=0.5, softcap=4.0)
    teacher = make_case(13, 997, 23, 7, bias=True)
    both = [(case.hidden, case.head) for case in (student, teacher)]
    exact = [(case.double().hidden, case.double().head) for case in (student, teacher)]
    arguments = {"k": 7, "temperature": 1.7, "full_kl": True}
    targets = student.target_ids
    truth = reference.pair_score(*exact[0], *exact[1], targets, **arguments)
    found = chunked.pair_score(*both[0], *both[1], targets, tile=tile, **arguments)
    for name, expected in truth._asdict().items():
        value = getattr(found, name)
        if name in ("student", "teacher"):
            compare(value, expected, student if name == "student" else teacher)
        else:
            torch.testing.assert_close(value.double(), expected.double(), atol=1e-4, rtol=0)
    assert float(truth.forward_kl.min()) > 0.1, "vacuous"


def test_a_model_against_itself_has_no_divergence():
    case = make_case(13, 997, 17, 7)
    model = case.hidden, case.head
    pair = pair_score(*model, *model, case.target_ids, k=7, full_kl=True)
    for value in (pair.disagreement, pair.reverse_disagreement, pair.forward_kl, pair.reverse_kl):
        assert float(value.abs().max()) < 1e-6
    assert (pair.num_shared == 7).all()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_rows_are_flagged_and_others_are_not(impl, bad):
    case = make_case(9, 700, 8, 3, softcap=5.0)  # a soft cap turns an infinity into a number
    hidden = case.hidden.clone()
    hidden[4, 0] = bad
    pair = pair_score(hidden, case.head, case.hidden, case.head, case.target_ids, k=3, impl=impl)
    assert (~pair.student_finite).nonzero().flatten().tolist() == [4]
    assert pair.teacher_finite.all()
    if math.isnan(bad):
        assert pair.student.entropy.isnan().nonzero().flatten().tolist() == [4]
    assert ((pair.student.topk_ids >= 0) & (pair.student.topk_ids < 700)).all()


def test_reference_gradients_by_finite_differences():
    case = make_case(3, 7, 5, 2, bias=True, scale=0.5, softcap=3.0).double()
    want = torch.tensor([[0, 1], [2, 3], [6, 0]])

    def run(hidden, weight, bias):
        head = Head(weight=weight, bias=bias, scale=0.5, softcap=3.0)
        scores = topk_score(
            hidden, head, case.target_ids, k=2, temperature=1.3, impl="reference", want_ids=want
        )
        return [value for name, value in scores._asdict().items() if name != "topk_ids"]

    inputs = [
        x.clone().requires_grad_() for x in (case.hidden, case.head.weight, case.head.bias.double())
    ]
    assert torch.autograd.gradcheck(run, inputs)


def test_chunked_detaches():
    case = make_case(3, 7, 5, 2)
    found = topk_score(case.hidden.requires_grad_(), case.head, case.target_ids, k=2)
    assert not any(value.requires_grad for value in found if value is not None)


def test_autocast_does_not_lower_the_precision():
    """Of nothing that reads hidden states and a head."""
    case, other = make_case(13, 997, 17, 7), make_case(13, 997, 19, 7)
    states, ids = (case.hidden, case.head, other.hidden, other.head), case.target_ids
    two = states[:2], states[2:]

    def everything():
        for impl in ("reference", "chunked"):
            scores = topk_score(*states[:2], ids, k=7, impl=impl, want_ids=ids[:, None])
            yield impl, [each.detach() for each in scores]
        signals = exact_signals(*states, ids, k=7, full_kl=True, stop_ids=(3, 8))
        columns = (getattr(signals, column.name) for column in fields(signals))
        yield "signals", [column for column in columns if isinstance(column, torch.Tensor)]
        yield "reach", reach_from_states(*two, ids, threshold=1e-4, stop_ids=(3, 8))
        yield "foreign", [foreign_mass(*two[1], [5, 9])]
        yield "probabilities", [probabilities_at(*two[0], [5, 9])]

    plain = dict(everything())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = dict(everything())
    for name, columns in plain.items():
        assert all(map(torch.equal, columns, lowered[name])), name


def test_a_weight_is_a_head_and_auto_says_what_it_chose_once(caplog):
    from taopd.kernels import dispatch

    dispatch._choose.cache_clear()
    dispatch._say.cache_clear()
    case = make_case(3, 40, 5, 2)
    with caplog.at_level("INFO", logger="taopd.kernels"):
        for _ in range(2):
            found = topk_score(case.hidden, case.head.weight, case.target_ids, k=2)
    assert [record.getMessage() for record in caplog.records] == [
        "logits are computed in blocks, by PyTorch (float32 on cpu)"
    ]
    named = topk_score(case.hidden, case.head, case.target_ids, k=2, impl="chunked")
    assert torch.equal(found.topk_logprobs, named.topk_logprobs)


def test_what_cannot_run_is_an_error():
    case = make_case(3, 40, 5, 2)
    call = case.hidden, case.head, case.target_ids
    with pytest.raises(ConfigError, match='impl="triton" cannot run: '):
        topk_score(*call, k=2, impl="triton")
    with pytest.raises(ConfigError, match=r"unknown\. Did you mean 'chunked'"):
        topk_score(*call, k=2, impl="chunkd")
    with pytest.raises(ConfigError, match="larger than the vocabulary of 40 ids"):
        topk_score(*call, k=41)
    with pytest.raises(ConfigError, match="less than 1"):
        topk_score(*call, k=0)
    with pytest.raises(ConfigError, match="temperature=0"):
        topk_score(*call, k=2, temperature=0.0)
    with pytest.raises(ShapeError, match="3 positions, target_ids 2"):
        topk_score(case.hidden, case.head, case.target_ids[:2], k=2)
    with pytest.raises(ShapeError, match="width 4, the head 5"):
        topk_score(case.hidden[:, :4], case.head, case.target_ids, k=2)


COMPILED = """
import torch
from taopd.kernels import chunked, dispatch, pair_score, topk_score
from tests.kernels.cases import make_case
chunked.TILES["cpu"] = chunked.Tile(7 * 1024, 1024)
student, teacher = make_case(13, 1300, 8, 3, softcap=4.0), make_case(13, 1300, 9, 3, bias=True)
def one(hidden, weight, ids):
    return topk_score(hidden, weight, ids, k=3, temperature=1.3)
def two(hidden, ids):
    other = teacher.hidden, teacher.head
    return pair_score(hidden, student.head, *other, ids, k=3, full_kl=True)
for run, inputs in (
    (one, (student.hidden, student.head.weight, student.target_ids)),
    (two, (student.hidden, student.target_ids)),
):
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    flat, _ = torch.utils._pytree.tree_flatten(found)
    truth, _ = torch.utils._pytree.tree_flatten(run(*inputs))
    for a, b in zip(flat, truth, strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b)
print("no graph break")
"""


@pytest.mark.slow
def test_compiles_as_one_graph(run_python):
    assert run_python(COMPILED).strip().endswith("no graph break")


MEMORY = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from taopd.kernels import chunked, Head
N, V = int(sys.argv[1]), int(sys.argv[2])
generator = torch.Generator().manual_seed(0)
hidden, weight = torch.randn(N, 8, generator=generator), torch.randn(V, 8, generator=generator)
targets = torch.zeros(N, dtype=torch.long)
tile = chunked.Tile(2**21, 2**14)
def score(rows):
    return chunked.topk_score(hidden[:rows], Head(weight=weight), targets[:rows], k=4, tile=tile)
def peak():
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
small = Head(weight=weight[:64])
chunked.topk_score(hidden[:64], small, targets[:64], k=4)
before = peak()
scores = score(N)
outputs = sum(x.numel() * x.element_size() for x in scores if x is not None)
print(peak() - before - 3 * outputs)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_extra_memory_does_not_grow_with_positions_times_vocabulary(run_python):
    def extra(num_rows: int, vocab_size: int) -> int:
        # Every large block goes back to the system when freed: the peak is what lives at once.
        environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        return int(run_python(MEMORY, num_rows, vocab_size, **environment))

    base = extra(2048, 32768)
    assert base > 2**21 * 4, "vacuous: less than one tile was measured"
    assert extra(4096, 65536) < 1.1 * base


ROUNDED = """
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, PhiConfig, Qwen3Config
from taopd.kernels import pair_score, topk_score
from taopd.models.output_head import head_dtype, read_head

sizes = dict(vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16)
configs = {"plain": Qwen3Config(**sizes), "bias": PhiConfig(**sizes),
           "softcap": Gemma2Config(**sizes, final_logit_softcapping=5.0)}
for name, config in configs.items():
    for autocast in (True, False):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        model = model if autocast else model.bfloat16()
        ids = torch.arange(40)[None]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            own = model(ids).logits[0].float()
            hidden = head_dtype(model.base_model(ids).last_hidden_state[0])
        assert hidden.dtype == torch.bfloat16
        everything = torch.arange(300).expand(40, -1)
        head, options = read_head(model, 300), dict(k=16, impl=IMPL)
        scores = topk_score(hidden, head, ids[0], want_ids=everything, **options)
        logits = scores.want_logprobs + scores.logsumexp[:, None]
        # Every quantity is of one head: the mass is 1, and the list is the log-probs at its ids.
        assert (scores.want_logprobs.exp().sum(-1) - 1).abs().max() < 1e-5, (name, autocast)
        listed = scores.want_logprobs.gather(1, scores.topk_ids)
        assert (listed - scores.topk_logprobs).abs().max() < 1e-5
        # The model's own logits are these, rounded; a soft cap rounds three times more.
        assert (logits - own).abs().max() < 2**-7 * own.abs().max() + 1e-3
        if name == "plain":
            assert (logits.bfloat16().float() == own).float().mean() > 0.99, autocast
        pair = pair_score(hidden, head, hidden, head, ids[0], **options)
        assert pair.disagreement.abs().max() < 1e-6
        assert (pair.student.want_logprobs - pair.student.topk_logprobs).abs().max() < 1e-5
print("agrees")
"""


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_a_bf16_forward_is_read_with_one_rounding(impl, run_python):
    """Oracle: the model's own logits in bfloat16, with 16-bit weights and with autocast on float32 ones."""
    if impl == "triton":
        pytest.importorskip("triton")
    script = ROUNDED.replace("IMPL", repr(impl))
    assert run_python(script, TRITON_INTERPRET="1").strip() == "agrees"
