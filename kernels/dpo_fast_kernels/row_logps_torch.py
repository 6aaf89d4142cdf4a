"""One tile of logits → log-probs of the targets, and the gradient in place, in blocks of rows that stay in the cache.

    logp_n = x_n[t_n] − logΣ_v exp(x_n[v])        D_n = ∂logp_n/∂y_n = (onehot(t_n) − softmax(x_n)) ⊙ ∂x_n/∂y_n

z the product of the head, x = transform(z + bias) the logits and y = transform.slope·(z + bias), so that D holds no
constant factor (`row_logps` says why). The same three functions as in `row_logps`, for tensors of any device; the tile
is read from memory once and, for the gradient, written once.
N rows of the tile, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpo_fast_kernels.logits import LogitTransform, RowLogps

_CPU_BLOCK = 1 << 20  # elements a thread: 4 MiB of fp32, in the cache, and few enough blocks for threads to keep pace
_BLOCK = 1 << 27  # elements on a device whose cache a block cannot aim at


def row_logps_fwd(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None,  # [V]
    *,
    transform: LogitTransform,
    statistics: bool,
) -> tuple[RowLogps, Tensor]:  # and the log-sum-exp [N]
    """Reads a tile and leaves it as it is."""
    result, lse = _empty_result(z, statistics), _empty_rows(z)
    scratch = _Scratch()
    for rows in _row_blocks(z):
        memory = scratch.like(z[rows])
        x = _logits(z[rows], bias, transform, out=memory)
        target_logits = x.gather(1, targets[rows, None])[:, 0]
        _log_softmax(x, targets[rows], rows, result, out=memory)
        torch.sub(target_logits, result.logps[rows], out=lse[rows])
    return result, lse


def row_logps_bwd(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None,  # [V]
    logps: Tensor,  # [N]
    lse: Tensor,  # [N]
    *,
    transform: LogitTransform,
    out: Tensor,  # [N, V], may be z
    coefficient: Tensor | None = None,  # [N], 1 when left out
) -> None:
    """Writes `coefficient_n · D_n` to `out`, spoils z; a row whose coefficient is 0 becomes 0 whatever its logits."""
    scratch, slope_scratch = _Scratch(), _Scratch()
    for rows in _row_blocks(z):
        memory = _spoilable(z[rows], scratch)
        x = _logits(z[rows], bias, transform, out=memory)
        tanh_slope = _tanh_slope(x, transform, slope_scratch)
        torch.sub(x, lse[rows, None], out=memory)
        _gradient_(memory, targets[rows], logps[rows], tanh_slope)
        if coefficient is not None:
            memory.mul_(coefficient[rows, None]).masked_fill_((coefficient[rows] == 0)[:, None], 0)
        _store(memory, out[rows])


def row_logps_fwd_bwd(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None,  # [V]
    *,
    transform: LogitTransform,
    statistics: bool,
    out: Tensor,  # [N, V], may be z
) -> RowLogps:
    """Both of the above with coefficient 1, in one pass over the tile; spoils z."""
    result = _empty_result(z, statistics)
    scratch, slope_scratch = _Scratch(), _Scratch()
    for rows in _row_blocks(z):
        memory = _spoilable(z[rows], scratch)
        x = _logits(z[rows], bias, transform, out=memory)
        tanh_slope = _tanh_slope(x, transform, slope_scratch)
        _log_softmax(x, targets[rows], rows, result, out=memory)
        _gradient_(memory, targets[rows], result.logps[rows], tanh_slope)
        _store(memory, out[rows])
    return result


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _row_blocks(z: Tensor) -> Iterator[slice]:
    elements = _CPU_BLOCK * torch.get_num_threads() if z.device.type == "cpu" else _BLOCK
    step = max(1, elements // z.shape[1])
    return (slice(start, min(start + step, z.shape[0])) for start in range(0, z.shape[0], step))


class _Scratch:
    """Memory for one block of logits, allocated at its first use and used again by every block."""

    def __init__(self):
        self._memory = None

    def like(self, block: Tensor) -> Tensor:
        if self._memory is None:
            self._memory = torch.empty_like(block, dtype=_accumulator(block.dtype))
        return self._memory[: block.shape[0]]


def _spoilable(z: Tensor, scratch: _Scratch) -> Tensor:
    """Returns where to work: in z itself if its dtype will do."""
    return z if z.dtype == _accumulator(z.dtype) else scratch.like(z)


def _store(x: Tensor, out: Tensor) -> None:
    if x.data_ptr() != out.data_ptr():
        out.copy_(x)


def _empty_rows(z: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(z.shape[0], dtype=dtype or _accumulator(z.dtype), device=z.device)


def _empty_result(z: Tensor, statistics: bool) -> RowLogps:
    if not statistics:
        return RowLogps(_empty_rows(z))
    return RowLogps(_empty_rows(z), _empty_rows(z), _empty_rows(z), _empty_rows(z, torch.bool))


def _logits(z: Tensor, bias: Tensor | None, transform: LogitTransform, out: Tensor) -> Tensor:
    """Returns the logits of z: z where they are the same, otherwise `out`."""
    if z.dtype != out.dtype:
        z = out.copy_(z)  # first, as an operation on z and the bias rounds to their dtype
    if bias is not None:
        z = torch.add(z, bias, out=out)
    if transform.softcap is not None:
        z = torch.mul(z, transform.inner, out=out).tanh_()
    return z if transform.outer == 1 else torch.mul(z, transform.outer, out=out)


def _tanh_slope(x: Tensor, transform: LogitTransform, scratch: _Scratch) -> Tensor | None:
    """Returns 1 − tanh² from the logits x = outer·tanh."""
    if transform.softcap is None:
        return None
    return torch.mul(x, 1 / transform.outer, out=scratch.like(x)).square_().neg_().add_(1)


def _log_softmax(x: Tensor, targets: Tensor, rows: slice, result: RowLogps, out: Tensor) -> None:
    """Writes the log-probs of the logits x to `out`, which may be x, and fills in these rows of the result."""
    if result.mean_logit is not None:
        torch.mean(x, -1, out=result.mean_logit[rows])
    torch.log_softmax(x, -1, out=out)
    logps = torch.gather(out, 1, targets[:, None])[:, 0]
    result.logps[rows] = logps
    if result.entropy is not None:
        torch.ge(logps, out.amax(-1), out=result.is_top1[rows])
        out.clamp_min_(torch.finfo(out.dtype).min)  # 0 · −inf is not 0
        torch.sum(out.exp().mul_(out), -1, out=result.entropy[rows]).neg_()


def _gradient_(log_probs: Tensor, targets: Tensor, logps: Tensor, tanh_slope: Tensor | None) -> None:
    """Turns log-probs into D in place."""
    gradient = log_probs.exp_().neg_().scatter_(1, targets[:, None], -torch.expm1(logps)[:, None])
    if tanh_slope is not None:
        gradient.mul_(tanh_slope)
