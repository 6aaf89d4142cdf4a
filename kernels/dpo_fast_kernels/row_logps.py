"""One tile of logits → log-probs of the targets, and the gradient in place: Triton kernels.

    logp_n = x_n[t_n] − logΣ_v exp(x_n[v])        D_n = ∂logp_n/∂y_n = (onehot(t_n) − softmax(x_n)) ⊙ ∂x_n/∂y_n

z the product of the head and x = transform(z + bias) the logits, both fp32 in registers whatever the tile holds;
y = transform.slope·(z + bias), so that D holds no constant factor: rounded to bf16, it would bias every gradient alike.
N rows of the tile, V vocabulary. Importing this module imports Triton.

Bytes moved: forward N·V·itemsize(z); gradient N·V·(itemsize(z) + itemsize(out)). No atomics: runs are bitwise equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast_kernels.logits import LogitTransform, RowLogps

# Compute capability (major) → elements of V a program handles at a time, and its warps: 16 elements a thread, four
# 16-byte loads of fp32 in flight. Other architectures take the last row.
_CONFIGS = {8: (4096, 8), 9: (4096, 8), 10: (4096, 8)}


@triton.jit
def _expm1_nonpositive(x):
    """e^x − 1 for x ≤ 0 to a few ulp: the series where 1 would cancel."""
    series = 1.0 + x * (1.0 / 6.0) * (1.0 + x * (1.0 / 7.0))
    series = 1.0 + x * 0.5 * (1.0 + x * (1.0 / 3.0) * (1.0 + x * 0.25 * (1.0 + x * 0.2 * series)))
    return tl.where(x > -0.35, x * series, tl.exp(x) - 1.0)


@triton.jit
def _tanh(x):
    t = _expm1_nonpositive(-2.0 * tl.abs(x))
    magnitude = -t / (2.0 + t)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _load_bounded(z_ptr, bias_ptr, offs_v, mask_v, inner, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Loads z + bias in fp32, and bounds it by the tanh of the softcap."""
    z = tl.load(z_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        z = _tanh(z * inner)
    return z


@triton.jit
def _row_logps_fwd_kernel(
    z_ptr,
    bias_ptr,
    targets_ptr,
    logps_ptr,
    lse_ptr,
    entropy_ptr,
    mean_logit_ptr,
    is_top1_ptr,
    V,
    stride_zn,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    z_ptr += pid_n * stride_zn
    inner = tl.cast(inner, tl.float32)
    outer = tl.cast(outer, tl.float32)

    peak = -float("inf")
    total = 0.0  # Σ exp(x − peak)
    moment = 0.0  # Σ exp(x − peak)·(x − peak)
    logit_sum = 0.0
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        x = _load_bounded(z_ptr, bias_ptr, offs_v, mask_v, inner, HAS_BIAS, HAS_SOFTCAP) * outer
        if STATISTICS:
            logit_sum += tl.sum(tl.where(mask_v, x, 0.0), 0)
        x = tl.where(mask_v, x, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(x, 0))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # nothing but −inf so far: −inf − (−inf) is not 0
        decay = tl.exp(peak - shift)
        weights = tl.exp(x - shift)
        if STATISTICS:
            moved = tl.where(total > 0, total * (peak - shift), 0.0)
            moment = decay * (moment + moved) + tl.sum(tl.where(weights > 0, weights * (x - shift), 0.0), 0)
        total = total * decay + tl.sum(weights, 0)
        peak = new_peak

    target = tl.load(targets_ptr + pid_n)
    valid = (target >= 0) & (target < V)
    target = tl.where(valid, target, 0)
    x_target = _load_bounded(z_ptr, bias_ptr, target, valid, inner, HAS_BIAS, HAS_SOFTCAP) * outer
    x_target = tl.where(valid, x_target, float("nan"))
    log_total = tl.log(total)
    tl.store(logps_ptr + pid_n, x_target - peak - log_total)
    tl.store(lse_ptr + pid_n, peak + log_total)
    if STATISTICS:
        tl.store(entropy_ptr + pid_n, log_total - moment / total)
        tl.store(mean_logit_ptr + pid_n, logit_sum / V)
        tl.store(is_top1_ptr + pid_n, x_target >= peak)


@triton.jit
def _row_logps_bwd_kernel(
    z_ptr,
    bias_ptr,
    targets_ptr,
    logps_ptr,
    lse_ptr,
    coefficient_ptr,
    out_ptr,
    V,
    stride_zn,
    stride_on,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_COEFFICIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    inner = tl.cast(inner, tl.float32)
    outer = tl.cast(outer, tl.float32)

    bounded = _load_bounded(z_ptr + pid_n * stride_zn, bias_ptr, offs_v, mask_v, inner, HAS_BIAS, HAS_SOFTCAP)
    target = tl.load(targets_ptr + pid_n)
    target_gradient = -_expm1_nonpositive(tl.load(logps_ptr + pid_n))
    gradient = tl.where(offs_v == target, target_gradient, -tl.exp(bounded * outer - tl.load(lse_ptr + pid_n)))
    if HAS_SOFTCAP:
        gradient *= 1.0 - bounded * bounded
    if HAS_COEFFICIENT:
        coefficient = tl.load(coefficient_ptr + pid_n)
        gradient = tl.where(coefficient == 0, 0.0, gradient * coefficient)
    tl.store(out_ptr + pid_n * stride_on + offs_v, gradient.to(out_ptr.dtype.element_ty), mask=mask_v)


def _config(z: Tensor) -> tuple[int, int]:
    major = torch.cuda.get_device_capability(z.device)[0] if z.is_cuda else 9
    block, warps = _CONFIGS.get(major, _CONFIGS[max(_CONFIGS)])
    return min(block, triton.next_power_of_2(z.shape[1])), warps


def row_logps_fwd(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None,  # [V]
    *,
    transform: LogitTransform,
    statistics: bool,
) -> tuple[RowLogps, Tensor]:  # and the log-sum-exp [N]
    """Reads a tile and leaves it as it is."""
    num_rows, vocabulary = z.shape
    logps, lse = (torch.empty(num_rows, dtype=torch.float32, device=z.device) for _ in range(2))
    result = RowLogps(logps)
    if statistics:
        is_top1 = torch.empty(num_rows, dtype=torch.bool, device=z.device)
        result = RowLogps(logps, torch.empty_like(logps), torch.empty_like(logps), is_top1)
    if num_rows == 0:
        return result, lse
    block, warps = _config(z)
    with torch.cuda.device_of(z):  # Triton launches on the current device
        _row_logps_fwd_kernel[(num_rows,)](
            z,
            bias,
            targets,
            logps,
            lse,
            result.entropy,
            result.mean_logit,
            result.is_top1,
            vocabulary,
            z.stride(0),
            transform.inner,
            transform.outer,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=transform.softcap is not None,
            STATISTICS=statistics,
            BLOCK_V=block,
            num_warps=warps,
        )
    return result, lse


def row_logps_bwd(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None,  # [V]
    logps: Tensor,  # fp32 [N]
    lse: Tensor,  # fp32 [N]
    *,
    transform: LogitTransform,
    out: Tensor,  # [N, V], may be z
    coefficient: Tensor | None = None,  # fp32 [N], 1 when left out
) -> None:
    """Writes `coefficient_n · D_n` to `out`; a row whose coefficient is 0 becomes 0 whatever its logits."""
    num_rows, vocabulary = z.shape
    if num_rows == 0:
        return
    block, warps = _config(z)
    with torch.cuda.device_of(z):  # Triton launches on the current device
        _row_logps_bwd_kernel[(num_rows, triton.cdiv(vocabulary, block))](
            z,
            bias,
            targets,
            logps,
            lse,
            coefficient,
            out,
            vocabulary,
            z.stride(0),
            out.stride(0),
            transform.inner,
            transform.outer,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=transform.softcap is not None,
            HAS_COEFFICIENT=coefficient is not None,
            BLOCK_V=block,
            num_warps=warps,
        )


def row_logps_fwd_bwd(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None,  # [V]
    *,
    transform: LogitTransform,
    statistics: bool,
    out: Tensor,  # [N, V], may be z
) -> RowLogps:
    """Both of the above with coefficient 1."""
    result, lse = row_logps_fwd(z, targets, bias, transform=transform, statistics=statistics)
    row_logps_bwd(z, targets, bias, result.logps, lse, transform=transform, out=out)
    return result
