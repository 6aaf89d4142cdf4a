"""Attention over a shared prompt: completions see their prompt and their own past, prompts see their own past.

    out_i = softmax_j(softcap(scale · q_i·k_j)) v_j,   j over the visible keys of query i

One variable-length call computes it exactly (see `layout`): queries `[x y1 | y2 | … | yK]` against keys gathered to
`[x y1 | x y2 | … | x yK]`, causal, with the mask aligned bottom-right. Backends, in the order of preference:

    flash-attn   the package, when it is installed: windows and softcap
    varlen       torch.nn.attention.varlen, built into PyTorch for CUDA: windows, no softcap
    flash-cpu    PyTorch's flash kernel on slices of the row: CPU, no window, no softcap
    sdpa         one scaled_dot_product_attention a segment: every device and dtype, windows and softcap

FLOP, forward: 4·D·Hq · Σ_k (visible keys of segment k); the prompt's own queries count once a group.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast_kernels.gather_rows import gather_rows
from dpo_fast_kernels.layout import PrefixLayout
from dpo_fast_kernels.prefix_attention_cpu import flash_cpu

BACKENDS = ("flash-attn", "varlen", "flash-cpu", "sdpa")
_FLASH_DTYPES = (torch.bfloat16, torch.float16)


def attention_backend(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 64,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[str, str]:
    """Names the backend that `auto` takes for such inputs, and why; `window` only where sequences outgrow it."""
    if device.type == "cpu" and not softcap and not window:
        return "flash-cpu", "PyTorch's flash kernel, on slices of the packed row"
    if device.type != "cuda":
        limit = " with a window or a softcap" if device.type == "cpu" else ""
        return "sdpa", f"{device.type} has no flash kernel{limit}"
    if dtype not in _FLASH_DTYPES:
        return "sdpa", f"variable-length kernels compute in bf16 and fp16, not {dtype}"
    if head_dim > 256:
        return "sdpa", f"variable-length kernels stop at head size 256, this is {head_dim}"
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash-attn", "flash-attn is installed"
    if softcap:
        return "sdpa", "PyTorch's variable-length attention has no softcap; install flash-attn for it"
    return "varlen", "built into PyTorch"


def prefix_attention(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, Dv]
    layout: PrefixLayout,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:  # [T, Hq, Dv]
    """Shared-prefix attention over a packed row of T tokens; differentiable, deterministic.

    Args:
        q, k, v: one dtype on one device (autocast's under autocast); Hq a multiple of Hkv (grouped heads). The CPU's
            backends and sdpa take fp32, bf16, fp16 and fp64, the others bf16 and fp16.
        layout: where prompts and completions lie; its tensors on the device of q.
        scale: of the scores; None is 1/√D.
        window: a query sees at most this many keys, itself included; None is all.
        softcap: scores become softcap·tanh(score / softcap).
        backend: `auto` or one of `BACKENDS`; a named backend never falls back.

    Raises:
        ValueError: unknown backend, or shapes that do not fit.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if window is not None and window >= layout.max_seqlen_k:
        window = None
    if backend == "auto":
        backend, _ = attention_backend(q.device, q.dtype, max(q.shape[-1], v.shape[-1]), softcap, window)
        if backend == "flash-cpu" and q.shape[-1] != v.shape[-1]:
            backend = "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of auto, {', '.join(BACKENDS)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k has {k.shape[1]}: q's must be a multiple of k's")
    tokens = sum(map(sum, layout.groups))
    if not q.shape[0] == k.shape[0] == v.shape[0] == tokens:
        raise ValueError(f"q, k, v have {q.shape[0]}, {k.shape[0]}, {v.shape[0]} rows; layout has {tokens} tokens")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    attend = {"flash-attn": _flash_attn, "varlen": _varlen, "flash-cpu": _flash_cpu, "sdpa": _sdpa}[backend]
    return attend(q, k, v, layout, scale, window, softcap)


def _flash_attn(q, k, v, layout, scale, window, softcap):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        gather_rows(k, layout.keys),
        gather_rows(v, layout.keys),
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1 if window else -1, 0 if window else -1),
        softcap=softcap or 0.0,
        deterministic=True,
    )


def _varlen(q, k, v, layout, scale, window, softcap):
    if softcap:
        raise ValueError("softcap: the varlen backend has none; use backend='flash-attn' or 'sdpa'")
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_parameters()
    if "window_size" in known:
        options = {"scale": scale, "window_size": (window - 1 if window else -1, 0)}
    else:
        if window:
            raise ValueError("window: this PyTorch's varlen attention has none; use backend='sdpa' or PyTorch 2.11")
        options = {"is_causal": True}
        q = q * (scale * q.shape[-1] ** 0.5)
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    return varlen_attn(
        q,
        gather_rows(k, layout.keys),
        gather_rows(v, layout.keys),
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        **options,
    )


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _flash_cpu(q, k, v, layout, scale, window, softcap):
    if softcap or window or q.device.type != "cpu":
        raise ValueError("backend='flash-cpu' has no window and no softcap and runs on the CPU; use backend='sdpa'")
    return flash_cpu(q, k, v, layout, scale)


def _sdpa(q, k, v, layout, scale, window, softcap):
    repeats = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, D]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    # A prompt and its first completion are neighbours: `[x y1]` is one piece of queries and of keys alike.
    pieces = [piece for prompt, first, *rest in layout.groups for piece in (prompt + first, *rest)]
    q_pieces, k_pieces, v_pieces = (iter(x.split(pieces, dim=2)) for x in (q, k, v))
    masks: dict[tuple[int, int], Tensor] = layout.masks(q.dtype, q.device, window)
    out = []
    for prompt, *completions in layout.groups:
        for index in range(len(completions)):
            q_piece, k_piece, v_piece = next(q_pieces), next(k_pieces), next(v_pieces)
            if index == 0:
                k_prompt, v_prompt = k_piece[:, :, :prompt], v_piece[:, :, :prompt]
            elif prompt:
                k_piece, v_piece = torch.cat([k_prompt, k_piece], dim=2), torch.cat([v_prompt, v_piece], dim=2)
            out.append(_attend(q_piece, k_piece, v_piece, masks, scale, window, softcap))
    return torch.cat(out, dim=2)[0].transpose(0, 1)


def _attend(q, k, v, masks, scale, window, softcap):
    shape = (q.shape[2], k.shape[2])
    plain = shape[0] == shape[1] and (window is None or window >= shape[1])
    if plain and not softcap:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if shape not in masks:
        masks[shape] = _bottom_right_mask(*shape, window, q.dtype, q.device)
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=masks[shape], scale=scale)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) + masks[shape]
    return scores.softmax(dim=-1, dtype=torch.promote_types(torch.float32, q.dtype)).to(v.dtype) @ v


def _bottom_right_mask(queries, keys, window, dtype, device) -> Tensor:
    """Additive mask [queries, keys], the last query sees the last key; as fast as `is_causal`, unlike a bool mask."""
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    visible = key <= position
    if window is not None:
        visible &= key > position - window
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill(~visible, float("-inf"))
