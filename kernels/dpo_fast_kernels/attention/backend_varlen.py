"""Shared-prefix attention from one variable-length FlashAttention call on gathered keys and values.

Queries `[x y1 | y2 | … | yK]`, keys and values gathered to `[x y1 | x y2 | … | x yK]`, causal with the mask aligned
bottom-right, which is what FlashAttention does where query and key lengths differ. The copies live as long as a call:
the backward gathers again, and the gradient of a key is the sum over its copies, in a fixed order and in fp32.

FLOP, forward: 4·D·Hq · Σ_k (visible keys of segment k).
Bytes moved beside the call's own: 2·M·Hkv·D·itemsize for the copies, in each direction; M gathered keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast_kernels.attention.layout import PrefixLayout
from dpo_fast_kernels.autograd import deterministic_algorithms
from dpo_fast_kernels.gather.gather_rows import segment_sum


class _Call(NamedTuple):
    """What both kernels want to know beside the tensors."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    window: int | None
    softcap: float | None

    @classmethod
    def of(cls, layout: PrefixLayout, scale: float, window: int | None, softcap: float | None) -> _Call:
        queries, shared = layout.segments[:, 1], layout.segments[:, 3]
        # Bounds, not lengths: for a longest query segment of 1 the kernels would fold heads into rows.
        longest = max(2, int(queries.max())), max(2, int((queries + shared).max()))
        return cls(layout.cu_seqlens_q, layout.cu_seqlens_k, *longest, scale, window, softcap)

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        return self[:4]

    @property
    def window_sizes(self) -> tuple[int, int] | tuple[None, None]:
        """Keys to the left and to the right of a query that it sees beside its own; None without a window.

        PyTorch 2.11 hands −1 on to FlashAttention-4, whose backward takes it for a window.
        """
        return (self.window - 1, 0) if self.window else (None, None)


def forward(
    backend: str,
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, D]
    layout: PrefixLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # [T, Hq, D], log-sum-exp [Hq, T]
    keys, values = (x.index_select(0, layout.keys.index) for x in (k, v))
    attend = _forward_flash_attn if backend == "flash-attn" else _forward_aten
    return attend(q.contiguous(), keys, values, _Call.of(layout, scale, window, softcap))


def backward(
    backend: str,
    dout: Tensor,  # [T, Hq, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,  # [Hq, T]
    layout: PrefixLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = layout.keys
    keys, values = (x.index_select(0, plan.index) for x in (k, v))
    attend = _backward_flash_attn if backend == "flash-attn" else _backward_aten
    call = _Call.of(layout, scale, window, softcap)
    dq, dk, dv = attend(dout.contiguous(), q.contiguous(), keys, values, out, lse, call)
    return dq, *(segment_sum(x, plan.uses, plan.use_offsets, k.shape[0]) for x in (dk, dv))


def _forward_aten(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    left, right = call.window_sizes
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        *call.lengths,
        0.0,  # dropout
        call.window is None,  # causal; a window ends at the query itself
        return_debug_mask=False,
        scale=call.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return out, lse


def _backward_aten(dout, q, k, v, out, lse, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    left, right = call.window_sizes
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout that there is not
    with deterministic_algorithms():
        return torch.ops.aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            *call.lengths,
            0.0,  # dropout
            call.window is None,
            state,
            torch.empty(0, device=q.device),
            scale=call.scale,
            window_size_left=left,
            window_size_right=right,
        )


def _as_integers(window_sizes: tuple[int | None, int | None]) -> tuple[int, ...]:
    """As the package flash-attn wants them."""
    return tuple(-1 if size is None else size for size in window_sizes)


def _forward_flash_attn(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    with torch.no_grad():
        out, lse, _ = flash_attn_varlen_func(
            q,
            k,
            v,
            *call.lengths,
            softmax_scale=call.scale,
            causal=True,
            window_size=_as_integers(call.window_sizes),
            softcap=call.softcap or 0.0,
            return_attn_probs=True,
        )
    return out, lse


def _backward_flash_attn(dout, q, k, v, out, lse, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    gradients = tuple(torch.empty_like(x) for x in (q, k, v))
    _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        *gradients,
        *call.lengths,
        0.0,  # dropout
        call.scale,
        True,  # causal
        *_as_integers(call.window_sizes),
        call.softcap or 0.0,
        None,  # ALiBi slopes
        True,  # deterministic
        rng_state=torch.zeros(2, dtype=torch.int64, device=q.device),  # of the dropout that there is not
    )
    return gradients
