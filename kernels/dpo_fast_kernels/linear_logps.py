"""Hidden rows × LM head → log-prob of every target, without ever holding all logits.

    logp_n = log softmax(transform(X_n·Wᵀ + b))[t_n]        D = ∂logp/∂y, y = slope·(X·Wᵀ + b)
    dX = g ⊙ (D·W)        dW = Dᵀ·(g ⊙ X)        db = Dᵀ·g        g = slope·∂loss/∂logp

Logits are made in tiles of rows and read once. D does not depend on the loss, so it is made while a tile is at hand:

    needs a gradient         forward                      backward               FLOP
    nothing                  log-probs                                           2·NHV
    hidden, head frozen      U = D·W                      dX = g ⊙ U             4·NHV
    head, D fits             D takes the tile's place     dX, dW from D          6·NHV
    head, D does not fit     log-probs                    the tile's D again     8·NHV, of those rows

Memory beyond the inputs and gradients: one tile, D where it is kept (both at most `budget_bytes`), and fp32 dW.
N rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_fast_kernels import row_logps_torch
from dpo_fast_kernels.gemm import Gemm
from dpo_fast_kernels.logits import LogitTransform, RowLogps

logger = logging.getLogger(__name__)

_MIN_TILE_ROWS = 2048  # below it the products are slower than the memory they save is worth
_CPU_TILE_ROWS = 512  # on a CPU more rows are no faster
_TILE_MULTIPLE = 128


@dataclass(frozen=True)
class _Options:
    """All that the autograd function needs to know beside tensors."""

    transform: LogitTransform
    statistics: bool
    gemm: Gemm
    row_ops: ModuleType  # row_logps or row_logps_torch
    tile_rows: int
    kept_rows: int  # rows whose D is kept for the backward, a multiple of tile_rows or all
    save_hidden_gradient: bool  # hidden alone needs a gradient: keep U = D·W instead of D


class _Tiles:
    """The memory that logits and D pass through, one tile at a time."""

    def __init__(self, options: _Options, rows: int, vocabulary: int, device: torch.device):
        self._options, self._device = options, device
        self._shape = (min(options.tile_rows, rows), vocabulary)
        self._logits = self._factor = None

    def logits(self, rows: int, kept: Tensor | None = None) -> Tensor:
        """Returns memory for the logits of `rows` rows: that of the D to be kept where it can hold them."""
        dtype = self._options.gemm.sum_dtype
        if kept is not None and kept.dtype == dtype:
            return kept
        if self._logits is None:
            self._logits = torch.empty(self._shape, dtype=dtype, device=self._device)
        return self._logits[:rows]

    def gradient(self, logits: Tensor) -> Tensor:
        """Returns memory for the D of `logits`: the logits' own where the products can read it."""
        dtype = self._options.gemm.factor_dtype
        if logits.dtype == dtype:
            return logits
        if self._factor is None:
            self._factor = torch.empty(self._shape, dtype=dtype, device=self._device)
        return self._factor[: logits.shape[0]]


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options):
        with torch.autocast(hidden.device.type, enabled=False):
            result, lse, saved_gradient = _forward(hidden, weight, bias, targets, options)
        ctx.options = options
        ctx.save_for_backward(hidden, weight, bias, targets, result.logps, lse, saved_gradient)
        ctx.mark_non_differentiable(*(tensor for tensor in result[1:] if tensor is not None))
        ctx.set_materialize_grads(False)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps: Tensor | None, *_):
        if dlogps is None:
            return (None,) * 5
        with torch.autocast(dlogps.device.type, enabled=False):
            return *_backward(dlogps, *ctx.saved_tensors, ctx.options, ctx.needs_input_grad), None, None


def _forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [N]
    options: _Options,
) -> tuple[RowLogps, Tensor | None, Tensor | None]:  # and the log-sum-exp [N], and U [N, H] or D [kept_rows, V]
    gemm, row_ops = options.gemm, options.row_ops
    x, w = gemm.factor(hidden), gemm.factor(weight)
    tiles = _Tiles(options, x.shape[0], w.shape[0], x.device)
    arguments = {"transform": options.transform, "statistics": options.statistics}
    saved_gradient = None
    if options.save_hidden_gradient:
        saved_gradient = x.new_empty(x.shape, dtype=gemm.sum_dtype)
    elif options.kept_rows:
        saved_gradient = x.new_empty((options.kept_rows, w.shape[0]), dtype=gemm.factor_dtype)

    results, lses = [], []
    for rows in _tile_slices(0, x.shape[0], options.tile_rows):
        keep = rows.start < options.kept_rows
        kept = saved_gradient[rows] if keep else None
        z = gemm.logits(x[rows], w, out=tiles.logits(rows.stop - rows.start, kept))
        if keep or options.save_hidden_gradient:
            gradient = kept if keep else tiles.gradient(z)
            results.append(row_ops.row_logps_fwd_bwd(z, targets[rows], bias, out=gradient, **arguments))
            if options.save_hidden_gradient:
                saved_gradient[rows] = gemm.product(gradient, w)
        else:
            result, lse = row_ops.row_logps_fwd(z, targets[rows], bias, **arguments)
            results.append(result)
            lses.append(lse)
    result = RowLogps(*(None if column[0] is None else torch.cat(column) for column in zip(*results, strict=True)))
    return result, torch.cat(lses) if lses else None, saved_gradient


def _backward(
    dlogps: Tensor,  # [N]
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [N]
    logps: Tensor,  # [N]
    lse: Tensor | None,  # [N - kept_rows]
    saved_gradient: Tensor | None,  # U [N, H], or D [kept_rows, V]
    options: _Options,
    needs_input_grad: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    gemm, dlogps = options.gemm, dlogps * options.transform.slope
    if options.save_hidden_gradient:
        return (saved_gradient * dlogps[:, None]).to(hidden.dtype), None, None
    needs_hidden, needs_weight, needs_bias = needs_input_grad[:3]
    x, w = gemm.factor(hidden), gemm.factor(weight)
    coefficient, unit = _in_range(dlogps, gemm)
    dhidden = torch.empty_like(hidden) if needs_hidden else None
    dweight = dbias = None
    for rows, gradient in _gradients(x, w, bias, targets, logps, lse, saved_gradient, options):
        if needs_hidden:
            dhidden[rows] = gemm.product(gradient, w).to(dlogps.dtype).mul_(dlogps[rows, None])
        if needs_weight:
            scaled = (x[rows] * coefficient[rows, None]).to(x.dtype)
            whole = gradient.shape[0] == x.shape[0] and unit is None
            if whole and weight.dtype == x.dtype:  # one product, whose fp32 sums are rounded once, by the product
                dweight = torch.mm(gradient.t(), scaled)
            else:
                dweight = _zeros_like(weight, gemm) if dweight is None else dweight
                gemm.accumulate(dweight, gradient, scaled)
        if needs_bias:
            dbias = _zeros_like(bias[:, None], gemm) if dbias is None else dbias
            gemm.accumulate(dbias, gradient, coefficient[rows, None].to(x.dtype))
    if unit is not None:
        dweight = dweight.mul_(unit) if needs_weight else None
        dbias = dbias.mul_(unit) if needs_bias else None
    dweight = dweight.to(weight.dtype) if needs_weight else None
    dbias = dbias[:, 0].to(bias.dtype) if needs_bias else None
    return dhidden, dweight, dbias


def _zeros_like(tensor: Tensor, gemm: Gemm) -> Tensor:
    return torch.zeros(tensor.shape, dtype=gemm.sum_dtype, device=tensor.device)


def _gradients(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logps: Tensor,
    lse: Tensor | None,
    kept: Tensor | None,
    options: _Options,
) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of the rows with their D: first what was kept, at once, then the rest tile by tile."""
    if kept is not None:
        yield slice(0, options.kept_rows), kept
    if lse is None:
        return
    tiles = _Tiles(options, x.shape[0], w.shape[0], x.device)
    for rows in _tile_slices(options.kept_rows, x.shape[0], options.tile_rows):
        z = options.gemm.logits(x[rows], w, out=tiles.logits(rows.stop - rows.start))
        gradient = tiles.gradient(z)
        tile_lse = lse[rows.start - options.kept_rows : rows.stop - options.kept_rows]
        options.row_ops.row_logps_bwd(
            z, targets[rows], bias, logps[rows], tile_lse, transform=options.transform, out=gradient
        )
        yield rows, gradient


def _tile_slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Yields slices of at most `step` rows; one empty slice where there are no rows."""
    for first in range(start, max(stop, start + 1), step):
        yield slice(first, min(first + step, stop))


def _in_range(dlogps: Tensor, gemm: Gemm) -> tuple[Tensor, Tensor | None]:
    """Splits dlogps into coefficient · unit, so that fp16 factors neither vanish nor overflow; no unit elsewhere."""
    if gemm.factor_dtype != torch.float16 or dlogps.numel() == 0:
        return dlogps, None
    unit = dlogps.abs().amax().clamp_min(torch.finfo(dlogps.dtype).tiny)
    return dlogps / unit, unit


def _tile_rows(rows: int, vocabulary: int, budget_bytes: int, gemm: Gemm) -> int:
    """Returns how many rows a tile has. It must not depend on what needs a gradient: equal tiles, equal log-probs."""
    if gemm.device_type == "cpu":
        return max(1, min(rows, _CPU_TILE_ROWS))
    bytes_per_row = vocabulary * gemm.sum_dtype.itemsize
    if gemm.factor_dtype != gemm.sum_dtype:
        bytes_per_row += vocabulary * gemm.factor_dtype.itemsize
    tile = max(_MIN_TILE_ROWS, budget_bytes // bytes_per_row // _TILE_MULTIPLE * _TILE_MULTIPLE)
    return max(1, min(rows, tile))


def _kept_rows(rows: int, vocabulary: int, tile_rows: int, budget_bytes: int, gemm: Gemm) -> int:
    fitting = budget_bytes // (vocabulary * gemm.factor_dtype.itemsize)
    return rows if fitting >= rows else fitting // tile_rows * tile_rows


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Returns the dtype `torch.nn.functional.linear` would multiply in."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


@cache
def _triton_is_missing() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        logger.warning("Triton is not installed: linear_logps runs in plain PyTorch on this GPU, with more passes.")
        return True
    return False


def _row_ops(backend: str, device: torch.device) -> ModuleType:
    if backend == "torch" or (backend == "auto" and (device.type != "cuda" or _triton_is_missing())):
        return row_logps_torch
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got device {device}; use backend='auto' or 'torch', "
            "or set TRITON_INTERPRET=1 before the first import of triton to debug on a CPU"
        )
    from dpo_fast_kernels import row_logps

    return row_logps


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, budget_bytes: int, backend: str
) -> None:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    if budget_bytes < 0:
        raise ValueError(f"budget_bytes must be 0 or more, got {budget_bytes}")
    if hidden.ndim != 2:
        raise ValueError(f"hidden must have shape [N, H], got {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape [V, {hidden.shape[1]}] as hidden has, got {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must have shape [{hidden.shape[0]}] as hidden has, got {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}] as weight has, got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {tensor.device}")
    allowed = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in allowed:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    autocast = torch.is_autocast_enabled(hidden.device.type)
    if weight.dtype != hidden.dtype and (not autocast or torch.float64 in (weight.dtype, hidden.dtype)):
        raise ValueError(f"weight must have hidden's dtype {hidden.dtype} outside autocast, got {weight.dtype}")
    if backend == "triton" and hidden.dtype == torch.float64:
        raise ValueError("hidden must not be float64 with backend='triton', whose kernels count in fp32")
    on_cpu = targets.device.type == "cpu"
    if on_cpu and targets.numel() and not 0 <= targets.min() <= targets.max() < weight.shape[0]:
        raise ValueError(
            f"targets must lie in [0, {weight.shape[0]}), got {int(targets.min())} to {int(targets.max())}"
        )


def linear_logps(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None = None,  # [V]
    *,
    transform: LogitTransform = LogitTransform(),  # noqa: B008 (frozen)
    statistics: bool = False,
    budget_bytes: int = 2 * 2**30,
    backend: str = "auto",
) -> RowLogps:
    """Returns the log-prob (nat) of every target under the LM head, differentiable in hidden, weight and bias.

    Products are taken in the inputs' dtype, or in autocast's where that is on; logits, log-sum-exp and sums in fp32
    (float64 for float64 inputs). Gradients come back in the dtype of what they belong to.

    Args:
        hidden: rows that predict a token, [N, H].
        weight: the LM head, [V, H], in hidden's dtype unless autocast is on.
        targets: int64 [N], in [0, V); checked on the CPU, where it costs no synchronisation. On a GPU the log-prob of
            a target outside is NaN or undefined.
        bias: bias of the head, [V].
        transform: scale, softcap and temperature of the logits.
        statistics: also return entropy, mean logit and top-1, which carry no gradient.
        budget_bytes: bound of a tile of logits (beyond at least 2048 rows), and of what is kept for the backward.
        backend: who does the work on rows of logits: "torch", "triton" (CUDA only, never falls back), or "auto".

    Raises:
        ValueError: shapes, dtypes, devices, targets on a CPU, or options do not fit; the message names the argument.
    """
    _check(hidden, weight, targets, bias, budget_bytes, backend)
    if hidden.dtype == torch.float64 and backend == "auto":
        backend = "torch"
    (rows, _), vocabulary = hidden.shape, weight.shape[0]
    gemm = Gemm(_compute_dtype(hidden), hidden.device.type)
    tile_rows = _tile_rows(rows, vocabulary, budget_bytes, gemm)
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    needs_grad = torch.is_grad_enabled()
    options = _Options(
        transform=transform,
        statistics=statistics,
        gemm=gemm,
        row_ops=_row_ops(backend, hidden.device),
        tile_rows=tile_rows,
        kept_rows=_kept_rows(rows, vocabulary, tile_rows, budget_bytes, gemm) if needs_grad and head_trains else 0,
        save_hidden_gradient=needs_grad and hidden.requires_grad and not head_trains,
    )
    return RowLogps(*_LinearLogps.apply(hidden, weight, bias, targets, options))
