"""Shared-prefix attention on the packed row itself: the forward.

    out_i = Σ_j p_ij v_j       p_ij = exp(s_ij − L_i)       L_i = log Σ_j exp(s_ij)       s_ij = softcap(scale·q_i·k_j)

A program makes a block of queries of one head, from two ranges of keys: `triton_tiles` says which, and why they are
enough. A prompt's keys are read where they lie, K times from the cache instead of once into K copies.

FLOP: 4·D·Hq · visible pairs.  T tokens, Hq query heads, D head size. Importing this module imports Triton.
Bytes moved: (2·Hq + 2·Hkv)·T·D·itemsize, if every key stays in the cache while its group is at work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast_kernels.attention import triton_tiles as tiles
from dpo_fast_kernels.attention.triton_configs import fwd_table
from dpo_fast_kernels.attention.triton_launch import launch, score_scales, unit_columns


@triton.jit(do_not_specialize=["T", "window"])  # they change from batch to batch
def _prefix_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    spans_ptr,
    out_ptr,
    lse_ptr,
    T,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    inner,
    outer,
    window,
    GROUP: tl.constexpr,  # query heads of one key head
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q  # late blocks see more keys: they go first
    head = tl.program_id(1).to(tl.int64)
    key_head = head // GROUP
    offs_q = start_q + tl.arange(0, BLOCK_Q)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    mask_q = offs_q < T
    k_ptrs = tiles.row_ptrs(k_ptr, key_head, offs_k, offs_d, stride_kt, stride_kh)
    v_ptrs = tiles.row_ptrs(v_ptr, key_head, offs_k, offs_d, stride_vt, stride_vh)
    q = tiles.load_rows(tiles.row_ptrs(q_ptr, head, offs_q, offs_d, stride_qt, stride_qh), mask_q, offs_d, True, D)
    spans = tiles.load_spans(spans_ptr, offs_q, T)

    total = tl.zeros([BLOCK_Q], tl.float32)  # Σ exp(s − peak)
    peak = tl.full([BLOCK_Q], -1e30, tl.float32)  # in units of log 2; finite, as a row may see nothing of a block
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    passes = tiles.key_ranges(spans_ptr, start_q, T, window, HAS_WINDOW, BLOCK_Q, BLOCK_K, BLOCK_D)
    for MASKED in tl.static_range(2):
        ranges = passes[MASKED]
        for block in range(0, ranges.prompt_blocks + ranges.own_blocks):
            start_k, keys, mask_k = tiles.key_block(ranges, block, offs_k, BLOCK_K)
            k = tiles.load_rows(k_ptrs + start_k * stride_kt, mask_k, offs_d, MASKED, D)
            scores = tiles.capped_products(q, k, inner, HAS_SOFTCAP)
            if MASKED:
                visible = tiles.is_visible(offs_q, keys, mask_k, spans, window, HAS_WINDOW)
                scores = tl.where(visible, scores, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1) * outer)
            weights = tl.exp2(scores * outer - new_peak[:, None])
            decay = tl.exp2(peak - new_peak)
            total = total * decay + tl.sum(weights, 1)
            peak = new_peak
            v = tiles.load_rows(v_ptrs + start_k * stride_vt, mask_k, offs_d, MASKED, D)
            acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")

    total = tl.where(mask_q, total, 1.0)
    lse = (peak + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + head * T + offs_q, lse, mask=mask_q)
    tiles.store_rows(out_ptr, acc / total[:, None], head, offs_q, mask_q, offs_d, D)


def prefix_attention_fwd(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, D]
    spans: Tensor,  # int32 [5, T]
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # [T, Hq, D], log-sum-exp fp32 [Hq, T]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    q, k, v = unit_columns(q, k, v)
    launch(
        _prefix_attention_fwd_kernel,
        lambda config: (triton.cdiv(q.shape[0], config["BLOCK_Q"]), q.shape[1]),
        fwd_table(softcap),
        pointers=(q, k, v, spans, out, lse),
        strided=(q, k, v),
        scales=score_scales(scale, softcap),
        window=window,
        softcap=softcap,
    )
    return out, lse
