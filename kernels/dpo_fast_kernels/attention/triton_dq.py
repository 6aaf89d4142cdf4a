"""Shared-prefix attention on the packed row itself: gradient of the queries.

    δ_i = Σ_d out_id dout_id      ds_ij = p_ij (dout_i·v_j − δ_i) [1 − tanh²(scale·q_i·k_j / softcap)]
    dq_i = scale Σ_j ds_ij k_j    p_ij = exp(s_ij − L_i)

The last factor is there with a softcap only. A program makes δ and dq of a block of queries of one head, from the two
ranges of keys that the forward reads.

FLOP: 6·D·Hq · visible pairs.  T tokens, Hq query heads, D head size. Importing this module imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast_kernels.attention import triton_tiles as tiles
from dpo_fast_kernels.attention.triton_configs import DQ
from dpo_fast_kernels.attention.triton_launch import launch, score_scales


@triton.jit(do_not_specialize=["T", "window"])  # they change from batch to batch
def _prefix_attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    spans_ptr,
    dq_ptr,
    delta_ptr,
    T,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_dt,
    stride_dh,
    scale,
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
    offs_q = start_q + tl.arange(0, BLOCK_Q)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    mask_q = offs_q < T
    dout_ptrs = tiles.row_ptrs(dout_ptr, head, offs_q, offs_d, stride_dt, stride_dh)
    out_ptrs = tiles.row_ptrs(out_ptr, head, offs_q, offs_d, stride_ot, stride_oh)
    q_ptrs = tiles.row_ptrs(q_ptr, head, offs_q, offs_d, stride_qt, stride_qh)
    dout = tiles.load_rows(dout_ptrs, mask_q, offs_d, True, D)
    out = tiles.load_rows(out_ptrs, mask_q, offs_d, True, D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + offs_q, delta, mask=mask_q)
    lse = tl.load(lse_ptr + head * T + offs_q, mask=mask_q, other=0.0) * 1.4426950408889634
    q = tiles.load_rows(q_ptrs, mask_q, offs_d, True, D)
    key_head = head // GROUP
    k_ptrs = tiles.row_ptrs(k_ptr, key_head, offs_k, offs_d, stride_kt, stride_kh)
    v_ptrs = tiles.row_ptrs(v_ptr, key_head, offs_k, offs_d, stride_vt, stride_vh)
    spans = tiles.load_spans(spans_ptr, offs_q, T)

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    passes = tiles.key_ranges(spans_ptr, start_q, T, window, HAS_WINDOW, BLOCK_Q, BLOCK_K, BLOCK_D)
    for MASKED in tl.static_range(2):
        ranges = passes[MASKED]
        for block in range(0, ranges.prompt_blocks + ranges.own_blocks):
            start_k, keys, mask_k = tiles.key_block(ranges, block, offs_k, BLOCK_K)
            k = tiles.load_rows(k_ptrs + start_k * stride_kt, mask_k, offs_d, MASKED, D)
            v = tiles.load_rows(v_ptrs + start_k * stride_vt, mask_k, offs_d, MASKED, D)
            scores = tiles.capped_products(q, k, inner, HAS_SOFTCAP)
            weights = tl.exp2(scores * outer - lse[:, None])
            if MASKED:
                visible = tiles.is_visible(offs_q, keys, mask_k, spans, window, HAS_WINDOW)
                weights = tl.where(visible, weights, 0.0)
            dscores = weights * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
            if HAS_SOFTCAP:
                dscores *= 1.0 - scores * scores
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")

    tiles.store_rows(dq_ptr, dq * scale, head, offs_q, mask_q, offs_d, D)


def prefix_attention_dq(
    dout: Tensor,  # [T, Hq, D]
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, D]
    out: Tensor,  # [T, Hq, D]
    lse: Tensor,  # fp32 [Hq, T]
    spans: Tensor,  # int32 [5, T]
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # [T, Hq, D], δ fp32 [Hq, T]
    """The last dimension of dout, q, k, v and out must be contiguous, the first of them not empty."""
    dq, delta = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    launch(
        _prefix_attention_dq_kernel,
        lambda config: (triton.cdiv(q.shape[0], config["BLOCK_Q"]), q.shape[1]),
        DQ,
        pointers=(q, k, v, out, dout, lse, spans, dq, delta),
        strided=(q, k, v, out, dout),
        scales=(scale, *score_scales(scale, softcap)),
        window=window,
        softcap=softcap,
    )
    return dq, delta
