"""Gradient of gathered rows on a GPU: one sum a row, in a fixed order, in one pass.

    dx[t] = Σ_u dy[uses[u]],   use_offsets[t] ≤ u < use_offsets[t + 1], ascending, in fp32 (float64 for float64)

A program makes a block of columns of one row of dx. Rows beyond the last that was read, and rows that were read by
nothing, become 0. T rows of dx, R rows in `use_offsets`, M rows of dy, D columns. Importing this module imports Triton.

Bytes moved: (T + M)·D·itemsize.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast_kernels._triton import Config, pick_config

# Major compute capability → columns of a program: 8 elements (16 bytes of bf16) a thread.
_CONFIGS: dict[int, Config] = {major: {"BLOCK_D": 1024, "num_warps": 4} for major in (8, 9, 10)}
_CANDIDATES = [{"BLOCK_D": block, "num_warps": warps} for block in (256, 512, 1024, 2048) for warps in (1, 2, 4, 8)]


@triton.jit(do_not_specialize=["R"])
def _segment_sum_kernel(
    dy_ptr,
    uses_ptr,
    use_offsets_ptr,
    dx_ptr,
    R,
    D,
    stride_ym,
    BLOCK_D: tl.constexpr,
):
    pid_t = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    start = tl.load(use_offsets_ptr + pid_t, mask=pid_t < R, other=0)
    end = tl.load(use_offsets_ptr + pid_t + 1, mask=pid_t < R, other=0)
    sum_dtype: tl.constexpr = tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK_D], sum_dtype)
    for use in range(start, end):
        row = tl.load(uses_ptr + use)
        total += tl.load(dy_ptr + row * stride_ym + offs_d, mask=mask_d, other=0.0).to(sum_dtype)
    tl.store(dx_ptr + pid_t * D + offs_d, total.to(dx_ptr.dtype.element_ty), mask=mask_d)


def segment_sum_triton(
    dy: Tensor,  # [M, ...]
    uses: Tensor,  # int64 [M]
    use_offsets: Tensor,  # int64 [R + 1]
    num_rows: int,  # T ≥ R
) -> Tensor:  # [T, ...]
    """Returns dx; see `gather_rows.segment_sum`."""
    dx = torch.empty((num_rows, *dy.shape[1:]), dtype=dy.dtype, device=dy.device)
    if dx.numel() == 0:
        return dx
    columns = math.prod(dy.shape[1:])
    dy = dy.reshape(dy.shape[0], columns)
    if columns > 1 and dy.stride(1) != 1:
        dy = dy.contiguous()

    def run(config: Config) -> None:
        block = min(config["BLOCK_D"], triton.next_power_of_2(columns))
        _segment_sum_kernel[(num_rows, triton.cdiv(columns, block))](
            dy,
            uses,
            use_offsets,
            dx,
            use_offsets.shape[0] - 1,
            columns,
            dy.stride(0),
            **{**config, "BLOCK_D": block},
        )

    kind = (dy.dtype, triton.next_power_of_2(columns))
    with torch.cuda.device_of(dy):  # Triton launches on the current device
        run(pick_config("segment_sum", kind, _CONFIGS, _CANDIDATES, dy.device, run))
    return dx
