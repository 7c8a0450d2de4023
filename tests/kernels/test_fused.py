"""The Triton kernel, simulated on the CPU by Triton's interpreter and compiled ahead of time for GPUs.

Oracle: `reference` in float64. Both run in a subprocess: Triton reads TRITON_INTERPRET when it is imported.
"""

import importlib.util

import pytest
import torch

from taopd.kernels import topk_score

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed; the CPU can simulate it after: pip install triton",
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

INTERPRETED = """
import torch
from taopd.kernels import pair_score, reference, topk_score
from taopd.errors import ConfigError
from tests.kernels.cases import CASES, compare, make_case
cases = {name: make() for name, make in CASES.items()}
cases["bfloat16"] = make_case(70, 300, 40, 5, dtype=torch.bfloat16, bias=True)
cases["float16"] = make_case(3, 130, 20, 5, dtype=torch.float16)
for name, case in cases.items():
    if case.k > 32:
        continue
    arguments = {"k": case.k, "temperature": case.temperature}
    found = topk_score(case.hidden, case.head, case.target_ids, impl="triton", **arguments)
    exact = case.double()
    truth = reference.topk_score(exact.hidden, exact.head, exact.target_ids, **arguments)
    try:
        compare(found, truth, case)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}")
student, teacher = make_case(13, 300, 17, 7, softcap=4.0), make_case(13, 300, 23, 7, bias=True)
hidden = student.hidden.clone()
hidden[4, 0] = torch.inf
call = hidden, student.head, teacher.hidden, teacher.head, student.target_ids
found, plain = (pair_score(*call, k=7, impl=impl) for impl in ("triton", "chunked"))
assert (~found.student_finite).nonzero().flatten().tolist() == [4]
assert found.teacher_finite.all()
keep = torch.arange(13) != 4
for name in ("disagreement", "reverse_disagreement", "compatibility", "bhattacharyya"):
    torch.testing.assert_close(
        getattr(found, name)[keep], getattr(plain, name)[keep], atol=1e-5, rtol=1e-5
    )
hidden[4, 0] = torch.nan
flags = pair_score(*call, k=7, impl="triton").student_finite
assert (~flags).nonzero().flatten().tolist() == [4]
for change, words in (({"k": 33}, "at most 32"), ({"full_kl": True}, "no full-vocabulary KL")):
    try:
        pair_score(*call, impl="triton", **{"k": 7, **change})
    except ConfigError as error:
        assert words in str(error)
    else:
        raise AssertionError(words)
print("agrees")
"""

COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from taopd.kernels import fused
flags = dict(HAS_BIAS=True, HAS_SOFTCAP=True, WIDEN=False, LOWEST=fused.LOWEST, BLOCK_K=16)
flags |= dict(BLOCK_N=fused.BLOCK_N, BLOCK_V=fused.BLOCK_V, BLOCK_D=fused.BLOCK_D)
kernel = fused._scan_kernel
for dtype in ("bf16", "fp32"):
    flags["BLOCK_V"] = fused.WIDE_BLOCK_V if dtype == "bf16" else fused.BLOCK_V
    types = dict.fromkeys(("h_ptr", "w_ptr", "b_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("sums_ptr", "values_ptr"), "*fp32")
    types |= dict.fromkeys(("broken_ptr", "ids_ptr"), "*i32")
    types |= dict.fromkeys(("scale", "softcap", "inverse_temperature"), "fp32")
    types |= dict.fromkeys(flags, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]]
               for name in ("h_ptr", "w_ptr", "h_stride", "w_stride", "width")}
    source = ASTSource(kernel, signature=signature, constexprs=flags, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                            options={"num_warps": fused.NUM_WARPS})
    assert binary.metadata.shared < 227 * 1024
    assert dtype == "fp32" or "wgmma" in binary.asm["ptx"]
print("compiles")
"""


@needs_triton
def test_interpreted_kernel_matches_reference_in_float64(run_python):
    assert run_python(INTERPRETED, TRITON_INTERPRET="1").strip() == "agrees"


@needs_triton
def test_kernel_compiles_for_hopper_without_a_gpu(run_python):
    assert run_python(COMPILED, TRITON_INTERPRET="0").strip().endswith("compiles")


@needs_triton
@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_on_a_gpu_matches_chunked(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 256, generator=generator).to("cuda", dtype)
    weight = (0.1 * torch.randn(5003, 256, generator=generator)).to("cuda", dtype)
    targets = torch.zeros(300, dtype=torch.long, device="cuda")
    found, plain = (
        topk_score(hidden, weight, targets, k=16, impl=impl) for impl in ("triton", "chunked")
    )
    for name in ("target_logprobs", "topk_logprobs", "logsumexp", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), atol=1e-3, rtol=1e-3)
