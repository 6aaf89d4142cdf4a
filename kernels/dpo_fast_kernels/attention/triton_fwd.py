"""Shared-prefix attention on the packed row itself: the forward, and what its kernels share with the backward's.

    out_i = Σ_j p_ij v_j       p_ij = exp(s_ij − L_i)       L_i = log Σ_j exp(s_ij)       s_ij = softcap(scale·q_i·k_j)

Key j is visible to query i if own_start_i ≤ j ≤ i or prompt_start_i ≤ j < prompt_end_i (the spans of `layout`). With a
window w their positions must also differ by less than w: i − j < w for a query's own keys, and for its prompt's
i − own_start_i + prompt_end_i − j < w.

**Blocks.** A block of queries is a stretch of the packed row, wherever groups begin and end. It reads keys from two
ranges, which its first row f gives: [prompt_start_f, prompt_end_f) and [own_start_f, end of the block). That is enough
for its other rows i > f:

- i in the same run (own_start_i = own_start_f): the same ranges, up to i.
- i in a later completion of the same group: its own run starts after f, so it lies in the second range. Its prompt is
  the first range if f is in a later completion too; else own_start_f is the start of the group, and the prompt lies in
  the second range.
- i in a later group: all it sees starts after f.

The two ranges never overlap, and a key of the first counts for a row only within that range's end, so no key counts
twice. Where all rows share one own_start, every key of the first range and every key of the second before the block is
visible to every row: these blocks run without a mask. With a window all blocks run with one, from the first key that
the first row sees; a block of several runs then starts at its ranges' starts.

A prompt's keys are read where they lie, K times from the cache instead of once into K copies.

FLOP: 4·D·Hq · visible pairs.  T tokens, Hq query heads, D head size. Importing this module imports Triton.
Bytes moved: (2·Hq + 2·Hkv)·T·D·itemsize, if every key stays in the cache while its group is at work.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast_kernels._triton import Config, pick_config, tanh
from dpo_fast_kernels.attention.triton_configs import CANDIDATES, FWD

_LOG2_E = math.log2(math.e)


@triton.jit
def is_visible(i, j, prompt_start, prompt_end, own_start, window, HAS_WINDOW: tl.constexpr):
    """Whether query i sees key j; spans are the query's, all broadcast against each other."""
    if HAS_WINDOW:
        prompt_start = tl.maximum(prompt_start, i - own_start + prompt_end - window + 1)
        own_start = tl.maximum(own_start, i - window + 1)
    return ((j >= own_start) & (j <= i)) | ((j >= prompt_start) & (j < prompt_end))


@triton.jit
def load_spans(spans_ptr, offs, T):
    """prompt_start, prompt_end and own_start of queries; rows after the last token see nothing."""
    mask = offs < T
    prompt_start = tl.load(spans_ptr + offs, mask=mask, other=0)
    prompt_end = tl.load(spans_ptr + T + offs, mask=mask, other=0)
    own_start = tl.load(spans_ptr + 2 * T + offs, mask=mask, other=T)
    return prompt_start, prompt_end, own_start


@triton.jit
def load_positions(spans_ptr, offs, T):
    """Positions of tokens in their sequences, the prompt's length for the first of every completion."""
    prompt_start, prompt_end, own_start = load_spans(spans_ptr, offs, T)
    return offs - own_start + prompt_end - prompt_start


@triton.jit
def key_ranges(
    spans_ptr,
    start_q,
    T,
    window,
    HAS_WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The two ranges of keys of a block of queries, in blocks from their starts.

    Returns prompt_low, prompt_end, own_low, end of the block; blocks of each range; and of those, blocks without mask.
    """
    end_q = tl.minimum(start_q + BLOCK_Q, T)
    prompt_low = tl.load(spans_ptr + start_q)
    prompt_end = tl.load(spans_ptr + T + start_q)
    own_start = tl.load(spans_ptr + 2 * T + start_q)
    own_low = own_start
    one_run = tl.load(spans_ptr + 2 * T + end_q - 1) == own_start  # own_start never decreases along the row
    if HAS_WINDOW:
        reach = start_q - window + 1
        prompt_reach = tl.minimum(tl.maximum(prompt_low, reach - own_start + prompt_end), prompt_end)
        own_low = tl.where(one_run, tl.maximum(own_low, reach), own_low)
        prompt_low = tl.where(one_run, prompt_reach, prompt_low)
    prompt_blocks = tl.cdiv(prompt_end - prompt_low, BLOCK_K)
    own_blocks = tl.cdiv(end_q - own_low, BLOCK_K)
    prompt_free = 0
    own_free = 0
    if not HAS_WINDOW and BLOCK_D <= 128:  # beyond, a second loop takes more registers than there are
        prompt_free = tl.where(one_run, (prompt_end - prompt_low) // BLOCK_K, 0)
        own_free = tl.where(one_run, (start_q - own_low) // BLOCK_K, 0)
    return prompt_low, prompt_end, own_low, end_q, prompt_blocks, own_blocks, prompt_free, own_free


@triton.jit
def load_rows(ptrs, mask_rows, offs_d, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head, 0 outside the mask and beyond D: [BLOCK, BLOCK_D]."""
    if MASKED:
        if D == BLOCK_D:
            return tl.load(ptrs, mask=mask_rows[:, None], other=0.0)
        return tl.load(ptrs, mask=mask_rows[:, None] & (offs_d < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)


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
    stride_ot,
    stride_oh,
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
    inner = tl.cast(inner, tl.float32)
    outer = tl.cast(outer, tl.float32)
    offs_q = start_q + tl.arange(0, BLOCK_Q)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    mask_q = offs_q < T
    key_head = head // GROUP
    k_ptrs = k_ptr + key_head * stride_kh + offs_k.to(tl.int64)[:, None] * stride_kt + offs_d[None, :]
    v_ptrs = v_ptr + key_head * stride_vh + offs_k.to(tl.int64)[:, None] * stride_vt + offs_d[None, :]
    q_ptrs = q_ptr + head * stride_qh + offs_q.to(tl.int64)[:, None] * stride_qt + offs_d[None, :]
    q = load_rows(q_ptrs, mask_q, offs_d, True, D, BLOCK_D)
    prompt_start, prompt_end, own_start = load_spans(spans_ptr, offs_q, T)

    total = tl.zeros([BLOCK_Q], tl.float32)  # Σ exp(s − peak)
    peak = tl.full([BLOCK_Q], -1e30, tl.float32)  # in units of log 2; finite, as a row may see nothing of a block
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
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
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if HAS_SOFTCAP:
                scores = tanh(scores * inner)
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
                scores = tl.where(visible & mask_k[None, :], scores, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1) * outer)
            weights = tl.exp2(scores * outer - new_peak[:, None])
            decay = tl.exp2(peak - new_peak)
            total = total * decay + tl.sum(weights, 1)
            peak = new_peak
            v = load_rows(v_ptrs + start_k.to(tl.int64) * stride_vt, mask_k, offs_d, MASKED, D, BLOCK_D)
            acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        prompt_low += num_prompt * BLOCK_K
        own_low += num_own * BLOCK_K

    total = tl.where(mask_q, total, 1.0)
    lse = (peak + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + head * T + offs_q, lse, mask=mask_q)
    out = acc / total[:, None]
    out_ptrs = out_ptr + head * stride_oh + offs_q.to(tl.int64)[:, None] * stride_ot + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_q[:, None] & (offs_d < D)[None, :])


def score_scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """What a product is multiplied by before the softcap's tanh, and what after, in units of log 2."""
    return (scale / softcap, softcap * _LOG2_E) if softcap else (1.0, scale * _LOG2_E)


def unit_columns(x: Tensor) -> Tensor:
    """The kernels read heads whose elements are neighbours."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Of tokens and of heads, tensor after tensor."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def constants(q: Tensor, k: Tensor, window: int | None, softcap: float | None) -> dict[str, int]:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "D": q.shape[2],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[2])),
    }


def table_key(q: Tensor) -> tuple[int, int]:
    return max(64, triton.next_power_of_2(q.shape[2])), q.element_size()


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
    q, k, v = (unit_columns(x) for x in (q, k, v))

    def run(config: Config) -> None:
        _prefix_attention_fwd_kernel[(triton.cdiv(q.shape[0], config["BLOCK_Q"]), q.shape[1])](
            q,
            k,
            v,
            spans,
            out,
            lse,
            q.shape[0],
            *strides(q, k, v, out),
            *score_scales(scale, softcap),
            window or 0,
            **constants(q, k, window, softcap),
            **config,
        )

    kind = (q.dtype, *table_key(q), window is not None, softcap is not None)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        run(pick_config("prefix_attention_fwd", kind, FWD[table_key(q)], CANDIDATES, q.device, run))
    return out, lse
