"""Logits → log-probs of completions: near the truth, with one tensor of the logits' size, and bad input named."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dpo_fast_kernels import LogitTransform, linear_logps, logps_of_logits, sequence_logps
from dpo_fast_kernels.specification import row_logps_reference
from interpreting import interpreted
from numerics import assert_close_to_truth

LENGTHS = [1, 40, 17, 5]
TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=-0.3, temperature=0.7),
    "capped": LogitTransform(scale=1.5, softcap=5.0, temperature=1.3),
}


def problem(dtype=torch.float32, lengths=LENGTHS, v=507, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(sum(lengths), v, generator=generator)).to(dtype).to(device)
    targets = torch.randint(v, (sum(lengths),), generator=generator).to(device)
    cu_scores = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=device)
    return logits, targets, cu_scores


def eager(transform, dtype):
    def function(logits: Tensor, targets: Tensor, cu_scores: Tensor) -> Tensor:
        logps = row_logps_reference(logits.to(dtype), targets, transform).logps
        return torch.stack([part.sum() for part in logps.split(cu_scores.diff().tolist())])

    return function


def solve(function, logits, targets, cu_scores) -> tuple[Tensor, Tensor]:
    """Sums, and the gradient of a fixed combination of them."""
    logits = logits.detach().requires_grad_()
    sums = function(logits, targets, cu_scores)
    (gradient,) = torch.autograd.grad(sums @ torch.linspace(-2, 1, len(sums)).to(sums), logits)
    return sums.detach(), gradient


def check(dtype, transform, device="cpu", lengths=LENGTHS, v=507, backend="auto") -> None:
    logits, targets, cu_scores = problem(dtype, lengths, v, device)
    before = logits.clone()
    actual = solve(lambda *x: sequence_logps(*x, transform=transform, backend=backend), logits, targets, cu_scores)
    usual = solve(eager(transform, torch.float32), logits, targets, cu_scores)
    true = solve(eager(transform, torch.float64), logits.double(), targets, cu_scores)
    assert torch.equal(logits, before), "the logits are the user's"
    assert actual[1].dtype == dtype
    for name, *values in zip(("sums", "d logits"), actual, usual, true, strict=True):
        assert_close_to_truth(*values, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_sums_and_gradient(transform, dtype):
    check(dtype, transform)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradcheck(transform):
    logits, targets, cu_scores = problem(torch.float64, [2, 1, 3], v=7)
    function = lambda logits: sequence_logps(logits, targets, cu_scores, transform=transform)  # noqa: E731
    assert torch.autograd.gradcheck(function, logits.requires_grad_())


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_every_number_of_a_row_is_that_of_the_head(transform):
    """Log-probs of tokens, with their gradient, and statistics, against a head that makes the same logits."""
    names = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
    logits, targets, cu_scores = problem(torch.float64, [2, 1, 3], v=7)
    logits.requires_grad_()
    options = {"transform": transform, "statistics": names}
    ours = logps_of_logits(logits, targets, cu_scores, **options)
    theirs = linear_logps(logits, torch.eye(7, dtype=logits.dtype), targets, cu_scores=cu_scores, **options)
    for name in ("logps", "sequence_logps", *names):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name)), name
    weights = torch.linspace(-1, 2, len(targets), dtype=logits.dtype)
    gradients = [
        torch.autograd.grad(rows.logps @ weights + rows.sequence_logps.sum(), logits)[0] for rows in (ours, theirs)
    ]
    assert torch.allclose(*gradients)


def test_rows_may_lie_apart():
    logits, targets, cu_scores = problem()
    wide = torch.full((len(logits), 1000), torch.nan)
    wide[:, :507] = logits
    for view in (wide[:, :507], logits.t().contiguous().t()):
        for actual, expected in zip(
            solve(sequence_logps, view, targets, cu_scores), solve(sequence_logps, logits, targets, cu_scores),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(actual, expected)


def test_no_rows():
    logits = torch.zeros(0, 5, requires_grad=True)
    sums = sequence_logps(logits, torch.zeros(0, dtype=torch.int64), torch.tensor([0]))
    sums.sum().backward()
    assert sums.shape == (0,) and logits.grad.shape == (0, 5)


@pytest.mark.parametrize("argument, change", [
    ("logits", {"logits": torch.zeros(3)}),
    ("logits", {"logits": torch.zeros(3, 5, dtype=torch.int64)}),
    ("targets", {"targets": torch.tensor([0, 1])}),
    ("targets", {"targets": torch.tensor([0, 1, 5])}),
    ("targets", {"targets": torch.tensor([0, 1, 2], dtype=torch.int32)}),
    ("targets", {"targets": torch.zeros(3, dtype=torch.int64, device="meta")}),
    ("cu_scores", {"cu_scores": torch.tensor([0, 2])}),
    ("cu_scores", {"cu_scores": torch.tensor([0, 0, 3])}),
    ("cu_scores", {"cu_scores": torch.tensor([[0, 3]])}),
    ("backend", {"backend": "fused"}),
    ("backend", {"backend": "triton"}),
])  # fmt: skip
def test_bad_arguments_are_named(argument, change, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {
        "logits": torch.zeros(3, 5),
        "targets": torch.tensor([0, 4, 1]),
        "cu_scores": torch.tensor([0, 1, 3]),
    }
    with pytest.raises(ValueError, match=f"^{argument}"):
        sequence_logps(**{**arguments, **change})


def interpreted_checks() -> int:
    """Returns how many problems were solved on the Triton kernels."""
    cases = list(itertools.product((torch.float32, torch.float16), TRANSFORMS.values()))
    for dtype, transform in cases:
        check(dtype, transform, lengths=[1, 3, 2], backend="triton")
    return len(cases)


def test_triton_backend_interpreted():
    assert interpreted("test_sequence_logps", "interpreted_checks()") == 6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_on_gpu(transform, dtype):
    check(dtype, transform, device="cuda", lengths=[512, 1, 300, 700], v=49153)


def test_long_completions_of_a_sure_model_are_right():
    """Peaked rows over a real vocabulary: what a running sum in fp32 loses of the tail adds up over the tokens."""
    generator = torch.Generator().manual_seed(0)
    rows, words = 512, 49_152
    logits = 3 * torch.randn(rows, words, generator=generator)
    sure = torch.randint(words, (rows, 1), generator=generator)
    logits.scatter_add_(1, sure, torch.full((rows, 1), 15.0))
    truth = sum(row.double().log_softmax(-1)[target] for row, target in zip(logits, sure[:, 0], strict=True))
    found = sequence_logps(logits, sure[:, 0], torch.tensor([0, rows]))
    assert abs(found.item() - truth.item()) < 3e-4, truth.item()
