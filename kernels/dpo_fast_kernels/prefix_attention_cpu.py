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

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_fast_kernels.layout import PrefixLayout

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """[T, Hq or Hkv, D] → [Hkv, Hq / Hkv or 1, T, D], a view."""
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _calls(layout: PrefixLayout):
    """Yields (queries, keys, causal) of every call on the packed row, as slices.

    The causal calls cover every token exactly once; the call on a group's prompt comes after them and adds to it.
    """
    start = 0
    for prompt, first, *rest in layout.groups:
        end = start + prompt + first
        yield slice(start, end), slice(start, end), True
        shared = end
        for length in rest:
            yield slice(end, end + length), slice(end, end + length), True
            end += length
        if rest and prompt:
            yield slice(shared, end), slice(start, start + prompt), False
        start = end


class _FlashCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float):
        kv_heads, repeats = k.shape[1], q.shape[1] // k.shape[1]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        queries, keys, values, outs = (_by_head(x, kv_heads) for x in (q, k, v, out))
        keys, values = (x.expand(-1, repeats, -1, -1) for x in (keys, values))
        lse = q.new_empty((*outs.shape[:2], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, columns, causal in _calls(layout):
            part, part_lse = _flash(
                queries[:, :, rows], keys[:, :, columns], values[:, :, columns], is_causal=causal, scale=scale
            )
            if not causal:
                share = torch.sigmoid(part_lse - lse[:, :, rows])[..., None]
                part = torch.lerp(outs[:, :, rows].to(share.dtype), part.to(share.dtype), share)
                part_lse = torch.logaddexp(part_lse, lse[:, :, rows])
            outs[:, :, rows] = part
            lse[:, :, rows] = part_lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        kv_heads, repeats = k.shape[1], q.shape[1] // k.shape[1]
        douts, queries, keys, values, outs = (_by_head(x, kv_heads) for x in (dout, q, k, v, out))
        keys, values = (x.expand(-1, repeats, -1, -1) for x in (keys, values))
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        sums = [_by_head(x, kv_heads) for x in gradients]
        for rows, columns, causal in _calls(ctx.layout):
            dq, dk, dv = _flash_backward(
                douts[:, :, rows],
                queries[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                outs[:, :, rows],
                lse[:, :, rows],
                0.0,
                causal,
                scale=ctx.scale,
            )
            if repeats > 1:
                dk, dv = dk.sum(dim=1, keepdim=True), dv.sum(dim=1, keepdim=True)
            for total, places, part in zip(sums, (rows, columns, columns), (dq, dk, dv), strict=True):
                if causal:
                    total[:, :, places] = part
                else:
                    total[:, :, places] += part
        return *gradients, None, None


def flash_cpu(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, D]
    layout: PrefixLayout,
    scale: float,
) -> Tensor:  # [T, Hq, D]
    """Shared-prefix attention over a packed row on the CPU; differentiable once, deterministic."""
    return _FlashCPU.apply(q, k, v, layout, scale)
