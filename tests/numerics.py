"""The one tolerance of the project: a kernel may err at most twice as far from the float64 truth as eager PyTorch does.

Eager PyTorch means the same formula in the same dtype, written the usual way. A floor of a few fp32 roundings of the
largest true value covers the cases where eager happens to be exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 8  # roundings


def assert_close_to_truth(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,  # float64
    name: str,
    *,
    factor: float = 2.0,
) -> None:
    """Asserts that `actual` errs at most `factor` times as far from `truth` as `eager`, at its worst and in RMS."""
    assert truth.dtype == torch.float64, f"{name}: the truth must be float64, got {truth.dtype}"
    assert actual.shape == eager.shape == truth.shape, f"{name}: shapes {actual.shape}, {eager.shape}, {truth.shape}"
    assert torch.isfinite(truth).all(), f"{name}: the truth is not finite"
    if truth.numel() == 0:
        return
    truth = truth.detach().cpu()
    error, eager_error = ((tensor.detach().cpu().double() - truth).abs() for tensor in (actual, eager))
    rounding = _FLOOR * torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
    worst = error.nan_to_num(nan=torch.inf).argmax()
    where = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
    bound = factor * eager_error.max() + rounding * truth.abs().max()
    assert error[where] <= bound, (
        f"{name}: worst at {where}: {actual[where].item()!r} for {truth[where].item()!r}, "
        f"error {error[where]:.3e} > {bound:.3e} (eager errs by {eager_error.max():.3e})"
    )
    rms, eager_rms = (e.square().mean().sqrt() for e in (error, eager_error))
    bound = factor * eager_rms + rounding * truth.square().mean().sqrt()
    assert rms <= bound, f"{name}: RMS error {rms:.3e} > {bound:.3e} (eager {eager_rms:.3e}), worst at {where}"
