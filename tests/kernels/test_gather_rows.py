"""Gathered rows: equal to indexing, gradients summed in fp32 and in a fixed order, by PyTorch and by Triton; an op that
torch.compile takes whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.library import opcheck

from compiling import ONE_CHIP, Case, assert_within_limits, compile_all
from dpo_fast_kernels import GatherPlan, gather_rows
from dpo_fast_kernels.gather.gather_rows import segment_sum, segment_sum_torch
from interpreting import interpreted
from numerics import assert_close_to_truth

ROWS, COLUMNS = 50, 7
INDICES = {
    "once each": np.random.default_rng(0).permutation(ROWS),
    "repeated": np.random.default_rng(1).integers(0, ROWS, 120),
    "few rows": np.array([3, 3, 3, 9, 3, 9]),
    "one row": np.full(33, 4),
    "none": np.zeros(0, np.int64),
}
PLANS = {name: GatherPlan.build(index) for name, index in INDICES.items()}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def scattered(dy: torch.Tensor, index: np.ndarray, rows: int = ROWS) -> torch.Tensor:
    """The gradient by its definition, one use after another."""
    dx = torch.zeros(rows, *dy.shape[1:], dtype=dy.dtype)
    for use, row in enumerate(index):
        dx[row] += dy[use]
    return dx


def check_sum(sum_rows, name: str, dtype: torch.dtype, shape=(COLUMNS,), device="cpu") -> None:
    plan = PLANS[name]
    dy = torch.randn(len(INDICES[name]), *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    moved = plan.to(device)
    dx = sum_rows(dy.to(device), moved.uses, moved.use_offsets, ROWS).cpu()
    truth = scattered(dy.double(), INDICES[name])
    if dtype == torch.float64:
        assert torch.allclose(dx, truth, rtol=1e-14, atol=1e-14)
        return
    # The sum is made in fp32 and rounded once, whatever the dtype.
    assert_close_to_truth(dx, scattered(dy.float(), INDICES[name]).to(dtype), truth, name, factor=1.0)
    untouched = np.setdiff1d(np.arange(ROWS), INDICES[name])
    assert torch.equal(dx[untouched], torch.zeros_like(dx[untouched]))
    transposed = dy.transpose(0, -1).contiguous().transpose(0, -1).to(device)
    assert torch.equal(sum_rows(transposed, moved.uses, moved.use_offsets, ROWS).cpu(), dx), "whatever the strides"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INDICES)
def test_plain_pytorch_sums_in_order(name, dtype):
    check_sum(segment_sum_torch, name, dtype)
    check_sum(segment_sum_torch, name, dtype, shape=(2, 3))


@pytest.mark.parametrize("name", INDICES)
def test_rows_and_their_gradients(name):
    x = torch.randn(ROWS, 3, COLUMNS, dtype=torch.float64, requires_grad=True)
    y = gather_rows(x, PLANS[name])
    assert torch.equal(y, x[torch.from_numpy(INDICES[name])])
    weights = torch.randn_like(y)
    (dx,) = torch.autograd.grad((y * weights).sum(), x)
    assert torch.allclose(dx, scattered(weights, INDICES[name]), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, PLANS[name]), x)


def test_the_inverse_names_every_use_once_in_order():
    plan, index = PLANS["repeated"], INDICES["repeated"]
    assert plan.use_offsets.shape == (index.max() + 2,)
    for row in range(index.max() + 1):
        uses = plan.uses[plan.use_offsets[row] : plan.use_offsets[row + 1]]
        assert uses.tolist() == np.flatnonzero(index == row).tolist()


@pytest.mark.parametrize("name", ["repeated", "few rows"])
def test_the_ops_pass_pytorchs_checks(name):
    plan = PLANS[name]
    x = torch.randn(ROWS, COLUMNS, requires_grad=True)
    dy = torch.randn(len(INDICES[name]), COLUMNS)
    opcheck(torch.ops.dpo_fast.gather_rows, (x, plan.index, plan.uses, plan.use_offsets))
    opcheck(torch.ops.dpo_fast.sum_gathered_rows, (dy, plan.uses, plan.use_offsets, ROWS))


def test_one_graph_serves_every_batch():
    def loss(x, plan):
        return (gather_rows(x * 2, plan) ** 2).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, reads in ((23, 31), (57, 40), (29, 101)):
            plan = GatherPlan.build(np.random.default_rng(rows).integers(0, rows - 1, reads))
            x = torch.randn(rows, COLUMNS, dtype=torch.float64, requires_grad=True)
            results = []
            for function in (loss, compiled):
                value = function(x, plan)
                results.append((value.detach(), *torch.autograd.grad(value, x)))
            for eager, actual in zip(*results, strict=True):
                assert torch.allclose(actual, eager, rtol=1e-13)


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="plan reads row 49"):
        gather_rows(torch.zeros(10, 2), PLANS["once each"])
    with pytest.raises(ValueError, match="plan is on cpu and x on meta"):
        gather_rows(torch.zeros(ROWS, 2, device="meta"), PLANS["once each"])
    with pytest.raises(ValueError, match="index"):
        GatherPlan.build(np.array([1, -1]))
    with pytest.raises(ValueError, match="index"):
        GatherPlan.build(np.zeros((2, 2), np.int64))


def interpreted_checks() -> int:
    """Runs the checks on the Triton kernel, in several blocks of columns; returns how many ran."""
    from dpo_fast_kernels.gather import gather_rows_triton

    gather_rows_triton._CONFIGS[9] = {"BLOCK_D": 4, "num_warps": 1}
    count = 0
    for name in INDICES:
        for dtype in DTYPES[:2] + DTYPES[3:]:
            check_sum(gather_rows_triton.segment_sum_triton, name, dtype, shape=(2, 3))
            count += 1
    # A sum that starts 2³¹ elements into dy.
    memory = torch.empty(2**31 + 8, dtype=torch.float16)  # three rows of it are ever touched
    far = memory.as_strided((3, 5), (2**30, 1)).copy_(torch.arange(15).reshape(3, 5))
    plan = GatherPlan.build(np.array([1, 0, 1]))
    dx = gather_rows_triton.segment_sum_triton(far, plan.uses, plan.use_offsets, 4)
    assert torch.equal(dx, scattered(far.clone(), np.array([1, 0, 1]), rows=4))
    return count + 1


def test_the_triton_kernel_interpreted():
    assert interpreted("test_gather_rows", "interpreted_checks()") == 16


@pytest.mark.parametrize("capability", ONE_CHIP)
def test_the_triton_kernel_compiles_within_limits(capability):
    pytest.importorskip("triton", reason="kernels are compiled by Triton, which this platform lacks")
    from dpo_fast_kernels.gather.gather_rows_triton import _CONFIGS

    config = dict(_CONFIGS[capability // 10])
    options = {"num_warps": config.pop("num_warps")}
    cases = [
        Case(
            "dpo_fast_kernels.gather.gather_rows_triton",
            "_segment_sum_kernel",
            {"dy_ptr": f"*{dtype}", "uses_ptr": "*i64", "use_offsets_ptr": "*i64", "dx_ptr": f"*{dtype}"}
            | {"R": "i32", "D": "i32", "stride_ym": "i64"},
            config,
            options,
            aligned,
        )
        for dtype in ("bf16", "fp16", "fp32", "fp64")
        for aligned in (True, False)
    ]
    for case, resources in zip(cases, compile_all(cases, capability), strict=True):
        assert_within_limits(case, resources, capability, registers=64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("shape", [(COLUMNS,), (8, 128), (3000,)], ids=str)
def test_gpu_sums_in_order(name, dtype, shape):
    check_sum(segment_sum, name, dtype, shape=shape, device="cuda")


@pytest.mark.gpu
def test_gpu_runs_are_equal_and_never_wait_for_the_device():
    index = np.random.default_rng(0).integers(0, 3000, 20000)
    plan = GatherPlan.build(index).to("cuda")
    x = torch.randn(3001, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.randn(20000, 1024, device="cuda", dtype=torch.bfloat16)
    (expected,) = torch.autograd.grad(gather_rows(x, plan), x, weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        (again,) = torch.autograd.grad(gather_rows(x, plan), x, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, expected)


@pytest.mark.gpu
def test_gpu_offsets_pass_two_to_the_31():
    plan = GatherPlan.build(np.array([1, 0, 1]))
    memory = torch.zeros(2**31 + 8, dtype=torch.float16, device="cuda")
    far = memory.as_strided((3, 5), (2**30, 1)).copy_(torch.arange(15).reshape(3, 5))
    moved = plan.to("cuda")
    dx = segment_sum(far, moved.uses, moved.use_offsets, 4)
    assert torch.equal(dx.cpu(), scattered(far.cpu().clone(), np.array([1, 0, 1]), rows=4))
