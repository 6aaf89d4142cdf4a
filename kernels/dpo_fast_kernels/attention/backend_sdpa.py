"""Shared-prefix attention from scaled_dot_product_attention, one call a segment: every device, dtype and option.

The forward keeps no probabilities. The backward runs each segment's forward again under autograd, and adds the
gradients of a prompt's keys and values up over its completions, in their order and in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpo_fast_kernels.attention.flash_implementations import active_flash_implementation
from dpo_fast_kernels.attention.layout import PrefixLayout
from dpo_fast_kernels.autograd import deterministic_algorithms, recording

Masks = dict[tuple[int, int], Tensor]  # (queries, keys) → additive mask, shared by the segments of a call


def forward(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, Dv]
    layout: PrefixLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # [T, Hq, Dv]
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    masks: Masks = {}
    with _own_kernels(q.device):
        for rows, prompt in _segments(layout):
            out[rows] = _attend(q[rows], _keys(k, rows, prompt), _keys(v, rows, prompt), scale, window, softcap, masks)
    return out


def backward(
    dout: Tensor,  # [T, Hq, Dv]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq = q.new_empty(q.shape)
    dk, dv = (x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
    masks: Masks = {}
    for rows, prompt in _segments(layout):
        leaves = [q[rows], _keys(k, rows, prompt), _keys(v, rows, prompt)]
        with recording(), _own_kernels(q.device), _deterministic_sdpa(*leaves, softcap):
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            out = _attend(*leaves, scale, window, softcap, masks)
            dq[rows], *parts = torch.autograd.grad(out, leaves, dout[rows])
        for total, part in zip((dk, dv), parts, strict=True):
            if prompt is not None:
                shared = prompt.stop - prompt.start
                total[prompt] += part[:shared]
                part = part[shared:]
            total[rows] += part
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _segments(layout: PrefixLayout) -> Iterator[tuple[slice, slice | None]]:
    """Yields the queries of every segment that has any, and the prompt before its keys."""
    for start, length, prefix, shared in layout.segments.tolist():
        if length:
            yield slice(start, start + length), slice(prefix, prefix + shared) if shared else None


def _keys(x: Tensor, rows: slice, prompt: slice | None) -> Tensor:
    return x[rows] if prompt is None else torch.cat([x[prompt], x[rows]])


def _attend(
    q: Tensor,  # [queries, Hq, D]
    k: Tensor,  # [keys, Hkv, D]
    v: Tensor,  # [keys, Hkv, Dv]
    scale: float,
    window: int | None,
    softcap: float | None,
    masks: Masks,
) -> Tensor:  # [queries, Hq, Dv]
    repeats = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, rows, D]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    shape = (q.shape[2], k.shape[2])
    if not softcap and shape[0] == shape[1] and (window is None or window >= shape[1]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)
    if shape not in masks:
        masks[shape] = _bottom_right_mask(*shape, window, q.dtype, q.device)
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=masks[shape], scale=scale)[0].transpose(0, 1)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) + masks[shape]
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(v.dtype)
    return (weights @ v)[0].transpose(0, 1)


def _bottom_right_mask(
    queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:  # [queries, keys]
    """Additive mask, the last query sees the last key; as fast as `is_causal`, unlike a bool mask."""
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    visible = key <= position
    if window is not None:
        visible &= key > position - window
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill(~visible, float("-inf"))


def _own_kernels(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """No FlashAttention-3 or -4, which do not refuse what they cannot compute until they are called."""
    if active_flash_implementation(device) is None:
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


@contextlib.contextmanager
def _deterministic_sdpa(q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> Iterator[None]:
    """On CUDA the fused kernels' backward is deterministic only when PyTorch is told so.

    Plain matrix products always are, but told so cuBLAS demands an environment variable that must be set before the
    process starts. So inputs that no fused kernel takes are left to the plain formula, without telling it.
    """
    if not q.is_cuda or softcap:
        yield
        return
    fused = (
        q.dtype != torch.float64
        and (q.dtype != torch.bfloat16 or torch.cuda.get_device_capability(q.device) >= (8, 0))
        and q.shape[2] == v.shape[2]
        and q.shape[2] % 8 == 0
    )
    with deterministic_algorithms() if fused else sdpa_kernel(SDPBackend.MATH):
        yield
