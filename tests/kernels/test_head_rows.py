"""Log-probs and gradients of one tile of logits, in PyTorch and in Triton: as near the truth as eager PyTorch, row by
row.

The same checks run on `rows_torch` here, on the Triton kernels under Triton's interpreter in a process of its own,
and on a GPU with `-m gpu`.
"""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dpo_fast_kernels.head import rows_torch
from dpo_fast_kernels.head.logits import STATISTICS, LogitTransform
from dpo_fast_kernels.specification import row_gradient_reference, row_logps_reference
from interpreting import interpreted
from numerics import assert_close_to_truth

TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=-0.3, temperature=0.7),
    "capped": LogitTransform(scale=1.5, softcap=5.0, temperature=1.3),
}
SIZES = [(63, 507), (7, 1003), (1, 1), (5, 8)]


def tile(n: int, v: int, dtype: torch.dtype, biased: bool, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1000 * n + v)
    z = (3 * torch.randn(n, v, generator=generator)).to(dtype)
    targets = torch.randint(v, (n,), generator=generator)
    targets[::3] = z.float().argmax(-1)[::3]  # random targets are hardly ever the most likely token
    bias = torch.randn(v, generator=generator).to(dtype) if biased else None
    return z.to(device), targets.to(device), bias if bias is None else bias.to(device)


def total(z: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """z + bias in `dtype`, on the CPU."""
    return z.cpu().to(dtype) if bias is None else z.cpu().to(dtype) + bias.cpu().to(dtype)


def forward(row_ops: ModuleType, z, targets, bias=None, transform=LogitTransform(), names=STATISTICS):  # noqa: B008
    """Log-probs, log-sum-exps and the statistics `names`, whose memory is poisoned before."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    statistics = {name: torch.full((len(z),), torch.nan, dtype=dtype, device=z.device) for name in names}
    logps, lse = row_ops.row_logps_fwd(z, targets, bias, transform=transform, statistics=statistics)
    return logps, lse, statistics


def check_forward(row_ops: ModuleType, n, v, dtype, transform, biased, device="cpu") -> None:
    z, targets, bias = tile(n, v, dtype, biased, device)
    before = z.clone()
    logps, lse, statistics = forward(row_ops, z, targets, bias, transform)
    assert torch.equal(z, before), "the forward must leave the tile as it is"
    eager = row_logps_reference(total(z, bias, torch.float32), targets.cpu(), transform, statistics=True)
    truth = row_logps_reference(total(z, bias, torch.float64), targets.cpu(), transform, statistics=True)
    for name, value in {"logps": logps, **statistics}.items():
        if name != "is_top1":
            assert_close_to_truth(value, getattr(eager, name), getattr(truth, name), name)
    assert torch.equal(statistics["is_top1"].cpu(), truth.is_top1.float())
    logits = transform(total(z, bias, torch.float64))
    assert_close_to_truth(lse, logits.float().logsumexp(-1), logits.logsumexp(-1), "lse")
    for names in ((), ("entropy",), ("log_sum_sq_probs", "is_top1")):
        lean, _, some = forward(row_ops, z, targets, bias, transform, names)
        assert torch.equal(lean, logps)
        assert all(torch.equal(value, statistics[name]) for name, value in some.items())


def check_gradient(row_ops: ModuleType, n, v, dtype, transform, biased, device="cpu") -> None:
    z, targets, bias = tile(n, v, dtype, biased, device)
    coefficient = torch.linspace(-2, 1.7, n, device=device)
    coefficient[n // 2] = 0
    logps, lse, _ = forward(row_ops, z, targets, bias, transform, ())
    known = {"transform": transform, "logps": logps, "lse": lse}
    single, double = total(z, bias, torch.float32), total(z, bias, torch.float64)

    eager = row_gradient_reference(single, targets.cpu(), transform).to(dtype)
    truth = row_gradient_reference(double, targets.cpu(), transform)
    elsewhere = torch.full_like(z, torch.nan)
    row_ops.row_logps_bwd(z.clone(), targets, bias, out=elsewhere, **known)
    assert_close_to_truth(elsewhere, eager, truth, "D")
    fused = torch.full_like(z, torch.nan)
    again = row_ops.row_logps_fwd_bwd(z.clone(), targets, bias, transform=transform, statistics={}, out=fused)
    assert torch.equal(again, logps)
    assert_close_to_truth(fused, eager, truth, "D of the fused pass")

    eager = row_gradient_reference(single, targets.cpu(), transform, coefficient.cpu()).to(dtype)
    truth = row_gradient_reference(double, targets.cpu(), transform, coefficient.cpu().double())
    z[n // 2] = torch.nan
    row_ops.row_logps_bwd(z, targets, bias, out=z, coefficient=coefficient, **known)
    assert torch.equal(z[n // 2], torch.zeros_like(z[n // 2])), "a row with coefficient 0 must be 0 whatever it held"
    assert_close_to_truth(z, eager, truth, "coefficient · D, in place")


def check_masked_vocabulary(row_ops: ModuleType, device="cpu") -> None:
    """A bias of −inf takes words out of the vocabulary, whole blocks of them too."""
    z, targets, _ = tile(5, 1003, torch.float32, False, device)
    bias = torch.zeros(1003, device=device)
    bias[:600] = -torch.inf
    targets = targets % 403 + 600
    logps, lse, statistics = forward(row_ops, z, targets, bias)
    eager, truth = (
        row_logps_reference(z[:, 600:].cpu().to(dtype), targets.cpu() - 600, statistics=True)
        for dtype in (torch.float32, torch.float64)
    )
    for name, value in {"logps": logps, **statistics}.items():
        if name not in ("is_top1", "mean_logit"):
            assert_close_to_truth(value, getattr(eager, name), getattr(truth, name), name)
    assert torch.equal(statistics["mean_logit"].cpu(), torch.full((5,), -torch.inf))
    row_ops.row_logps_bwd(z, targets, bias, logps, lse, transform=LogitTransform(), out=z)
    assert (z[:, :600] == 0).all()
    assert torch.isfinite(z).all()


def check_confident_target(row_ops: ModuleType, device="cpu") -> None:
    """Where p is almost 1, 1 − p must come from the log-prob without cancellation."""
    margins = torch.tensor([2.0, 7.0, 9.0, 12.0, 14.0], device=device)
    z = torch.zeros(5, 100, device=device)
    targets = torch.arange(5, device=device) * 20
    z[torch.arange(5), targets] = margins
    logps, lse, _ = forward(row_ops, z, targets)
    row_ops.row_logps_bwd(z, targets, None, logps, lse, transform=LogitTransform(), out=z)
    expected = -torch.expm1(logps.double())
    assert ((z.double()[torch.arange(5), targets] - expected).abs() <= 4e-7 * expected).all()


def check_far_rows(row_ops: ModuleType, device="cpu") -> None:
    """A row that begins 2³¹ elements into the tile, which neither its number nor the stride tells.

    Both strides are multiples of 16, as a kernel that is compiled for others sums in another order.
    """
    memory = torch.empty(2**31 + 1008, dtype=torch.float16, device=device)  # three rows of it are ever touched
    z, targets, _ = tile(3, 1008, torch.float16, False, device)
    far = memory.as_strided((3, 1008), (2**30, 1)).copy_(z)
    logps, lse, _ = forward(row_ops, z, targets)
    assert torch.equal(forward(row_ops, far, targets)[0], logps)
    for rows in (z, far):
        row_ops.row_logps_bwd(rows, targets, None, logps, lse, transform=LogitTransform(), out=rows)
    assert torch.equal(far, z)


def check_arguments_that_lie_apart(row_ops: ModuleType, device="cpu") -> None:
    """Tiles, targets, biases and offsets with strides of their own, as columns and slices of the user's tensors."""
    z, targets, bias = tile(7, 1003, torch.float32, True, device)
    wide = torch.full((7, 1024), torch.nan, device=device)
    out = torch.full_like(wide, torch.nan)
    wide[:, :1003] = z
    apart = [torch.stack([tensor, tensor + 1], 1)[:, 0] for tensor in (targets, bias)]
    found, lse, _ = forward(row_ops, wide[:, :1003], *apart)
    expected = row_logps_reference(total(z, bias, torch.float64), targets.cpu())
    eager = row_logps_reference(total(z, bias, torch.float32), targets.cpu())
    assert_close_to_truth(found, eager.logps, expected.logps, "logps")
    options = {"transform": LogitTransform(), "out": out[:, :1003]}
    row_ops.row_logps_bwd(wide[:, :1003], *apart, found, lse, **options)
    eager, truth = (row_gradient_reference(total(z, bias, x), targets.cpu()) for x in (torch.float32, torch.float64))
    assert_close_to_truth(out[:, :1003], eager, truth, "D")
    assert out[:, 1003:].isnan().all(), "what lies between rows is nobody's"
    cu_scores = torch.tensor([[0, 9], [3, 9], [7, 9]], device=device)[:, 0]
    assert torch.allclose(row_ops.sequence_sums(found, cu_scores), torch.stack([found[:3].sum(), found[3:].sum()]))


def check_sequence_sums(row_ops: ModuleType, device="cpu") -> None:
    """Long and short completions; sums that fp32 would get wrong."""
    lengths = [1, 2500, 1024, 3]
    logps = -(10 ** torch.linspace(-4, 2, sum(lengths), device=device))
    cu_scores = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    truth = torch.stack([part.double().sum() for part in logps.split(lengths)])
    for offsets in (cu_scores, cu_scores.int()):
        assert torch.equal(row_ops.sequence_sums(logps, offsets), truth.float())
    assert row_ops.sequence_sums(logps[:0], cu_scores[:1]).shape == (0,)


def check_ill_placed_sums(row_ops: ModuleType, device="cpu") -> None:
    """Where looking at offsets would wait for the device, a wrong one shows as NaN."""
    logps = torch.full((10,), -1.0, device=device)
    for offsets, wrong in {
        (0, 4, 4, 10): [False, True, False],
        (0, 5, 9): [False, True],
        (0, 5, 11): [False, True],
        (1, 5, 10): [True, False],
        (0, 6, 5, 10): [False, True, False],
    }.items():
        sums = row_ops.sequence_sums(logps, torch.tensor(offsets, device=device))
        assert sums.isnan().tolist() == wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("n, v", SIZES)
@pytest.mark.parametrize("check", [check_forward, check_gradient])
def test_torch(check, n, v, dtype, transform, biased, monkeypatch):
    monkeypatch.setattr(rows_torch, "_CPU_BLOCK", 10 * v)  # blocks of 10 rows on one thread, the last one short
    check(rows_torch, n, v, dtype, transform, biased)


@pytest.mark.parametrize(
    "check", [check_masked_vocabulary, check_confident_target, check_arguments_that_lie_apart, check_sequence_sums]
)
def test_torch_edges(check):
    check(rows_torch)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_reference_gradient_is_the_derivative(transform):
    z, targets, _ = tile(4, 11, torch.float64, False)
    coefficient = torch.tensor([1.0, -0.5, 0.0, 3.0], dtype=torch.float64)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: row_logps_reference(z, targets, transform).logps, z)
    (derivative,) = torch.autograd.grad(row_logps_reference(z, targets, transform).logps @ coefficient, z)
    formula = row_gradient_reference(z.detach(), targets, transform, coefficient) * transform.slope
    assert torch.allclose(formula, derivative, rtol=1e-12, atol=1e-14)


def test_reference_statistics_by_hand():
    z = torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64)
    result = row_logps_reference(z, torch.tensor([1]), LogitTransform(scale=3.0, temperature=1.5), statistics=True)
    p = torch.tensor([1.0, torch.tensor(4.0).exp(), torch.tensor(2.0).exp()], dtype=torch.float64)
    p = p / p.sum()
    assert torch.allclose(result.logps, p[1:2].log(), atol=1e-7)
    assert torch.allclose(result.entropy, -(p * p.log()).sum()[None], atol=1e-7)
    assert result.mean_logit.item() == pytest.approx(2.0)  # logits 0, 4, 2
    assert torch.allclose(result.log_sum_sq_probs, (p * p).sum().log()[None], atol=1e-7)
    assert result.is_top1.tolist() == [True]
    assert row_logps_reference(z, torch.tensor([2]), statistics=True).is_top1.tolist() == [False]


def test_capped_logits_by_hand():
    transform = LogitTransform(scale=2.0, softcap=30.0, temperature=0.5)
    z = torch.tensor([-40.0, 0.0, 3.0], dtype=torch.float64)
    assert torch.allclose(transform(z), 30 * torch.tanh(2 * z / 30) / 0.5, rtol=1e-15)


@pytest.mark.parametrize(
    "argument, value",
    [("scale", 0.0), ("scale", float("inf")), ("softcap", 0.0), ("softcap", -30.0), ("softcap", float("nan"))]
    + [("temperature", 0.0), ("temperature", -1.0), ("temperature", float("inf"))],
)
def test_transform_names_a_bad_value(argument, value):
    with pytest.raises(ValueError, match=argument):
        LogitTransform(**{argument: value})


EDGES = (
    check_masked_vocabulary,
    check_confident_target,
    check_far_rows,
    check_arguments_that_lie_apart,
    check_sequence_sums,
    check_ill_placed_sums,
)


def interpreted_checks() -> int:
    """Runs the checks on the Triton kernels, in blocks small enough that rows take several; returns how many ran."""
    from dpo_fast_kernels.head import rows_triton

    rows_triton._CONFIGS[9] = {"BLOCK_V": 256, "num_warps": 1}  # a lane has several logits of a block
    cases = itertools.product(
        (check_forward, check_gradient), (torch.float32, torch.float16), TRANSFORMS.values(), (False, True)
    )
    count = 0
    for check, dtype, transform, biased in cases:
        check(rows_triton, 3, 507, dtype, transform, biased)
        count += 1
    check_forward(rows_triton, 2, 1, torch.float32, LogitTransform(), True)
    check_forward(rows_triton, 2, 1008, torch.float16, TRANSFORMS["capped"], True)  # in aligned rows
    check_gradient(rows_triton, 2, 1003, torch.float32, TRANSFORMS["capped"], True)
    for check in EDGES:
        check(rows_triton)
    return count + 3 + len(EDGES)


def test_triton_kernels_interpreted():
    assert interpreted("test_head_rows", "interpreted_checks()") == 33


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("n, v", [*SIZES, (100, 49153), (33, 128256)])
@pytest.mark.parametrize("check", [check_forward, check_gradient])
def test_triton_on_gpu(check, n, v, dtype, transform, biased):
    from dpo_fast_kernels.head import rows_triton

    check(rows_triton, n, v, dtype, transform, biased, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("check", EDGES)
def test_triton_edges_on_gpu(check):
    from dpo_fast_kernels.head import rows_triton

    check(rows_triton, "cuda")
