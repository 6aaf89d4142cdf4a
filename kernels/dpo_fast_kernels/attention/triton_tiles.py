"""What the kernels of shared-prefix attention share on the device: which keys a block reads, loads, scores, stores.

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

T tokens, D head size. Importing this module imports Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from dpo_fast_kernels._triton import tanh


class KeyRanges(NamedTuple):
    """Keys [prompt_low, prompt_high) and [own_low, own_high), and how many blocks of BLOCK_K to read of each."""

    prompt_low: tl.tensor
    prompt_high: tl.tensor
    prompt_blocks: tl.tensor
    own_low: tl.tensor
    own_high: tl.tensor
    own_blocks: tl.tensor


@triton.jit
def load_spans(spans_ptr, queries, T):
    """prompt_start, prompt_end and own_start of queries; those after the last token see nothing."""
    mask = queries < T
    prompt_start = tl.load(spans_ptr + queries, mask=mask, other=0)
    prompt_end = tl.load(spans_ptr + T + queries, mask=mask, other=0)
    own_start = tl.load(spans_ptr + 2 * T + queries, mask=mask, other=T)
    return prompt_start, prompt_end, own_start


@triton.jit
def load_positions(spans_ptr, tokens, T):
    """Positions of tokens in their sequences, the prompt's length for the first of every completion."""
    prompt_start, prompt_end, own_start = load_spans(spans_ptr, tokens, T)
    return tokens - own_start + prompt_end - prompt_start


@triton.jit
def is_visible(queries, keys, mask_k, spans, window, HAS_WINDOW: tl.constexpr):
    """Whether a query sees a key: [BLOCK_Q, BLOCK_K]."""
    i, j = queries[:, None], keys[None, :]
    prompt_start, prompt_end, own_start = spans[0][:, None], spans[1][:, None], spans[2][:, None]
    if HAS_WINDOW:
        prompt_start = tl.maximum(prompt_start, i - own_start + prompt_end - window + 1)
        own_start = tl.maximum(own_start, i - window + 1)
    return (((j >= own_start) & (j <= i)) | ((j >= prompt_start) & (j < prompt_end))) & mask_k[None, :]


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
    """Returns the keys that a block of queries reads without a mask, and those it reads with one."""
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
    free = KeyRanges(prompt_low, prompt_end, prompt_free, own_low, end_q, own_free)
    prompt_low += prompt_free * BLOCK_K
    own_low += own_free * BLOCK_K
    return free, KeyRanges(prompt_low, prompt_end, prompt_blocks - prompt_free, own_low, end_q, own_blocks - own_free)


@triton.jit
def key_block(ranges, block, offs_k, BLOCK_K: tl.constexpr):
    """Returns a block's first key, its keys, and which of these its range holds; blocks count through both ranges."""
    in_prompt = block < ranges.prompt_blocks
    start_k = tl.where(in_prompt, ranges.prompt_low, ranges.own_low - ranges.prompt_blocks * BLOCK_K) + block * BLOCK_K
    keys = start_k + offs_k
    mask_k = keys < tl.where(in_prompt, ranges.prompt_high, ranges.own_high)
    return start_k.to(tl.int64), keys, mask_k


@triton.jit
def row_ptrs(ptr, head, rows, offs_d, stride_t, stride_h):
    """Pointers to rows of a head, whose offsets may pass 2³¹: [BLOCK, BLOCK_D]."""
    return ptr + head * stride_h + rows.to(tl.int64)[:, None] * stride_t + offs_d[None, :]


@triton.jit
def load_rows(ptrs, mask_rows, offs_d, MASKED: tl.constexpr, D: tl.constexpr):
    """Rows of a head, 0 outside the mask and beyond D: [BLOCK, BLOCK_D]."""
    if offs_d.shape[0] == D:
        return tl.load(ptrs, mask=mask_rows[:, None], other=0.0) if MASKED else tl.load(ptrs)
    mask_d = (offs_d < D)[None, :]
    return tl.load(ptrs, mask=mask_rows[:, None] & mask_d if MASKED else mask_d, other=0.0)


@triton.jit
def store_rows(ptr, x, head, rows, mask_rows, offs_d, D: tl.constexpr):
    """Stores rows of a head of a contiguous [T, heads, D]; the grid's second axis goes over the heads."""
    offsets = (rows.to(tl.int64)[:, None] * tl.num_programs(1) + head) * D + offs_d[None, :]
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask_rows[:, None] & (offs_d < D)[None, :])


@triton.jit
def capped_products(x, y, inner, HAS_SOFTCAP: tl.constexpr):
    """x·yᵀ, with a softcap tanh(inner·x·yᵀ). Times `outer` they are scores in units of log 2."""
    products = tl.dot(x, tl.trans(y), input_precision="ieee")
    return tanh(products * inner) if HAS_SOFTCAP else products
