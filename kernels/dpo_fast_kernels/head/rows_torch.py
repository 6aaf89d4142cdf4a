"""One tile of logits → log-probs of the targets, and the gradient in place, in blocks of rows that stay in the cache.

    logp_n = x_n[t_n] − logΣ_v exp(x_n[v])        D_n = ∂logp_n/∂y_n = (onehot(t_n) − softmax(x_n)) ⊙ ∂x_n/∂y_n

z the product of the head, x = transform(z + bias) the logits and y = transform.slope·(z + bias), so that D holds no
constant factor (`row_logps` says why). The same functions as in `row_logps`, for tensors of any device; the tile
is read from memory once and, for the gradient, written once.
N rows of the tile, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dpo_fast_kernels.head.logits import LogitTransform

_CPU_BLOCK = 1 << 20  # elements a thread: 4 MiB of fp32, in the cache, and few enough blocks for threads to keep pace
_BLOCK = 1 << 27  # elements on a device whose cache a block cannot aim at


def row_logps_fwd(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None,  # [V]
    *,
    transform: LogitTransform,
    statistics: Mapping[str, Tensor],  # [N] each, filled in
) -> tuple[Tensor, Tensor]:  # log-probs [N], log-sum-exp [N]
    """Reads a tile and leaves it as it is."""
    logps, lse = _empty_rows(z), _empty_rows(z)
    scratch, exponentials = _Scratch(), _Scratch()
    for rows in _row_blocks(z):
        memory = scratch.like(z[rows])
        x = _logits(z[rows], bias, transform, out=memory)
        found = _softmax(x, targets[rows], _part(statistics, rows), memory, exponentials)
        logps[rows], lse[rows], _, _ = found
    return logps, lse


def row_logps_bwd(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N], −1 where none of these V words is the target
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
        torch.sub(x, lse[rows, None], out=memory).exp_().neg_()
        _target_entries_(memory, targets[rows], logps[rows], tanh_slope)
        if coefficient is not None:
            memory.mul_(coefficient[rows, None]).masked_fill_((coefficient[rows] == 0)[:, None], 0)
        _store(memory, out[rows])


def row_logps_fwd_bwd(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None,  # [V]
    *,
    transform: LogitTransform,
    statistics: Mapping[str, Tensor],
    out: Tensor,  # [N, V], may be z
) -> Tensor:
    """Both of the above with coefficient 1, in one pass over the tile; returns the log-probs, spoils z."""
    logps = _empty_rows(z)
    scratch, slope_scratch, exponentials = _Scratch(), _Scratch(), _Scratch()
    for rows in _row_blocks(z):
        memory = _spoilable(z[rows], scratch)
        x = _logits(z[rows], bias, transform, out=memory)
        tanh_slope = _tanh_slope(x, transform, slope_scratch)
        logps[rows], _, e, total = _softmax(x, targets[rows], _part(statistics, rows), memory, exponentials)
        torch.mul(e, -1 / total, out=memory)
        _target_entries_(memory, targets[rows], logps[rows], tanh_slope)
        _store(memory, out[rows])
    return logps


def sequence_sums(
    logps: Tensor,  # [N]
    cu_scores: Tensor,  # int32 or int64 [S + 1]
) -> Tensor:  # [S]
    """Sums of consecutive log-probs, in float64 and ascending order."""
    return torch.segment_reduce(logps.double(), "sum", offsets=cu_scores.long(), unsafe=True).to(logps.dtype)


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


def _empty_rows(z: Tensor) -> Tensor:
    return torch.empty(z.shape[0], dtype=_accumulator(z.dtype), device=z.device)


def _part(statistics: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: values[rows] for name, values in statistics.items()}


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


def _softmax(
    x: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    statistics: Mapping[str, Tensor],  # [N] each, filled in
    out: Tensor,  # [N, V], may be x; spoiled
    scratch: _Scratch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the targets' log-probs [N], log-sum-exps [N], e^(x − max) [N, V], in `out` where it can be, and its sums
    [N, 1].

    Not by `torch.log_softmax`: on a CPU its fp32 sum over a peaked row is 1e-5 short, a hundredth of a nat in
    a thousand tokens; `sum` adds in a tree.
    """
    top = x.amax(-1, keepdim=True).clamp_min_(torch.finfo(x.dtype).min)  # −inf − (−inf) is not 0
    target = x.gather(1, targets[:, None])
    if "mean_logit" in statistics:
        torch.mean(x, -1, out=statistics["mean_logit"])
    if "is_top1" in statistics:
        statistics["is_top1"].copy_((target >= top)[:, 0])
    torch.sub(x, top, out=out)
    exponentials = torch.exp(out, out=scratch.like(out) if "entropy" in statistics else out)
    total = exponentials.sum(-1, keepdim=True)
    if "log_sum_sq_probs" in statistics:
        norm = torch.linalg.vector_norm(exponentials, dim=-1)
        statistics["log_sum_sq_probs"].copy_(norm.div_(total[:, 0]).log_().mul_(2))
    if "entropy" in statistics:
        out.clamp_min_(torch.finfo(out.dtype).min).mul_(exponentials)  # 0 · −inf is not 0
        torch.sub(total.log()[:, 0], out.sum(-1).div_(total[:, 0]), out=statistics["entropy"])
    return (target - top - total.log())[:, 0], (top + total.log())[:, 0], exponentials, total


def _target_entries_(gradient: Tensor, targets: Tensor, logps: Tensor, tanh_slope: Tensor | None) -> None:
    """Makes D of −softmax in place."""
    columns = targets.clamp_min(0)[:, None]
    elsewhere = (targets < 0)[:, None]
    gradient.scatter_(1, columns, torch.where(elsewhere, gradient.gather(1, columns), -torch.expm1(logps)[:, None]))
    if tanh_slope is not None:
        gradient.mul_(tanh_slope)
