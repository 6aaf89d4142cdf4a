"""Shared-prefix attention on the packed row itself: gradient of the queries.

    δ_i = Σ_d out_id dout_id      ds_ij = p_ij (dout_i·v_j − δ_i) [1 − tanh²(scale·q_i·k_j / softcap)]
    dq_i = scale Σ_j ds_ij k_j    p_ij = exp(s_ij − L_i)

The last factor is there with a softcap only. A program makes δ and dq of a block of queries; it reads the same ranges
of keys as the forward, whose file says why they are enough.

FLOP: 6·D·Hq · visible pairs.  T tokens, Hq query heads, D head size. Importing this module imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast_kernels._triton import Config, pick_config, tanh
from dpo_fast_kernels.attention.triton_configs import CANDIDATES, DQ
from dpo_fast_kernels.attention.triton_fwd import (
    constants,
    is_visible,
    key_ranges,
    load_rows,
    load_spans,
    score_scales,
    strides,
    table_key,
)


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
    scale = tl.cast(scale, tl.float32)
    inner = tl.cast(inner, tl.float32)
    outer = tl.cast(outer, tl.float32)
    offs_q = start_q + tl.arange(0, BLOCK_Q)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    mask_q = offs_q < T
    rows = offs_q.to(tl.int64)[:, None]
    dout_ptrs = dout_ptr + head * stride_dh + rows * stride_dt + offs_d[None, :]
    out_ptrs = out_ptr + head * stride_oh + rows * stride_ot + offs_d[None, :]
    q_ptrs = q_ptr + head * stride_qh + rows * stride_qt + offs_d[None, :]
    dout = load_rows(dout_ptrs, mask_q, offs_d, True, D, BLOCK_D)
    out = load_rows(out_ptrs, mask_q, offs_d, True, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + offs_q, delta, mask=mask_q)
    lse = tl.load(lse_ptr + head * T + offs_q, mask=mask_q, other=0.0) * 1.4426950408889634
    q = load_rows(q_ptrs, mask_q, offs_d, True, D, BLOCK_D)
    key_head = head // GROUP
    k_ptrs = k_ptr + key_head * stride_kh + offs_k.to(tl.int64)[:, None] * stride_kt + offs_d[None, :]
    v_ptrs = v_ptr + key_head * stride_vh + offs_k.to(tl.int64)[:, None] * stride_vt + offs_d[None, :]
    prompt_start, prompt_end, own_start = load_spans(spans_ptr, offs_q, T)

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    prompt_low, prompt_high, own_low, own_high, prompt_blocks, own_blocks, prompt_free, own_free = key_ranges(
        spans_ptr, start_q, T, window, HAS_WINDOW, BLOCK_Q, BLOCK_K, BLOCK_D
    )
    for MASKED in tl.static_range(2):
        num_prompt = prompt_blocks - prompt_free if MASKED else prompt_free
        num_own = own_blocks - own_free if MASKED else own_free
        for block in range(0, num_prompt + num_own):
            in_prompt = block < num_prompt
            start_k = tl.where(in_prompt, prompt_low, own_low - num_prompt * BLOCK_K) + block * BLOCK_K
            keys = start_k + offs_k
            mask_k = keys < tl.where(in_prompt, prompt_high, own_high)
            k = load_rows(k_ptrs + start_k.to(tl.int64) * stride_kt, mask_k, offs_d, MASKED, D, BLOCK_D)
            v = load_rows(v_ptrs + start_k.to(tl.int64) * stride_vt, mask_k, offs_d, MASKED, D, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if HAS_SOFTCAP:
                scores = tanh(scores * inner)
            weights = tl.exp2(scores * outer - lse[:, None])
            if MASKED:
                visible = is_visible(
                    offs_q[:, None],
                    keys[None, :],
                    prompt_start[:, None],
                    prompt_end[:, None],
                    own_start[:, None],
                    window,
                    HAS_WINDOW,
                )
                weights = tl.where(visible & mask_k[None, :], weights, 0.0)
            dscores = weights * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
            if HAS_SOFTCAP:
                dscores *= 1.0 - scores * scores
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
        prompt_low += num_prompt * BLOCK_K
        own_low += num_own * BLOCK_K

    dq_ptrs = dq_ptr + (rows * tl.num_programs(1) + head) * D + offs_d[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask_q[:, None] & (offs_d < D)[None, :])


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

    def run(config: Config) -> None:
        _prefix_attention_dq_kernel[(triton.cdiv(q.shape[0], config["BLOCK_Q"]), q.shape[1])](
            q,
            k,
            v,
            out,
            dout,
            lse,
            spans,
            dq,
            delta,
            q.shape[0],
            *strides(q, k, v, out, dout),
            scale,
            *score_scales(scale, softcap),
            window or 0,
            **constants(q, k, window, softcap),
            **config,
        )

    kind = (q.dtype, *table_key(q), window is not None, softcap is not None)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        run(pick_config("prefix_attention_dq", kind, DQ[table_key(q)], CANDIDATES, q.device, run))
    return dq, delta
