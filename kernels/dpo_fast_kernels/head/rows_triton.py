"""One tile of logits → log-probs of the targets, their sums, and the gradient in place: Triton kernels.

    logp_n = x_n[t_n] − logΣ_v exp(x_n[v])        D_n = ∂logp_n/∂y_n = (onehot(t_n) − softmax(x_n)) ⊙ ∂x_n/∂y_n

z the product of the head and x = transform(z + bias) the logits, both fp32 in registers whatever the tile holds;
y = transform.slope·(z + bias), so that D holds no constant factor: rounded to bf16, it would bias every gradient alike.
N rows of the tile, V vocabulary, S completions. Importing this module imports Triton.

Bytes moved: forward N·V·itemsize(z); gradient N·V·(itemsize(z) + itemsize(out)). No atomics: runs are bitwise equal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast_kernels._triton import Config, expm1_nonpositive, pick_config, tanh
from dpo_fast_kernels.head.logits import LogitTransform

# Major compute capability → elements of V a program handles at a time, and its warps: 8 elements a thread, two 16-byte
# loads of fp32 in flight, and so few registers that five programs or more share a multiprocessor. Other architectures
# take the last row. Never measured.
_CONFIGS: dict[int, Config] = {major: {"BLOCK_V": 2048, "num_warps": 8} for major in (8, 9, 10)}
_CANDIDATES = [{"BLOCK_V": block, "num_warps": warps} for block in (1024, 2048, 4096, 8192) for warps in (4, 8, 16)]
_SUM_BLOCK = 1024  # token log-probs that a program adds up at a time
# A number a row, in parts of larger tensors that begin anywhere: a kernel for each alignment would be no faster.
_OF_ROWS = ["targets_ptr", "logps_ptr", "lse_ptr", "coefficient_ptr"]
_OF_ROWS += ["entropy_ptr", "mean_logit_ptr", "is_top1_ptr", "log_sum_sq_probs_ptr"]


@triton.jit
def _load_bounded(z_ptr, bias_ptr, offs_v, mask_v, inner, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Loads z + bias in fp32, and bounds it by the tanh of the softcap."""
    z = tl.load(z_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        z = tanh(z * inner)
    return z


@triton.jit
def _in_vocabulary(offs_v, V, IS_FULL: tl.constexpr):
    """Returns the mask of a block. That of a full one is constant: the compiler drops it and loads 16 bytes at once."""
    if IS_FULL:
        return tl.full(offs_v.shape, True, tl.int1)
    return offs_v < V


@triton.jit
def _sum_of_lane(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _add_block(
    z_ptr,
    bias_ptr,
    offs_v,  # [BLOCK_V / LANES / VECTOR, LANES, VECTOR]
    mask_v,
    inner,
    outer,
    peak,  # [LANES] each
    total,
    moment,
    square_total,
    logit_sum,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MEAN_LOGIT: tl.constexpr,
    HAS_LOG_SUM_SQ_PROBS: tl.constexpr,
):
    """Adds a block of logits to the sums of every lane. A lane is one thread's: no thread waits for another."""
    x = _load_bounded(z_ptr, bias_ptr, offs_v, mask_v, inner, HAS_BIAS, HAS_SOFTCAP) * outer
    if HAS_MEAN_LOGIT:
        logit_sum += _sum_of_lane(tl.where(mask_v, x, 0.0))
    x = tl.where(mask_v, x, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(tl.max(x, 2), 0))
    shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # nothing but −inf so far: −inf − (−inf) is not 0
    decay = tl.exp(peak - shift)
    x -= shift[None, :, None]
    weights = tl.exp(x)
    if HAS_ENTROPY:
        moved = tl.where(total > 0, total * (peak - shift), 0.0)
        moment = decay * (moment + moved) + _sum_of_lane(tl.where(weights > 0, weights * x, 0.0))
    if HAS_LOG_SUM_SQ_PROBS:
        square_total = square_total * decay * decay + _sum_of_lane(weights * weights)
    return new_peak, total * decay + _sum_of_lane(weights), moment, square_total, logit_sum


@triton.jit(do_not_specialize_on_alignment=_OF_ROWS)
def _row_logps_fwd_kernel(
    z_ptr,
    bias_ptr,
    targets_ptr,
    logps_ptr,
    lse_ptr,
    entropy_ptr,
    mean_logit_ptr,
    is_top1_ptr,
    log_sum_sq_probs_ptr,
    V,
    stride_zn,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MEAN_LOGIT: tl.constexpr,
    HAS_IS_TOP1: tl.constexpr,
    HAS_LOG_SUM_SQ_PROBS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    z_ptr += pid_n * stride_zn
    inner = tl.cast(inner, tl.float32)
    outer = tl.cast(outer, tl.float32)

    peaks = tl.full([LANES], -float("inf"), tl.float32)
    totals = tl.zeros([LANES], tl.float32)  # Σ exp(x − peak)
    moments = tl.zeros([LANES], tl.float32)  # Σ exp(x − peak)·(x − peak)
    square_totals = tl.zeros([LANES], tl.float32)  # Σ exp(x − peak)²
    logit_sums = tl.zeros([LANES], tl.float32)
    offs_l = tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    offs = tl.arange(0, BLOCK_V // (LANES * VECTOR))[:, None, None] * (LANES * VECTOR) + offs_l
    full = V // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        mask_v = _in_vocabulary(start + offs, V, IS_FULL=True)
        peaks, totals, moments, square_totals, logit_sums = _add_block(
            z_ptr, bias_ptr, start + offs, mask_v, inner, outer, peaks, totals, moments, square_totals, logit_sums,
            HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY, HAS_MEAN_LOGIT, HAS_LOG_SUM_SQ_PROBS,
        )  # fmt: skip
    if full < V:
        mask_v = _in_vocabulary(full + offs, V, IS_FULL=False)
        peaks, totals, moments, square_totals, logit_sums = _add_block(
            z_ptr, bias_ptr, full + offs, mask_v, inner, outer, peaks, totals, moments, square_totals, logit_sums,
            HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY, HAS_MEAN_LOGIT, HAS_LOG_SUM_SQ_PROBS,
        )  # fmt: skip

    peak = tl.max(peaks, 0)
    distances = peaks - tl.where(peak == -float("inf"), 0.0, peak)
    decays = tl.exp(distances)
    total = tl.sum(totals * decays, 0)

    target = tl.load(targets_ptr + pid_n)
    valid = (target >= 0) & (target < V)
    target = tl.where(valid, target, 0)
    x_target = _load_bounded(z_ptr, bias_ptr, target, valid, inner, HAS_BIAS, HAS_SOFTCAP) * outer
    x_target = tl.where(valid, x_target, float("nan"))
    log_total = tl.log(total)
    tl.store(logps_ptr + pid_n, x_target - peak - log_total)
    tl.store(lse_ptr + pid_n, peak + log_total)
    if HAS_ENTROPY:
        moved = tl.where(totals > 0, totals * distances, 0.0)
        tl.store(entropy_ptr + pid_n, log_total - tl.sum(decays * (moments + moved), 0) / total)
    if HAS_MEAN_LOGIT:
        tl.store(mean_logit_ptr + pid_n, tl.sum(logit_sums, 0) / V)
    if HAS_IS_TOP1:
        tl.store(is_top1_ptr + pid_n, tl.where(x_target >= peak, 1.0, 0.0))
    if HAS_LOG_SUM_SQ_PROBS:
        square_total = tl.sum(square_totals * decays * decays, 0)
        tl.store(log_sum_sq_probs_ptr + pid_n, tl.log(square_total) - 2.0 * log_total)


@triton.jit
def _write_gradient(
    z_ptr,
    bias_ptr,
    out_ptr,
    offs_v,  # [BLOCK_V]
    mask_v,
    target,
    logp,
    lse,
    coefficient,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_COEFFICIENT: tl.constexpr,
):
    mask_read = mask_v
    if HAS_COEFFICIENT:
        mask_read = tl.where(coefficient == 0, False, mask_v)
    bounded = _load_bounded(z_ptr, bias_ptr, offs_v, mask_read, inner, HAS_BIAS, HAS_SOFTCAP)
    gradient = tl.where(offs_v == target, -expm1_nonpositive(logp), -tl.exp(bounded * outer - lse))
    if HAS_SOFTCAP:
        gradient *= 1.0 - bounded * bounded
    if HAS_COEFFICIENT:
        gradient = tl.where(coefficient == 0, 0.0, gradient * coefficient)
    tl.store(out_ptr + offs_v, gradient.to(out_ptr.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize_on_alignment=_OF_ROWS)
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
    start = tl.program_id(1) * BLOCK_V
    offs_v = start + tl.arange(0, BLOCK_V)
    z_ptr += pid_n * stride_zn
    out_ptr += pid_n * stride_on
    inner = tl.cast(inner, tl.float32)
    outer = tl.cast(outer, tl.float32)
    target = tl.load(targets_ptr + pid_n)
    logp = tl.load(logps_ptr + pid_n)
    lse = tl.load(lse_ptr + pid_n)
    coefficient = 1.0
    if HAS_COEFFICIENT:
        coefficient = tl.load(coefficient_ptr + pid_n)
    if start + BLOCK_V <= V:
        _write_gradient(
            z_ptr, bias_ptr, out_ptr, offs_v, _in_vocabulary(offs_v, V, IS_FULL=True), target, logp, lse, coefficient,
            inner, outer, HAS_BIAS, HAS_SOFTCAP, HAS_COEFFICIENT,
        )  # fmt: skip
    else:
        _write_gradient(
            z_ptr, bias_ptr, out_ptr, offs_v, _in_vocabulary(offs_v, V, IS_FULL=False), target, logp, lse, coefficient,
            inner, outer, HAS_BIAS, HAS_SOFTCAP, HAS_COEFFICIENT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "S"], do_not_specialize_on_alignment=_OF_ROWS)
def _sequence_sums_kernel(logps_ptr, cu_scores_ptr, sums_ptr, N, S, BLOCK_N: tl.constexpr):
    pid_s = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_scores_ptr + pid_s).to(tl.int64)
    end = tl.load(cu_scores_ptr + pid_s + 1).to(tl.int64)
    valid = (start >= 0) & (start < end) & (end <= N)
    valid = valid & ((pid_s > 0) | (start == 0)) & ((pid_s < S - 1) | (end == N))
    acc = tl.zeros((BLOCK_N,), tl.float64)
    if valid:
        for block in range(start, end, BLOCK_N):
            offs_n = block + tl.arange(0, BLOCK_N)
            acc += tl.load(logps_ptr + offs_n, mask=offs_n < end, other=0.0).to(tl.float64)
    total = tl.sum(acc, 0).to(tl.float32)
    tl.store(sums_ptr + pid_s, tl.where(valid, total, float("nan")))


def lanes(itemsize: int, aligned: bool, config: Config) -> dict[str, int]:
    """Returns how many logits a thread loads at once, and the number of lanes: one per thread in blocks that have them.

    Args:
        itemsize: bytes of a logit.
        aligned: whether rows begin at multiples of 16 bytes, 16 elements or a multiple apart.
        config: block size and warps.
    """
    vector = min(config["BLOCK_V"], 16 // itemsize if aligned else 1)
    return {"VECTOR": vector, "LANES": min(config["BLOCK_V"] // vector, 32 * config["num_warps"])}


def row_logps_fwd(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None,  # [V]
    *,
    transform: LogitTransform,
    statistics: Mapping[str, Tensor],  # fp32 [N] each, filled in
) -> tuple[Tensor, Tensor]:  # log-probs fp32 [N], log-sum-exp fp32 [N]
    """Reads a tile and leaves it as it is."""
    num_rows, vocabulary = z.shape
    targets, bias = targets.contiguous(), None if bias is None else bias.contiguous()
    logps, lse = (torch.empty(num_rows, dtype=torch.float32, device=z.device) for _ in range(2))
    if num_rows == 0:
        return logps, lse

    def launch(config: Config) -> None:
        _row_logps_fwd_kernel[(num_rows,)](
            z,
            bias,
            targets,
            logps,
            lse,
            statistics.get("entropy"),
            statistics.get("mean_logit"),
            statistics.get("is_top1"),
            statistics.get("log_sum_sq_probs"),
            vocabulary,
            z.stride(0),
            transform.inner,
            transform.outer,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=transform.softcap is not None,
            HAS_ENTROPY="entropy" in statistics,
            HAS_MEAN_LOGIT="mean_logit" in statistics,
            HAS_IS_TOP1="is_top1" in statistics,
            HAS_LOG_SUM_SQ_PROBS="log_sum_sq_probs" in statistics,
            **lanes(z.element_size(), z.stride(0) % 16 == z.data_ptr() % 16 == 0, config),
            **config,
        )

    with torch.cuda.device_of(z):  # Triton launches on the current device
        launch(_config("row_logps_fwd", z, launch))
    return logps, lse


def row_logps_bwd(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N], −1 where none of these V words is the target
    bias: Tensor | None,  # [V]
    logps: Tensor,  # fp32 [N]
    lse: Tensor,  # fp32 [N]
    *,
    transform: LogitTransform,
    out: Tensor,  # [N, V], may be z
    coefficient: Tensor | None = None,  # fp32 [N], 1 when left out
) -> None:
    """Writes `coefficient_n · D_n` to `out`; a row whose coefficient is 0 is not read and becomes 0."""
    num_rows, vocabulary = z.shape
    targets, bias = targets.contiguous(), None if bias is None else bias.contiguous()
    if num_rows == 0:
        return

    def launch(config: Config, out: Tensor) -> None:
        _row_logps_bwd_kernel[(num_rows, triton.cdiv(vocabulary, config["BLOCK_V"]))](
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
            **config,
        )

    with torch.cuda.device_of(z):
        launch(_config("row_logps_bwd", z, lambda config: launch(config, _alike(out))), out)


def row_logps_fwd_bwd(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None,  # [V]
    *,
    transform: LogitTransform,
    statistics: Mapping[str, Tensor],
    out: Tensor,  # [N, V], may be z
) -> Tensor:
    """Both of the above with coefficient 1; returns the log-probs."""
    logps, lse = row_logps_fwd(z, targets, bias, transform=transform, statistics=statistics)
    row_logps_bwd(z, targets, bias, logps, lse, transform=transform, out=out)
    return logps


def sequence_sums(
    logps: Tensor,  # fp32 [N]
    cu_scores: Tensor,  # int32 or int64 [S + 1]
) -> Tensor:  # fp32 [S]
    """Sums of consecutive log-probs, in float64 and a fixed order; NaN for an empty or ill-placed completion."""
    sums = torch.empty(cu_scores.shape[0] - 1, dtype=torch.float32, device=logps.device)
    logps, cu_scores = logps.contiguous(), cu_scores.contiguous()
    if sums.shape[0]:
        with torch.cuda.device_of(logps):
            _sequence_sums_kernel[(sums.shape[0],)](
                logps, cu_scores, sums, logps.shape[0], sums.shape[0], BLOCK_N=_SUM_BLOCK, num_warps=4
            )
    return sums


def _alike(rows: Tensor) -> Tensor:
    """Returns other memory whose rows lie as far apart."""
    return torch.empty_strided(rows.shape, rows.stride(), dtype=rows.dtype, device=rows.device)


def _config(kernel: str, z: Tensor, run) -> Config:
    config = pick_config(kernel, (z.dtype, z.shape[1]), _CONFIGS, _CANDIDATES, z.device, run)
    return {**config, "BLOCK_V": min(config["BLOCK_V"], triton.next_power_of_2(z.shape[1]))}
