"""Shared-prefix attention on the packed row itself: gradient of keys and values, and the whole backward.

    dv_j = Σ_i p_ij dout_i      dk_j = scale Σ_i ds_ij q_i      p, ds and δ as in `triton_dq`

A program makes dk and dv of a block of keys of one key head. It goes over the query heads of that head and, for each,
over the queries from the block's first key on, up to the last that sees any of its keys. Every sum is made by one
program in one order: no atomics, two runs are bitwise equal, and the K copies of a prompt's gradient are never written.

**Mask.** Query i sees key j if and only if j ≤ i < last_query_j: the prompt is seen by all that follows in its group, a
completion's key by what follows in the completion. With a window w their positions must also differ by less than w.

**Queries without mask.** If all keys of a block share one last_query L, every query i with block end ≤ i < L sees all
of them. Those blocks of queries run without a mask, when there is no window.

**Windows.** Keys of one run are seen by two stretches of queries: the run itself, as far as the window reaches from the
last key, and from the run's end on the later completions, unless the first token after their prompt stands too far off.

FLOP: 8·D·Hq · visible pairs.  T tokens, Hq query heads, D head size. Importing this module imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast_kernels.attention import triton_tiles as tiles
from dpo_fast_kernels.attention.triton_configs import dkv_table
from dpo_fast_kernels.attention.triton_dq import prefix_attention_dq
from dpo_fast_kernels.attention.triton_launch import launch, score_scales, unit_columns


@triton.jit(do_not_specialize=["T", "window"])  # they change from batch to batch
def _prefix_attention_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    spans_ptr,
    dk_ptr,
    dv_ptr,
    T,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
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
    start_k = tl.program_id(0) * BLOCK_K
    key_head = tl.program_id(1).to(tl.int64)
    offs_k = start_k + tl.arange(0, BLOCK_K)
    offs_q = tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, BLOCK_D)
    mask_k = offs_k < T
    k = tiles.load_rows(tiles.row_ptrs(k_ptr, key_head, offs_k, offs_d, stride_kt, stride_kh), mask_k, offs_d, True, D)
    v = tiles.load_rows(tiles.row_ptrs(v_ptr, key_head, offs_k, offs_d, stride_vt, stride_vh), mask_k, offs_d, True, D)
    q_rows = offs_q.to(tl.int64)[:, None] * stride_qt + offs_d[None, :]
    dout_rows = offs_q.to(tl.int64)[:, None] * stride_dt + offs_d[None, :]
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)

    last = tl.load(spans_ptr + 4 * T + offs_k, mask=mask_k, other=0)
    end_q = tl.max(last, 0)
    first_end, second_start = end_q, end_q  # queries [start_k, first_end) and [second_start, end_q)
    free = 0
    if HAS_WINDOW:
        last_k = tl.minimum(start_k + BLOCK_K, T) - 1
        run_end = tl.load(spans_ptr + 3 * T + start_k)
        one_run = tl.load(spans_ptr + 3 * T + last_k) == run_end  # run_end never decreases along the row
        position_k = tiles.load_positions(spans_ptr, offs_k, T)
        # A window may part them: the keys' own run as far as it reaches, later completions unless all begin behind it.
        next_position = tl.load(spans_ptr + T + run_end, mask=run_end < T, other=0) - tl.load(spans_ptr + start_k)
        reached = next_position - (last_k - tl.load(spans_ptr + 2 * T + start_k)) < window
        first_end = tl.where(one_run, tl.minimum(run_end, last_k + window), end_q)
        second_start = tl.where(one_run & (run_end < end_q) & reached, run_end, end_q)
    first_blocks = tl.cdiv(first_end - start_k, BLOCK_Q)
    second_blocks = tl.cdiv(end_q - second_start, BLOCK_Q)
    head_blocks = tl.minimum(tl.cdiv(BLOCK_K, BLOCK_Q), first_blocks)  # those that may hold a query before a key
    if not HAS_WINDOW and BLOCK_D <= 128:  # beyond, a second loop takes more registers than there are
        one_end = tl.min(tl.where(mask_k, last, end_q), 0) == end_q
        free = tl.where(one_end, tl.maximum((end_q - start_k) // BLOCK_Q - head_blocks, 0), 0)

    for MASKED in tl.static_range(2):
        num_blocks = first_blocks - free + second_blocks if MASKED else free
        for step in range(0, GROUP * num_blocks):
            head = key_head * GROUP + step // num_blocks
            block = step % num_blocks
            if MASKED:
                block += tl.where(block < head_blocks, 0, free)
                first = block < first_blocks
                start_q = tl.where(first, start_k, second_start - first_blocks * BLOCK_Q) + block * BLOCK_Q
                mask_q = start_q + offs_q < tl.where(first, first_end, end_q)  # the others load as 0 and add 0
            else:
                start_q = start_k + (block + head_blocks) * BLOCK_Q
                mask_q = start_q + offs_q < T
            queries = start_q + offs_q
            q_ptrs = q_ptr + head * stride_qh + start_q.to(tl.int64) * stride_qt + q_rows
            dout_ptrs = dout_ptr + head * stride_dh + start_q.to(tl.int64) * stride_dt + dout_rows
            q = tiles.load_rows(q_ptrs, mask_q, offs_d, MASKED, D)
            dout = tiles.load_rows(dout_ptrs, mask_q, offs_d, MASKED, D)
            lse = tl.load(lse_ptr + head * T + queries, mask=mask_q, other=0.0) * 1.4426950408889634
            delta = tl.load(delta_ptr + head * T + queries, mask=mask_q, other=0.0)
            # Sums that start at −lse and −δ need no registers for these beside those of the sums. In fp32 a sum that
            # starts far from 0 would lose digits.
            if HAS_SOFTCAP or k.dtype == tl.float32:
                scores = tiles.capped_products(k, q, inner, HAS_SOFTCAP)
                weights = tl.exp2(scores * outer - lse[None, :])
            else:
                minus_lse = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32) - (lse / outer)[None, :]
                weights = tl.exp2(tl.dot(k, tl.trans(q), minus_lse) * outer)
            if MASKED:
                visible = (offs_k[:, None] <= queries[None, :]) & (queries[None, :] < last[:, None])
                if HAS_WINDOW:
                    position_q = tiles.load_positions(spans_ptr, queries, T)
                    visible &= position_q[None, :] - position_k[:, None] < window
                weights = tl.where(visible, weights, 0.0)
            dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
            if HAS_SOFTCAP:
                weights *= 1.0 - scores * scores
            if k.dtype == tl.float32:
                dscores = weights * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
            else:
                minus_delta = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32) - delta[None, :]
                dscores = weights * tl.dot(v, tl.trans(dout), minus_delta)
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")

    tiles.store_rows(dk_ptr, dk * scale, key_head, offs_k, mask_k, offs_d, D)
    tiles.store_rows(dv_ptr, dv, key_head, offs_k, mask_k, offs_d, D)


def prefix_attention_bwd(
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
) -> tuple[Tensor, Tensor, Tensor]:
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if q.numel() == 0:
        return torch.empty_like(q), dk, dv
    dout, q, k, v, out = unit_columns(dout, q, k, v, out)
    dq, delta = prefix_attention_dq(dout, q, k, v, out, lse, spans, scale=scale, window=window, softcap=softcap)
    launch(
        _prefix_attention_dkv_kernel,
        lambda config: (triton.cdiv(k.shape[0], config["BLOCK_K"]), k.shape[1]),
        dkv_table(window, softcap),
        pointers=(q, k, v, dout, lse, delta, spans, dk, dv),
        strided=(q, k, v, dout),
        scales=(scale, *score_scales(scale, softcap)),
        window=window,
        softcap=softcap,
    )
    return dq, dk, dv
