"""Shared-prefix attention on a CPU, from PyTorch's flash kernel: no key is copied, no masked score is computed.

A group `[x y1 y2 … yK]` is three kinds of calls on slices of the packed row:

    [x y1] on itself, causal        each of y2 … yK on itself, causal        [y2 … yK] on x, all visible

The last two see disjoint keys of the same queries and are merged by their log-sum-exps,

    L = log(e^La + e^Lb)        out = σ(La − Lb)·out_a + σ(Lb − La)·out_b.

The flash backward rebuilds the weights as e^(score − L), so that on each part, given the merged out and L, it yields
the part's exact gradients. Grouped heads are a batch dimension whose keys are expanded, not repeated.

FLOP, forward: 4·D·Hq · Σ over groups (p + n1)²/2 + p·(n2 + … + nK) + Σ_{k≥2} nk²/2
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpo_fast_kernels.attention.layout import PrefixLayout

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """[T, Hq or Hkv, D] → [Hkv, Hq / Hkv or 1, T, D], a view."""
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _calls(layout: PrefixLayout) -> Iterator[tuple[slice, slice, bool]]:
    """Yields (queries, keys, causal) of every call on the packed row.

    The causal calls cover every token exactly once; the call on a group's prompt comes after them and adds to it.
    """
    prompt, late = None, None  # of the group at hand: its prompt, and its completions after the first
    for start, length, prefix, shared in layout.segments.tolist():
        rows = slice(start, start + length)
        if late is not None and (not shared or prefix != prompt.start):
            yield late, prompt, False
            late = None
        if length:
            yield rows, rows, True
        if length and shared:
            prompt, late = slice(prefix, prefix + shared), slice(late.start if late else start, rows.stop)
    if late is not None:
        yield late, prompt, False


def forward(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, D]
    layout: PrefixLayout,
    scale: float,
) -> tuple[Tensor, Tensor]:  # [T, Hq, D], log-sum-exp [Hq, T]
    kv_heads, repeats = k.shape[1], q.shape[1] // k.shape[1]
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    queries, keys, values, outs = (_by_head(x, kv_heads) for x in (q, k, v, out))
    keys, values = (x.expand(-1, repeats, -1, -1) for x in (keys, values))
    lses = lse.unflatten(0, (kv_heads, -1))
    for rows, columns, causal in _calls(layout):
        part, part_lse = _flash(
            queries[:, :, rows], keys[:, :, columns], values[:, :, columns], is_causal=causal, scale=scale
        )
        if not causal:
            share = torch.sigmoid(part_lse - lses[:, :, rows])[..., None]
            part = torch.lerp(outs[:, :, rows].to(share.dtype), part.to(share.dtype), share)
            part_lse = torch.logaddexp(part_lse, lses[:, :, rows])
        outs[:, :, rows] = part
        lses[:, :, rows] = part_lse
    return out, lse


def backward(
    dout: Tensor,  # [T, Hq, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,  # [Hq, T]
    layout: PrefixLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads, repeats = k.shape[1], q.shape[1] // k.shape[1]
    douts, queries, keys, values, outs = (_by_head(x, kv_heads) for x in (dout, q, k, v, out))
    keys, values = (x.expand(-1, repeats, -1, -1) for x in (keys, values))
    lses = lse.unflatten(0, (kv_heads, -1))
    gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
    sums = [_by_head(x, kv_heads) for x in gradients]
    for rows, columns, causal in _calls(layout):
        dq, dk, dv = _flash_backward(
            douts[:, :, rows],
            queries[:, :, rows],
            keys[:, :, columns],
            values[:, :, columns],
            outs[:, :, rows],
            lses[:, :, rows],
            0.0,
            causal,
            scale=scale,
        )
        if repeats > 1:
            dk, dv = dk.sum(dim=1, keepdim=True), dv.sum(dim=1, keepdim=True)
        for total, places, part in zip(sums, (rows, columns, columns), (dq, dk, dv), strict=True):
            if causal:
                total[:, :, places] = part
            else:
                total[:, :, places] += part
    return gradients
