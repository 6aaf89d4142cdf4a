"""Hidden rows × LM head → log-prob of every target, without ever holding all logits.

    logp_n = log softmax(transform(X_n·Wᵀ + b))[t_n]        D = ∂logp/∂y, y = slope·(X·Wᵀ + b)
    dX = g ⊙ (D·W)        dW = Dᵀ·(g ⊙ X)        db = Dᵀ·g        g = slope·∂loss/∂logp

Logits are made in tiles of rows and read once. D does not depend on the loss, so it is made while a tile is at hand:

    needs a gradient         forward                      backward               FLOP
    nothing                  log-probs                                           2·NHV
    hidden, head frozen      U = D·W                      dX = g ⊙ U             4·NHV
    head, D fits             D takes the tile's place     dX, dW from D          6·NHV
    head, D does not fit     log-probs                    the tile's D again     8·NHV, of those rows

The backend "fused" makes the forward one kernel whose logits never leave registers; its backward makes tiles again.
Memory beyond the inputs and gradients: one tile, D where it is kept (both at most `budget_bytes`), and fp32 dW where
several tiles add to it.
N rows, S completions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from dpo_fast_kernels.head.arguments import (
    check_cu_scores,
    check_head,
    check_values,
    compute_dtype,
    pick_backend,
    row_operations,
)
from dpo_fast_kernels.head.gemm import Gemm
from dpo_fast_kernels.head.logits import STATISTICS, LogitTransform, RowLogps, check_statistics, empty_statistics
from dpo_fast_kernels.head.tiles import MIN_ROWS, TileMemory, bytes_per_row, empty_rows, tile_rows, tile_slices
from dpo_fast_kernels.head.vocab_parallel import VocabularyShards, local_head


@torch.library.custom_op("dpo_fast::linear_logps", mutates_args=())
def _linear_logps(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [N]
    cu_scores: Tensor | None,  # [S + 1]
    scale: float,
    softcap: float | None,
    temperature: float,
    statistics: str,  # names, separated by commas
    dtype: torch.dtype,  # that products are taken in
    backend: str,  # "torch", "triton" or "fused"
    budget_bytes: int,
    keep: str,  # for the backward: "nothing", "U" [N, H], or "D" [kept rows, V]
    group: str | None = None,  # of ranks that share the vocabulary
    sizes: Sequence[int] | None = None,  # of their shards
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # log-probs, their sums, statistics, log-sum-exps, what was kept
    with torch.autocast(hidden.device.type, enabled=False):
        shards = VocabularyShards.named(group, sizes, weight)
        check_values(hidden, targets, cu_scores, shards.vocabulary)
        gemm, row_ops = Gemm(dtype, hidden.device.type), shards.row_operations(row_operations(backend))
        transform = LogitTransform(scale, softcap, temperature)
        x, w = gemm.factor(hidden), gemm.factor(weight)
        kept_rows, kept = _empty_kept(x, w, gemm, budget_bytes, keep, shards)
        logps = x.new_empty(x.shape[0], dtype=gemm.sum_dtype)
        lse = logps.new_empty(x.shape[0] - kept_rows)
        wanted = empty_statistics(statistics.split(","), logps)
        if backend == "fused":
            from dpo_fast_kernels.head.linear_logps_fused import linear_logps_fused

            logps, lse = linear_logps_fused(x, w, targets, bias, transform=transform, statistics=wanted)
        else:
            step = tile_rows(x.shape[0], shards.largest, budget_bytes, gemm)
            memory = TileMemory(gemm, step, w.shape[0], x.device)
            for rows in tile_slices(0, x.shape[0], step):
                arguments = {
                    "transform": transform,
                    "statistics": {name: values[rows] for name, values in wanted.items()},
                }
                tile_kept = kept[rows] if keep == "D" and rows.start < kept_rows else None
                z = gemm.logits(x[rows], w, out=memory.logits(rows.stop - rows.start, tile_kept))
                if keep == "U" or tile_kept is not None:
                    gradient = memory.gradient(z) if tile_kept is None else tile_kept
                    logps[rows] = row_ops.row_logps_fwd_bwd(z, targets[rows], bias, out=gradient, **arguments)
                    if keep == "U":
                        kept[rows] = gemm.product(gradient, w)
                else:
                    tile_lse = lse[rows.start - kept_rows : rows.stop - kept_rows]
                    logps[rows], tile_lse[:] = row_ops.row_logps_fwd(z, targets[rows], bias, **arguments)
        sums = logps.new_empty(0) if cu_scores is None else row_ops.sequence_sums(logps, cu_scores)
        stacked = torch.stack(list(wanted.values())) if wanted else logps.new_empty((0, logps.shape[0]))
        return logps, sums, stacked, lse, kept


@_linear_logps.register_fake
def _(
    hidden,
    weight,
    bias,
    targets,
    cu_scores,
    scale,
    softcap,
    temperature,
    statistics,
    dtype,
    backend,
    budget_bytes,
    keep,
    group=None,
    sizes=None,
):
    gemm, shards = Gemm(dtype, hidden.device.type), VocabularyShards.named(group, sizes, weight)
    kept_rows, kept = _empty_kept(hidden, weight, gemm, budget_bytes, keep, shards)
    logps = hidden.new_empty(hidden.shape[0], dtype=gemm.sum_dtype)
    sums = logps.new_empty(0 if cu_scores is None else cu_scores.shape[0] - 1)
    count = sum(name in STATISTICS for name in statistics.split(","))
    return logps, sums, logps.new_empty((count, logps.shape[0])), logps.new_empty(logps.shape[0] - kept_rows), kept


def _empty_kept(
    x: Tensor, w: Tensor, gemm: Gemm, budget_bytes: int, keep: str, shards: VocabularyShards
) -> tuple[int, Tensor]:
    """How many rows of D the forward keeps, all or whole tiles, and memory for what it keeps."""
    rows = x.shape[0]
    if keep == "U":
        return rows, x.new_empty(x.shape, dtype=gemm.sum_dtype)
    fitting = budget_bytes // (shards.largest * gemm.factor_dtype.itemsize)
    step = tile_rows(rows, shards.largest, budget_bytes, gemm)
    kept_rows = rows if fitting >= rows else fitting // step * step
    if keep == "nothing" or kept_rows == 0:
        return 0, x.new_empty(0)
    return kept_rows, empty_rows(kept_rows, w.shape[0], gemm.factor_dtype, x.device)


@torch.library.custom_op("dpo_fast::linear_logps_bwd", mutates_args=())
def _linear_logps_bwd(
    dlogps: Tensor,  # [N]
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [N]
    logps: Tensor,  # [N]
    lse: Tensor,  # [N − kept rows]
    kept: Tensor,  # U [N, H], or D [kept rows, V]
    scale: float,
    softcap: float | None,
    temperature: float,
    dtype: torch.dtype,
    backend: str,
    budget_bytes: int,
    keep: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    group: str | None = None,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # dhidden, dweight, dbias; empty where not needed
    with torch.autocast(hidden.device.type, enabled=False):
        shards, transform = VocabularyShards.named(group, sizes, weight), LogitTransform(scale, softcap, temperature)
        dlogps = dlogps * transform.slope
        empty = hidden.new_empty(0)
        if keep == "U":
            return shards.add_up_(kept * dlogps[:, None]).to(hidden.dtype), empty, empty.clone()
        gemm = Gemm(dtype, hidden.device.type)
        x, w = gemm.factor(hidden), gemm.factor(weight)
        coefficient, unit = gemm.in_range(dlogps)
        dhidden = torch.empty_like(hidden, dtype=shards.part_dtype(hidden.dtype)) if needs_hidden else empty
        dweight = dbias = None
        tiles = _gradients(x, w, bias, targets, logps, lse, kept, gemm, backend, budget_bytes, transform, shards)
        for rows, gradient in tiles:
            if needs_hidden:
                dhidden[rows] = gemm.product(gradient, w).to(dlogps.dtype).mul_(dlogps[rows, None])
            if needs_weight:
                scaled = (x[rows] * coefficient[rows, None]).to(x.dtype)
                whole = gradient.shape[0] == x.shape[0] and unit is None
                dweight = gemm.added(dweight, gradient, scaled, is_all=whole and weight.dtype == x.dtype)
            if needs_bias:
                dbias = gemm.added(dbias, gradient, coefficient[rows, None].to(x.dtype))
        if needs_hidden:
            dhidden = shards.add_up_(dhidden).to(hidden.dtype)
        if unit is not None:
            dweight = dweight.mul_(unit) if needs_weight else None
            dbias = dbias.mul_(unit) if needs_bias else None
        dweight = dweight.to(weight.dtype) if needs_weight else empty.clone()
        dbias = dbias[:, 0].to(bias.dtype) if needs_bias else empty.clone()
        return dhidden, dweight, dbias


@_linear_logps_bwd.register_fake
def _(
    dlogps,
    hidden,
    weight,
    bias,
    targets,
    logps,
    lse,
    kept,
    scale,
    softcap,
    temperature,
    dtype,
    backend,
    budget_bytes,
    keep,
    needs_hidden,
    needs_weight,
    needs_bias,
    group=None,
    sizes=None,
):
    needed = ((hidden, needs_hidden), (weight, needs_weight), (bias, needs_bias))
    return tuple(torch.empty_like(tensor) if needs else hidden.new_empty(0) for tensor, needs in needed)


def _gradients(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logps: Tensor,
    lse: Tensor,
    kept: Tensor,
    gemm: Gemm,
    backend: str,
    budget_bytes: int,
    transform: LogitTransform,
    shards: VocabularyShards,
) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of the rows with their D: first what was kept, at once, then the rest tile by tile."""
    kept_rows = x.shape[0] - lse.shape[0]
    if kept_rows or not x.shape[0]:
        yield slice(0, kept_rows), kept.view(kept_rows, w.shape[0])
    if kept_rows == x.shape[0]:
        return
    row_ops = shards.row_operations(row_operations(backend))
    step = tile_rows(x.shape[0], shards.largest, budget_bytes, gemm)
    memory = TileMemory(gemm, step, w.shape[0], x.device)
    for rows in tile_slices(kept_rows, x.shape[0], step):
        z = gemm.logits(x[rows], w, out=memory.logits(rows.stop - rows.start))
        gradient = memory.gradient(z)
        tile_lse = lse[rows.start - kept_rows : rows.stop - kept_rows]
        row_ops.row_logps_bwd(z, targets[rows], bias, logps[rows], tile_lse, transform=transform, out=gradient)
        yield rows, gradient


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, cu_scores, scale, softcap, temperature, _, *options, group, sizes = inputs
    logps, _, statistics, lse, kept = output
    ctx.save_for_backward(hidden, weight, bias, targets, logps, lse, kept, cu_scores)
    ctx.options, ctx.shards = (scale, softcap, temperature, *options), (group, sizes)
    ctx.mark_non_differentiable(statistics, lse, kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogps, dsums, *_):
    *tensors, cu_scores = ctx.saved_tensors
    gradients = [None] * 15
    if dsums is not None:
        spread = spread_over_rows(dsums, cu_scores, tensors[0].shape[0])
        dlogps = spread if dlogps is None else dlogps + spread
    if dlogps is not None:
        needs = ctx.needs_input_grad[:3]
        found = _linear_logps_bwd(dlogps, *tensors, *ctx.options, *needs, *ctx.shards)
        gradients[:3] = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return tuple(gradients)


_linear_logps.register_autograd(_backward, setup_context=_setup_context)


def spread_over_rows(
    values: Tensor,  # [S]
    cu_scores: Tensor,  # [S + 1]
    rows: int,
) -> Tensor:  # [N]
    """Returns every completion's value in each of its score rows, without asking the device for their number."""
    if not values.shape[0]:
        return values.new_zeros(rows)
    completion = torch.searchsorted(cu_scores[1:], torch.arange(rows, device=values.device), right=True)
    return values[completion.clamp_max(values.shape[0] - 1)]


def linear_logps(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None = None,  # [V]
    *,
    cu_scores: Tensor | None = None,  # int32 or int64 [S + 1]
    transform: LogitTransform = LogitTransform(),  # noqa: B008 (frozen)
    statistics: Collection[str] = (),
    budget_bytes: int = 2 * 2**30,
    backend: str = "auto",
    shards: VocabularyShards | None = None,
) -> RowLogps:
    """Returns the log-prob (nat) of every target under the LM head, differentiable in hidden, weight and bias.

    Products are taken in the inputs' dtype, or in autocast's where that is on; logits, log-sum-exp and sums in fp32
    (float64 for float64 inputs). Gradients come back in the dtype of what they belong to.

    Args:
        hidden: rows that predict a token, [N, H].
        weight: the LM head, [V, H], in hidden's dtype unless autocast is on.
        targets: int64 [N], in [0, V).
        bias: bias of the head, [V].
        cu_scores: where the rows of each completion begin and end, from 0 to N; also returns sums over completions.
        transform: scale, softcap and temperature of the logits.
        statistics: names of what to return besides, without gradient: any of `entropy`, `mean_logit`, `is_top1`,
            `log_sum_sq_probs`.
        budget_bytes: bound of a tile of logits (beyond at least 2048 rows), and of what is kept for the backward.
        backend: who does the work on rows of logits: "torch", "triton", or "fused" for a forward that is one kernel
            (the last two: CUDA only); a named one never falls back. "auto" takes "fused" for a bf16 or fp16 forward
            without gradient when `budget_bytes` is too small for a tile.
        shards: where the words of a vocabulary-parallel head lie; weight and bias are then this rank's part, or
            DTensors. Hidden, targets, options and what needs a gradient must be the same on all ranks; log-probs, sums,
            statistics and the gradient of hidden then are, to the bit.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; on a CPU also targets outside the vocabulary, and a
            `cu_scores` that does not end at N or holds an empty completion. The message names the argument. On a GPU
            such values come out as NaN: to look at them would wait for the device. NaN or inf in hidden is no error:
            log-probs of those rows are not finite, on any device.
    """
    weight, bias = local_head(weight, bias, shards)
    check_head(hidden, weight, targets, bias, budget_bytes)
    check_statistics(statistics)
    if cu_scores is not None:
        check_cu_scores(cu_scores, hidden.device)
    dtype = compute_dtype(hidden)
    needs_grad = torch.is_grad_enabled()
    head_trains = needs_grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    hidden_trains = needs_grad and hidden.requires_grad
    chosen = pick_backend(backend, hidden.dtype, hidden.device)
    if chosen == "fused" and shards is not None:
        raise ValueError("backend must be 'auto', 'torch' or 'triton' with shards: 'fused' keeps no logits to combine")
    small = chosen == "triton" and dtype != torch.float32 and shards is None
    if backend == "auto" and small and not (head_trains or hidden_trains):
        too_small = budget_bytes < MIN_ROWS * bytes_per_row(weight.shape[0], Gemm(dtype, hidden.device.type))
        chosen = "fused" if too_small else chosen
    keep = "nothing"
    if chosen != "fused":
        keep = "D" if head_trains else "U" if hidden_trains else "nothing"
    logps, sums, stacked, _, _ = _linear_logps(
        hidden,
        weight,
        bias,
        targets,
        cu_scores,
        transform.scale,
        transform.softcap,
        transform.temperature,
        ",".join(statistics),
        dtype,
        chosen,
        budget_bytes,
        keep,
        *(() if shards is None else shards.arguments),
    )
    return row_logps_of(logps, None if cu_scores is None else sums, stacked, statistics)


def row_logps_of(
    logps: Tensor,  # [N]
    sums: Tensor | None,  # [S]
    stacked: Tensor,  # [number of statistics, N], in the order of STATISTICS
    statistics: Collection[str],
) -> RowLogps:
    """Names what an op returned."""
    values = dict(zip((name for name in STATISTICS if name in statistics), stacked, strict=True))
    if "is_top1" in values:
        values["is_top1"] = values["is_top1"] > 0
    return RowLogps(logps, sums, **values)
