"""What the head does with memory: logits and D lie in rows that cuBLAS likes, and nothing of the weight's size is
filled, held or written without need.

`rows_torch` is watched on the CPU, and so stands for the Triton kernels, which get the same memory.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from test_linear_preference import GROUPS, Problem
from torch import Tensor

from dpo_fast.integrations.liger import FusedLinearDPOLoss
from dpo_fast_kernels import VocabularyShards, linear_logps, logps_of_logits, sequence_logps
from dpo_fast_kernels.head import gemm, rows_torch, tiles
from dpo_fast_kernels.head.tiles import ROW_MULTIPLE
from interpreting import interpreted
from looking_inside import LargestNewTensor, Writes

VOCABULARIES = (1, 507, 32001, 50257, 128257)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = [(3, 2), (1, 4), (9, 7), (2, 1)]  # 29 rows; one group is larger than a tile
TILE = 8
H, V = 23, 507
# Budgets in rows of D: all are kept, those of two tiles or none, and a large group is split where few are.
BUDGETS = {"kept": 10**6, "half kept": 2 * TILE, "recomputed": 0}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "CPU_ROWS", TILE)
    monkeypatch.setattr(tiles, "CPU_GROUP_ROWS", TILE)


def outside(problem: Problem, **options):
    def token_logps(hidden, weight, bias):
        return linear_logps(hidden, weight, problem.targets, bias, **options).logps

    return problem.outside(token_logps)


def watch_rows(monkeypatch, row_ops=rows_torch) -> list[Tensor]:
    """Returns a list that fills up with the logits and D that the work on rows is handed."""
    seen = []
    for name in ("row_logps_fwd", "row_logps_bwd", "row_logps_fwd_bwd"):
        original = getattr(row_ops, name)

        def watched(z, *arguments, original=original, **options):
            seen.extend((z, options.get("out", z)))
            return original(z, *arguments, **options)

        monkeypatch.setattr(row_ops, name, watched)
    return seen


def assert_aligned(rows: list[Tensor], v: int) -> None:
    assert rows
    for tensor in rows:
        assert tensor.shape[1] == v and tensor.stride(1) == 1
        assert tensor.stride(0) % ROW_MULTIPLE == 0 and tensor.storage_offset() % ROW_MULTIPLE == 0, tensor.stride()


def solve_every_way(problem: Problem, **options) -> None:
    for budget in BUDGETS.values():
        budget_bytes = budget * len(problem.weight) * problem.weight.element_size()
        for trains in ((True, True, True), (True, False, False)):
            for way in (problem.ours, lambda **options: outside(problem, **options)):
                problem.solve(way(budget_bytes=budget_bytes, **options), trains=trains)
    with torch.no_grad():
        linear_logps(problem.hidden, problem.weight, problem.targets, problem.bias, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", VOCABULARIES)
def test_rows_of_logits_and_d_begin_at_multiples_of_64_elements(v, dtype, monkeypatch):
    assert ROW_MULTIPLE == 64
    seen = watch_rows(monkeypatch)
    solve_every_way(Problem(dtype, SMALL, h=5, v=v))
    assert_aligned(seen, v)


def test_rows_of_a_shard_of_the_vocabulary_too(monkeypatch):
    seen = watch_rows(monkeypatch)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        solve_every_way(Problem(torch.bfloat16, SMALL, h=5, v=V), shards=VocabularyShards((V,), dist.group.WORLD))
    finally:
        dist.destroy_process_group()
    assert_aligned(seen, V)


def test_rows_behind_ligers_interface_too(monkeypatch):
    seen = watch_rows(monkeypatch)
    hidden = torch.randn(4, 6, 5).requires_grad_()
    head = FusedLinearDPOLoss(use_ref_model=False)
    head(torch.randn(V, 5).requires_grad_(), hidden, torch.randint(V, (4, 6)))[0].backward()
    assert_aligned(seen, V)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", VOCABULARIES)
def test_the_gradient_of_logits_lies_in_such_rows(v, dtype, monkeypatch):
    logits, targets = torch.randn(9, v).to(dtype).requires_grad_(), torch.randint(v, (9,))
    for function in (sequence_logps, lambda *arguments: logps_of_logits(*arguments).logps):
        (gradient,) = torch.autograd.grad(function(logits, targets, torch.tensor([0, 4, 9])).sum(), logits)
        assert_aligned([gradient], v)


def interpreted_checks() -> int:
    """The same for the Triton kernels, and for the backward of the fused head; returns how many tensors were seen."""
    from dpo_fast_kernels.head import rows_triton

    tiles.CPU_ROWS = tiles.CPU_GROUP_ROWS = TILE
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = watch_rows(monkeypatch, rows_triton)
        problem = Problem(groups=SMALL, h=16, v=101)
        problem.solve(problem.ours(backend="triton"))
        for backend in ("triton", "fused"):
            problem.solve(outside(problem, backend=backend))
        assert_aligned(seen, 101)
    return len(seen)


def test_triton_kernels_get_the_same_memory():
    assert interpreted("test_head_memory", "interpreted_checks()") > 0


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
def test_no_memory_of_the_weights_size_is_filled(inside, budget, dtype, autocast):
    """The first product of a sum is written: 8 bytes less per entry of dW than to fill, read and add."""
    problem = Problem(dtype, GROUPS, h=H, v=V)
    budget_bytes = budget * V * problem.weight.element_size()
    function = problem.ours(budget_bytes=budget_bytes) if inside else outside(problem, budget_bytes=budget_bytes)
    with Writes(V, H) as writes, torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        problem.solve(function)
    assert writes.seen
    filling = ("zero", "fill", "full")
    assert not [write.operation for write in writes.seen if any(name in write.operation for name in filling)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [40, 10_000], ids=["tiles", "a tile"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_the_backward_of_the_loss_makes_no_second_weight(split, tile, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_GROUP_ROWS", tile)
    problem = Problem(dtype, GROUPS, h=H, v=V)
    leaves = [tensor.requires_grad_() for tensor in (problem.hidden, problem.weight, problem.bias)]
    loss, _ = problem.ours(budget_bytes=0 if split else 2**31)(*leaves)
    with LargestNewTensor() as largest:
        loss.backward()
    assert 0 < largest.elements < problem.hidden.numel()
    assert problem.weight.grad.dtype == dtype


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    problem = Problem()
    leaves = [tensor.requires_grad_() for tensor in (problem.hidden, problem.weight, problem.bias)]
    loss, _ = problem.ours()(*leaves)
    first, second, last = (torch.autograd.grad(3 * loss, leaves, retain_graph=keep) for keep in (True, True, False))
    for one, two, three in zip(first, second, last, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
        assert len({x.data_ptr() for x in (one, two, three)}) == 3


@pytest.mark.parametrize("tile", [40, 10_000], ids=["tiles", "a tile"])
@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
def test_a_bf16_gradient_of_the_weight_is_rounded_once_and_fp32_only_while_tiles_add(inside, tile, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_GROUP_ROWS", tile)
    monkeypatch.setattr(tiles, "CPU_ROWS", tile)
    monkeypatch.setattr(gemm, "_CPU_BLOCK", 2000)  # what a CPU casts at a time is smaller than the weight
    problem = Problem(torch.bfloat16, [(20, 20), (1, 3), (30, 9)], h=H, v=V, biased=False)
    leaves = [problem.hidden.requires_grad_(), problem.weight.requires_grad_(), None]
    function = problem.ours() if inside else outside(problem, budget_bytes=2**31 if tile > 40 else 0)
    with Writes(V, H) as writes:
        function(*leaves)[0].backward()
    made = [write for write in writes.seen if write.is_new]
    sums, rounded = ([write for write in made if write.dtype == dtype] for dtype in DTYPES[:2])
    assert len(rounded) == 1
    assert len(sums) == (1 if tile == 40 else 0)
    assert problem.weight.grad.data_ptr() == rounded[0].data_ptr
