"""Attention over a shared prompt: completions see their prompt and their own past, prompts see their own past.

    out_i = softmax_j(softcap(scale · q_i·k_j)) v_j,   j over the visible keys of query i (see `layout`)

One op with a backend for every machine. For the backward it keeps q, k, v, out and the log-sum-exps, never copies of
keys. In the order of preference:

    flash-attn   the package, when it is installed, on gathered keys: windows and softcap
    varlen       PyTorch's FlashAttention-2 for CUDA, on gathered keys: windows, no softcap. FlashAttention-3 or -4,
                 where they were activated in its place (`flash_implementations`), and then before flash-attn
    triton       kernels of our own that read a prompt's keys where they lie: windows, softcap, fp32 too
    flash-cpu    PyTorch's flash kernel on slices of the row: CPU, no window, no softcap
    sdpa         one scaled_dot_product_attention a segment: every device and dtype, windows and softcap

FLOP, forward: 4·D·Hq · Σ_k (visible keys of segment k); the prompt's own queries count once a group.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from dpo_fast_kernels.attention import backend_cpu, backend_sdpa, backend_varlen
from dpo_fast_kernels.attention.flash_implementations import VERSIONS, active_flash_implementation, flash_obstacle
from dpo_fast_kernels.attention.layout import PrefixLayout
from dpo_fast_kernels.gather.gather_rows import GatherPlan

BACKENDS = ("flash-attn", "varlen", "triton", "flash-cpu", "sdpa")
_REASONS = {
    "flash-attn": "flash-attn is installed",
    "varlen": "built into PyTorch",
    "flash-cpu": "PyTorch's flash kernel, on slices of the packed row",
}
_HALF = (torch.bfloat16, torch.float16)


@functools.cache
def _import_error(module: str) -> str | None:
    """Why a module cannot be imported; None when it can."""
    try:
        __import__(module)
    except ImportError as error:
        return str(error)
    return None


def _obstacle(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    softcap: float | None,
    window: int | None,
) -> str | None:
    """Why `backend` cannot compute this; None when it can."""
    if backend == "sdpa":
        return None
    if head_dim != value_dim:
        return f"fused kernels need keys and values of one head size, these have {head_dim} and {value_dim}"
    if backend == "flash-cpu":
        if device.type != "cpu":
            return f"PyTorch's CPU flash kernel does not run on {device.type}"
        return "PyTorch's CPU flash kernel has no window and no softcap" if window or softcap else None
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"its kernel needs CUDA, these tensors are on {device.type}"
    known = device.type == "cuda" and torch.cuda.is_available()
    capability = torch.cuda.get_device_capability(device) if known else None
    if capability is not None and capability < (8, 0):
        return "its kernel needs a GPU of compute capability 8.0 or more"
    if backend == "triton":
        if head_dim > 256:
            return f"its kernels stop at head size 256, this is {head_dim}"
        if dtype not in (*_HALF, torch.float32):
            return f"its kernels take bf16, fp16 and fp32, not {dtype}"
        missing = _import_error("triton")
        return f"triton cannot be imported ({missing})" if missing else None
    if dtype not in _HALF:
        return f"variable-length kernels compute in bf16 and fp16, not {dtype}"
    if head_dim > 256 or head_dim % 8:
        return f"variable-length kernels take head sizes up to 256 in steps of 8, this is {head_dim}"
    if backend == "flash-attn":
        missing = _import_error("flash_attn.flash_attn_interface")
        return f"flash-attn cannot be imported ({missing})" if missing else None
    if softcap:
        return "PyTorch's variable-length attention has no softcap; install flash-attn for it"
    active = active_flash_implementation(device)
    return active and flash_obstacle(active, capability, head_dim, window)


def attention_backend(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 64,
    softcap: float | None = None,
    window: int | None = None,
    value_dim: int | None = None,
) -> tuple[str, str]:
    """Names the backend that `auto` takes for such inputs, and why; `window` only where sequences outgrow it."""
    if device.type not in ("cuda", "cpu"):
        return "sdpa", f"{device.type} has no flash kernel"
    # "triton" goes before "varlen", perhaps for some head sizes only, when a measurement says that it is faster.
    backends = ("flash-attn", "varlen") if device.type == "cuda" else ("flash-cpu",)
    given = device, dtype, head_dim, value_dim or head_dim, softcap, window
    obstacles = {backend: _obstacle(backend, *given) for backend in backends}
    active = active_flash_implementation(device)
    for backend in reversed(backends) if active else backends:  # what was activated was asked for
        if obstacles[backend] is None:
            activated = f"{VERSIONS.get(active, active)}, activated in PyTorch"
            return backend, activated if active and backend == "varlen" else _REASONS[backend]
    return "sdpa", obstacles[backends[-1]]


def _resolve(
    q: Tensor, v: Tensor, layout: PrefixLayout, window: int | None, softcap: float | None, backend: str
) -> tuple[str, int | None]:
    """The backend that will run, and the window if there is a sequence that outgrows it. Forward and backward agree."""
    if window is not None and window >= int((layout.segments[:, 1] + layout.segments[:, 3]).max()):
        window = None
    if backend == "auto":
        return attention_backend(q.device, q.dtype, q.shape[2], softcap, window, v.shape[2])[0], window
    obstacle = _obstacle(backend, q.device, q.dtype, q.shape[2], v.shape[2], softcap, window)
    if obstacle is not None:
        raise ValueError(f"backend={backend!r} cannot run: {obstacle}; use backend='auto'")
    return backend, window


@torch.library.custom_op("dpo_fast::prefix_attention", mutates_args=())
def _prefix_attention(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, Dv]
    segments: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    spans: Tensor,
    key_index: Tensor,
    key_uses: Tensor,
    key_use_offsets: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:  # [T, Hq, Dv], log-sum-exps [Hq, T], which sdpa leaves at 0
    keys = GatherPlan(key_index, key_uses, key_use_offsets)
    layout = PrefixLayout(segments, cu_seqlens_q, cu_seqlens_k, spans, keys)
    backend, window = _resolve(q, v, layout, window, softcap, backend)
    if backend == "sdpa":
        out = backend_sdpa.forward(q, k, v, layout, scale, window, softcap)
        return out, q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    if backend == "flash-cpu":
        return backend_cpu.forward(q, k, v, layout, scale)
    if backend == "triton":
        from dpo_fast_kernels.attention.triton_fwd import prefix_attention_fwd

        return prefix_attention_fwd(q, k, v, spans, scale=scale, window=window, softcap=softcap)
    return backend_varlen.forward(backend, q, k, v, layout, scale, window, softcap)


@_prefix_attention.register_fake
def _(q, k, v, segments, cu_q, cu_k, spans, index, uses, use_offsets, scale, window, softcap, backend):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((*q.shape[:2], v.shape[2])), lse


@torch.library.custom_op("dpo_fast::prefix_attention_bwd", mutates_args=())
def _prefix_attention_bwd(
    dout: Tensor,  # [T, Hq, Dv]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,  # [Hq, T]
    segments: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    spans: Tensor,
    key_index: Tensor,
    key_uses: Tensor,
    key_use_offsets: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    keys = GatherPlan(key_index, key_uses, key_use_offsets)
    layout = PrefixLayout(segments, cu_seqlens_q, cu_seqlens_k, spans, keys)
    backend, window = _resolve(q, v, layout, window, softcap, backend)
    if backend == "sdpa":
        return backend_sdpa.backward(dout, q, k, v, layout, scale, window, softcap)
    if backend == "flash-cpu":
        return backend_cpu.backward(dout, q, k, v, out, lse, layout, scale)
    if backend == "triton":
        from dpo_fast_kernels.attention.triton_dkv import prefix_attention_bwd

        return prefix_attention_bwd(dout, q, k, v, out, lse, spans, scale=scale, window=window, softcap=softcap)
    return backend_varlen.backward(backend, dout, q, k, v, out, lse, layout, scale, window, softcap)


@_prefix_attention_bwd.register_fake
def _(dout, q, k, v, *args):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    *tensors, scale, window, softcap, backend = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.options = scale, window, softcap, backend
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor, dlse: None):
    gradients = _prefix_attention_bwd(dout, *ctx.saved_tensors, *ctx.options)
    return *gradients, *(None for _ in range(11))  # seven tensors of the layout, four options


_prefix_attention.register_autograd(_backward, setup_context=_setup_context)


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
    """Shared-prefix attention over a packed row of T tokens; differentiable once, deterministic.

    Args:
        q, k, v: one dtype on one device (autocast's under autocast); Hq a multiple of Hkv (grouped heads). The CPU's
            backends and sdpa take fp32, bf16, fp16 and fp64, triton the first three, the others bf16 and fp16.
        layout: where prompts and completions lie; its tensors on the device of q.
        scale: of the scores; None is 1/√D.
        window: a query sees at most this many keys, itself included; None is all.
        softcap: scores become softcap·tanh(score / softcap).
        backend: `auto` or one of `BACKENDS`; a named backend never falls back.

    Raises:
        ValueError: a backend that is unknown or cannot compute this, or inputs that do not fit together.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    _check(q, k, v, layout, scale, window, softcap, backend)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    out, _ = _prefix_attention(
        q,
        k,
        v,
        layout.segments,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.spans,
        layout.keys.index,
        layout.keys.uses,
        layout.keys.use_offsets,
        scale,
        window or None,
        softcap or None,
        backend,
    )
    return out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of auto, {', '.join(BACKENDS)}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 3:
            raise ValueError(f"{name} must have shape [tokens, heads, head size], got {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} must be {q.dtype} on {q.device} as q is, got {tensor.dtype} on {tensor.device}; convert it"
            )
    if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q, k, v have {q.shape[1]}, {k.shape[1]}, {v.shape[1]} heads: "
            "k and v must have equally many, and q a multiple of it"
        )
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q has head size {q.shape[2]} and k {k.shape[2]}: they must be equal")
    tokens = layout.spans.shape[1]
    if q.shape[0] != tokens or k.shape[0] != tokens or v.shape[0] != tokens:
        raise ValueError(f"q, k, v have {q.shape[0]}, {k.shape[0]}, {v.shape[0]} rows; layout has {tokens} tokens")
    if layout.spans.device != q.device:
        raise ValueError(f"layout is on {layout.spans.device} and q on {q.device}: move it with layout.to(q.device)")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale is {scale}; it must be positive, or None for 1/√(head size)")
    if window is not None and window < 0:
        raise ValueError(f"window is {window}; it must be the number of keys a query sees, or None for all")
    if softcap is not None and softcap < 0:
        raise ValueError(f"softcap is {softcap}; it must be a positive bound of the scores, or None for none")
