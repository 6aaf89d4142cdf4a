"""Logits that are already there → log-prob of every completion, in place of log_softmax, gather and sum.

    ℓ_s = Σ_{n in s} (x_n[t_n] − logΣ_v exp(x_n[v]))        ∂ℓ_s/∂z_n = D_n·slope,   n a row of completion s

z [N, V] what the head made, x = transform(z) in fp32. Beside z nothing of its size is kept, and one tensor of its size
and dtype is made, the gradient. Its rows are aligned as those of `tiles.empty_rows` are, whatever V is.
N score rows, V vocabulary, S completions.

Bytes moved: forward N·V·itemsize; backward 2·N·V·itemsize.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from dpo_fast_kernels.head.arguments import (
    check_cu_scores,
    check_cu_scores_values,
    check_target_values,
    pick_backend,
    row_operations,
)
from dpo_fast_kernels.head.linear_logps import row_logps_of, spread_over_rows
from dpo_fast_kernels.head.logits import STATISTICS, LogitTransform, RowLogps, check_statistics, empty_statistics
from dpo_fast_kernels.head.tiles import empty_rows


@torch.library.custom_op("dpo_fast::sequence_logps", mutates_args=())
def _sequence_logps(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    cu_scores: Tensor,  # [S + 1]
    scale: float,
    softcap: float | None,
    temperature: float,
    statistics: str,  # names, separated by commas
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # sums [S], log-probs [N], statistics, log-sum-exps [N]
    if logits.device.type == "cpu":
        check_target_values(targets, logits.shape[1])
        check_cu_scores_values(cu_scores, logits.shape[0])
    row_ops, transform = row_operations(backend), LogitTransform(scale, softcap, temperature)
    logps = logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    wanted = empty_statistics(statistics.split(","), logps)
    logps, lse = row_ops.row_logps_fwd(logits, targets, None, transform=transform, statistics=wanted)
    stacked = torch.stack(list(wanted.values())) if wanted else logps.new_empty((0, logps.shape[0]))
    return row_ops.sequence_sums(logps, cu_scores), logps, stacked, lse


@_sequence_logps.register_fake
def _(logits, targets, cu_scores, scale, softcap, temperature, statistics, backend):
    logps = logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))
    count = sum(name in STATISTICS for name in statistics.split(","))
    stacked = logps.new_empty((count, logps.shape[0]))
    return logps.new_empty(cu_scores.shape[0] - 1), logps, stacked, torch.empty_like(logps)


@torch.library.custom_op("dpo_fast::sequence_logps_bwd", mutates_args=())
def _sequence_logps_bwd(
    coefficient: Tensor,  # [N], ∂loss/∂logp times the transform's slope
    logits: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    logps: Tensor,  # [N]
    lse: Tensor,  # [N]
    scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
) -> Tensor:  # [N, V]
    gradient = empty_rows(*logits.shape, logits.dtype, logits.device)
    row_operations(backend).row_logps_bwd(
        # The PyTorch version works in the memory of its input, which is the user's here.
        gradient.copy_(logits) if backend == "torch" else logits,
        targets,
        None,
        logps,
        lse,
        transform=LogitTransform(scale, softcap, temperature),
        out=gradient,
        coefficient=coefficient,
    )
    return gradient


@_sequence_logps_bwd.register_fake
def _(coefficient, logits, targets, logps, lse, scale, softcap, temperature, backend):
    return empty_rows(*logits.shape, logits.dtype, logits.device)


def _setup_context(ctx, inputs, output):
    logits, targets, cu_scores, *ctx.transform, _, ctx.backend = inputs
    _, logps, statistics, lse = output
    ctx.save_for_backward(logits, targets, cu_scores, logps, lse)
    ctx.mark_non_differentiable(statistics, lse)


def _backward(ctx, dsums, dlogps, *_):
    logits, targets, cu_scores, logps, lse = ctx.saved_tensors
    coefficient = (spread_over_rows(dsums, cu_scores, logits.shape[0]) + dlogps) * LogitTransform(*ctx.transform).slope
    gradient = _sequence_logps_bwd(coefficient, logits, targets, logps, lse, *ctx.transform, ctx.backend)
    return gradient, *(None,) * 7


_sequence_logps.register_autograd(_backward, setup_context=_setup_context)


def sequence_logps(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    cu_scores: Tensor,  # int32 or int64 [S + 1]
    *,
    transform: LogitTransform = LogitTransform(),  # noqa: B008 (frozen)
    backend: str = "auto",
) -> Tensor:  # fp32 [S]
    """Returns the log-prob (nat) of every completion, the sum of its targets' log-probs; differentiable in logits.

    Arguments and errors are those of `logps_of_logits`.
    """
    sums = logps_of_logits(logits, targets, cu_scores, transform=transform, backend=backend).sequence_logps
    assert sums is not None
    return sums


def logps_of_logits(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    cu_scores: Tensor,  # int32 or int64 [S + 1]
    *,
    transform: LogitTransform = LogitTransform(),  # noqa: B008 (frozen)
    statistics: Collection[str] = (),
    backend: str = "auto",
) -> RowLogps:
    """Returns the log-prob (nat) of every target and their sums over completions, differentiable in logits.

    Args:
        logits: one row a token to be predicted, [N, V], in float16, bfloat16, float32 or float64; the distance between
            rows is free, entries of a row lie side by side. They stay as they are.
        targets: int64 [N], in [0, V).
        cu_scores: where the rows of each completion begin and end, from 0 to N.
        transform: what is still to be done to the logits.
        statistics: names of what to return besides, without gradient, as `linear_logps` has them.
        backend: "torch", "triton" (CUDA only, never falls back), or "auto".

    Raises:
        ValueError: a shape, dtype or device does not fit; on a CPU also targets outside the vocabulary, and a
            `cu_scores` that does not end at N or holds an empty completion. The message names the argument. On a GPU
            such values come out as NaN.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating-point [N, V], got {logits.dtype} {tuple(logits.shape)}")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64 or targets.device != logits.device:
        raise ValueError(
            f"targets must be int64 [{logits.shape[0]}] on {logits.device}, "
            f"got {targets.dtype} {tuple(targets.shape)} on {targets.device}"
        )
    check_statistics(statistics)
    check_cu_scores(cu_scores, logits.device)
    if backend == "fused":
        raise ValueError("backend must be 'auto', 'torch' or 'triton': 'fused' makes logits, these are given")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    backend = pick_backend(backend, logits.dtype, logits.device)
    options = (transform.scale, transform.softcap, transform.temperature, ",".join(statistics), backend)
    sums, logps, stacked, _ = _sequence_logps(logits, targets, cu_scores, *options)
    return row_logps_of(logps, sums, stacked, statistics)
