"""Hidden rows × LM head → preference loss, with its gradients made in the forward.

    ℓ_s = Σ_{n in s} logp_n        c_s = ∂loss/∂ℓ_s        g_n = slope·c_s, n a row of completion s
    dX = g ⊙ (D·W)        dW = Dᵀ·(g ⊙ X)        db = Dᵀ·g        D = ∂logp/∂y, see `linear_logps`

The coefficient c is one number a completion, and a loss that compares completions of one group knows it as soon as
the group's rows are summed. So a tile holds whole groups, and while it is at hand: logits → log-probs and D in their
place → sums → loss → c → dX, dW. Each tile is made once: 6·NHV FLOP with dX and dW, 4·NHV with dX alone (frozen head),
where a loss outside the op has to make logits a second time (8·NHV) or keep D [N, V].

A group larger than a tile is taken completion by completion: U = D·W and DᵀX are made before c is known and scaled
after, for the same FLOP and one [V, H] a completion.

Memory beyond the inputs: one tile, dX and dW, which are kept in the dtypes that they are returned in (fp16's in fp32).
dW is fp32 while several tiles add to it. The backward multiplies both by ∂/∂loss, in place unless the graph is kept.
N score rows, S completions, G groups, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast_kernels.head.arguments import check_head, check_values, compute_dtype, pick_backend, row_operations
from dpo_fast_kernels.head.gemm import Gemm
from dpo_fast_kernels.head.gradients import HeadGradients, gradient_dtype
from dpo_fast_kernels.head.linear_logps import linear_logps, row_logps_of, spread_over_rows
from dpo_fast_kernels.head.logits import STATISTICS, LogitTransform, RowLogps, check_statistics, empty_statistics
from dpo_fast_kernels.head.score_layout import GroupTile, ScoreLayout, group_tiles
from dpo_fast_kernels.head.sequence_loss import COUPLED, SequenceLoss, same_gradients
from dpo_fast_kernels.head.tiles import TileMemory, group_tile_rows, tile_slices
from dpo_fast_kernels.head.vocab_parallel import VocabularyShards, local_head


class PreferenceLoss(NamedTuple):
    """What `linear_preference_loss` returns.

    Attributes:
        loss: scalar, differentiable in hidden, weight and bias.
        rows: log-probs, their sums over completions and statistics, all without gradient.
    """

    loss: Tensor
    rows: RowLogps


class _Head:
    """One pass over the tiles: logits → log-probs, sums and D, while a tile is at hand."""

    def __init__(self, x, w, bias, targets, cu_scores, gemm, row_ops, transform, statistics, summed):
        self.x, self.w, self.gemm = x, w, gemm
        self._bias, self._targets, self._cu_scores, self._transform = bias, targets, cu_scores, transform
        self._row_ops = row_ops
        self.logps = x.new_empty(x.shape[0], dtype=gemm.sum_dtype)
        self.sums = self.logps.new_zeros(cu_scores.shape[0] - 1)  # finite, where a tile is yet to come
        self.statistics = empty_statistics(statistics.split(","), self.logps)
        self.statistic_sums = {name: torch.zeros_like(self.sums) for name in summed}

    def score(self, rows: slice, memory: TileMemory) -> Tensor:
        """Fills in log-probs and statistics of some rows; returns their D."""
        z = self.gemm.logits(self.x[rows], self.w, out=memory.logits(rows.stop - rows.start))
        d = memory.gradient(z)
        statistics = {name: values[rows] for name, values in self.statistics.items()}
        self.logps[rows] = self._row_ops.row_logps_fwd_bwd(
            z, self._targets[rows], self._bias, transform=self._transform, statistics=statistics, out=d
        )
        return d

    def sum_up(self, tile: GroupTile) -> None:
        """Sums what the loss takes, over the completions of a tile whose rows are all scored."""
        offsets = self._offsets(tile)
        self.sums[tile.completions] = self._row_ops.sequence_sums(self.logps[tile.rows], offsets)
        for name, sums in self.statistic_sums.items():
            sums[tile.completions] = self._row_ops.sequence_sums(self.statistics[name][tile.rows], offsets)

    def spread(self, values: Tensor, tile: GroupTile) -> Tensor:
        """Returns every completion's value in each of its rows."""
        return spread_over_rows(values, self._offsets(tile), tile.rows.stop - tile.rows.start)

    def _offsets(self, tile: GroupTile) -> Tensor:
        return self._cu_scores[tile.completions.start : tile.completions.stop + 1] - tile.rows.start


@torch.library.custom_op("dpo_fast::linear_preference_loss", mutates_args=())
def _linear_preference_loss(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [N]
    cu_scores: Tensor,  # int64 [S + 1]
    host_cu_scores: Tensor,  # int64 [S + 1], on the host
    cu_groups: Tensor,  # int64 [G + 1], on the host
    loss_inputs: Sequence[Tensor],
    loss: int,  # handle of a SequenceLoss
    scale: float,
    softcap: float | None,
    temperature: float,
    statistics: str,  # names, separated by commas
    dtype: torch.dtype,  # that products are taken in
    backend: str,  # "torch" or "triton"
    budget_bytes: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    group: str | None = None,  # of ranks that share the vocabulary
    sizes: Sequence[int] | None = None,  # of their shards
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # loss, log-probs, their sums, statistics, and dX, dW, db: empty where not needed
    with torch.autocast(hidden.device.type, enabled=False):
        if int(host_cu_scores[-1]) != hidden.shape[0]:
            raise ValueError(f"layout must have hidden's {hidden.shape[0]} rows, got {int(host_cu_scores[-1])}")
        shards = VocabularyShards.named(group, sizes, weight)
        check_values(hidden, targets, cu_scores, shards.vocabulary)
        gemm, transform = Gemm(dtype, hidden.device.type), LogitTransform(scale, softcap, temperature)
        x, w = gemm.factor(hidden), gemm.factor(weight)
        sequence_loss = SequenceLoss.of(loss)
        summed = sequence_loss.statistics
        row_ops = shards.row_operations(row_operations(backend))
        head = _Head(x, w, bias, targets, cu_scores, gemm, row_ops, transform, statistics, summed)
        inputs = (*head.statistic_sums.values(), *loss_inputs)
        needs = (needs_hidden, needs_weight, needs_bias)
        gradients = HeadGradients(x, w, gemm, _gradient_dtypes(hidden, weight, bias, shards, needs))
        step, most = group_tile_rows(x.shape[0], (shards.largest, w.shape[1]), budget_bytes, gemm)
        tiles = list(group_tiles(host_cu_scores, cu_groups, step, most))
        value, whole = sequence_loss.value_and_gradient(head.sums, inputs) if not tiles else (None, None)
        used = torch.zeros_like(head.sums)  # ∂loss/∂sums, as the tiles took it

        def coefficients(tile: GroupTile) -> Tensor:
            nonlocal value, whole  # the last tile's are those of all groups
            head.sum_up(tile)
            value, whole = sequence_loss.value_and_gradient(head.sums, inputs)
            used[tile.completions] = whole[tile.completions]
            return used[tile.completions] * transform.slope

        most_rows = max((step if tile.split else tile.rows.stop - tile.rows.start for tile in tiles), default=0)
        memory = TileMemory(gemm, most_rows, w.shape[0], x.device)
        for tile in tiles:
            if tile.split:
                _add_split_group(tile, host_cu_scores, step, head, memory, gradients, coefficients)
            else:
                _add_groups(tile, head, memory, gradients, coefficients)
        del memory  # before dW is rounded

        if needs_hidden:
            shards.add_up_(gradients.hidden)
        apart = sequence_loss.leaves_groups_apart(head.sums, inputs, whole, cu_groups)
        if len(tiles) > 1:
            same = same_gradients(used, whole).all()
            apart = same if apart is None else apart & same
        if apart is not None:
            value = _checked(value, apart)
        values = list(head.statistics.values())
        return (
            value,
            head.logps,
            head.sums,
            torch.stack(values) if values else head.logps.new_empty((0, x.shape[0])),
            gradients.hidden if needs_hidden else head.logps.new_empty(0),
            gradients.weight() if needs_weight else head.logps.new_empty(0),
            gradients.bias() if needs_bias else head.logps.new_empty(0),
        )


def _gradient_dtypes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shards: VocabularyShards, needs: Sequence[bool]
) -> list[torch.dtype | None]:
    """Returns what dX, dW and db are kept in for the backward; None where not needed."""
    dtypes = (shards.part_dtype(hidden.dtype), weight.dtype, weight.dtype if bias is None else bias.dtype)
    return [gradient_dtype(dtype) if need else None for dtype, need in zip(dtypes, needs, strict=True)]


def _add_groups(
    tile: GroupTile,
    head: _Head,
    memory: TileMemory,
    gradients: HeadGradients,
    coefficients: Callable[[GroupTile], Tensor],
) -> None:
    """Adds a tile of whole groups."""
    d = head.score(tile.rows, memory)
    gradients.add(tile.rows, d, head.spread(coefficients(tile), tile))


def _add_split_group(
    tile: GroupTile,
    host_cu_scores: Tensor,
    step: int,
    head: _Head,
    memory: TileMemory,
    gradients: HeadGradients,
    coefficients: Callable[[GroupTile], Tensor],
) -> None:
    """Adds a group larger than a tile: every completion unscaled first, then with its coefficient."""
    bounds = host_cu_scores[tile.completions.start : tile.completions.stop + 1].tolist()
    completions = [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
    parts = [gradients.unscaled(rows.stop - rows.start) for rows in completions]
    for completion, part in zip(completions, parts, strict=True):
        for rows in tile_slices(completion.start, completion.stop, step):
            gradients.add_unscaled(part, rows, completion.start, head.score(rows, memory))
    for completion, part, g in zip(completions, parts, coefficients(tile), strict=True):
        gradients.add_scaled(part, completion, g)


def _checked(value: Tensor, apart: Tensor) -> Tensor:
    """Returns the loss if it leaves groups apart: else it is an error, or NaN on a GPU."""
    if value.device.type == "cpu" and not apart:
        raise ValueError(f"loss: {COUPLED}")
    return torch.where(apart, value, torch.nan)


@_linear_preference_loss.register_fake
def _(
    hidden, weight, bias, targets, cu_scores, host_cu_scores, cu_groups, loss_inputs, loss, scale, softcap, temperature,
    statistics, dtype, backend, budget_bytes, needs_hidden, needs_weight, needs_bias,
    group=None, sizes=None,
):  # fmt: skip
    gemm, shards = Gemm(dtype, hidden.device.type), VocabularyShards.named(group, sizes, weight)
    logps = hidden.new_empty(hidden.shape[0], dtype=gemm.sum_dtype)
    count = sum(name in STATISTICS for name in statistics.split(","))
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = _gradient_dtypes(hidden, weight, bias, shards, (needs_hidden, needs_weight, needs_bias))
    return (
        logps.new_empty(()),
        logps,
        logps.new_empty(cu_scores.shape[0] - 1),
        logps.new_empty((count, hidden.shape[0])),
        *(
            logps.new_empty(shape, dtype=dtype) if dtype else logps.new_empty(0)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ),
    )


def _setup_context(ctx, inputs, output):
    _, *others, dhidden, dweight, dbias = output
    ctx.save_for_backward(dhidden, dweight, dbias)
    ctx.loss_inputs = len(inputs[7])
    ctx.others = 11 if inputs[-2] is None else 13  # a group that is left out is no input
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.mark_non_differentiable(*others, dhidden, dweight, dbias)
    ctx.set_materialize_grads(False)  # of dX and dW: zeros of their size


def _backward(ctx, dloss, *_):
    graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph()  # it has no public name

    def scaled(gradient: Tensor, dtype: torch.dtype) -> Tensor:
        is_traced = type(gradient) is not Tensor  # a compiler finds the place itself
        in_place = gradient.dtype == dtype and not (graph_is_kept or is_traced)
        return torch.mul(gradient, dloss, out=gradient if in_place else torch.empty_like(gradient, dtype=dtype))

    gradients = (
        scaled(gradient, dtype) if needs and dloss is not None else None
        for gradient, dtype, needs in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    )
    return *gradients, *(None,) * 4, [None] * ctx.loss_inputs, *(None,) * ctx.others


_linear_preference_loss.register_autograd(_backward, setup_context=_setup_context)


def linear_preference_loss(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # int64 [N]
    layout: ScoreLayout,
    loss: SequenceLoss | Callable[..., Tensor],
    loss_inputs: Sequence[Tensor] = (),
    bias: Tensor | None = None,  # [V]
    *,
    transform: LogitTransform = LogitTransform(),  # noqa: B008 (frozen)
    statistics: Collection[str] = (),
    budget_bytes: int = 2 * 2**30,
    backend: str = "auto",
    shards: VocabularyShards | None = None,
) -> PreferenceLoss:
    """Returns a loss of sequence log-probs under the LM head, differentiable in hidden, weight and bias.

    Products are taken in the inputs' dtype, or in autocast's where that is on; logits, log-sum-exp, sums, loss and dW
    in fp32 (float64 for float64 inputs). Gradients come back in the dtype of what they belong to.

    Args:
        hidden: rows that predict a token, [N, H], completion after completion, group after group.
        weight: the LM head, [V, H], in hidden's dtype unless autocast is on.
        targets: int64 [N], in [0, V).
        layout: where completions and groups lie among the rows.
        loss: `(sequence log-probs fp32 [S], *loss_inputs) → scalar`. The gradient of a completion may depend on
            completions of its own group only: it is taken before other groups are scored, when theirs read 0. The
            first batch of several groups shows whether it does, at the price of two more calls of the loss. A
            `SequenceLoss` is asked once; it may also take sums of statistics. In a compiled step it must be one, made
            outside.
        loss_inputs: tensors that the loss takes besides, such as reference log-probs; they get no gradient.
        bias: bias of the head, [V].
        transform: scale, softcap and temperature of the logits.
        statistics: names of what to return besides, as in `linear_logps`.
        budget_bytes: bound of a tile of logits, beyond at least 2048 rows and the largest group.
        backend: who does the work on rows of logits: "torch", "triton" (CUDA only, never falls back), or "auto".
        shards: where the words of a vocabulary-parallel head lie, as in `linear_logps`.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; the loss is no scalar, or couples groups, whatever
            the batch's size; on a CPU also targets outside the vocabulary. The message names the argument. On a GPU
            such values, and a loss that is found to couple groups, come out as a loss of NaN, as does NaN in hidden on
            any device.
    """
    weight, bias = local_head(weight, bias, shards)
    check_head(hidden, weight, targets, bias, budget_bytes)
    check_statistics(statistics)
    if layout.cu_scores.device != hidden.device:
        raise ValueError(f"layout must be on hidden's device {hidden.device}, got {layout.cu_scores.device}")
    if any(tensor.requires_grad for tensor in loss_inputs):
        raise ValueError("loss_inputs must not require a gradient; detach them, or take linear_logps and your own loss")
    if backend == "fused":
        raise ValueError("backend must be 'auto', 'torch' or 'triton': 'fused' keeps no logits to make gradients of")
    loss = loss if isinstance(loss, SequenceLoss) else SequenceLoss(loss)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    statistics = tuple(name for name in STATISTICS if name in statistics or name in loss.statistics)
    if not any(needs):
        options = {"transform": transform, "statistics": statistics, "budget_bytes": budget_bytes, "backend": backend}
        options["shards"] = shards
        rows = linear_logps(hidden, weight, targets, bias, cu_scores=layout.cu_scores, **options)
        sums = (
            torch.segment_reduce(getattr(rows, name).float(), "sum", offsets=layout.cu_scores, unsafe=True)
            for name in loss.statistics
        )
        return PreferenceLoss(loss(rows.sequence_logps, *sums, *loss_inputs), rows)
    value, logps, sums, stacked, *_ = _linear_preference_loss(
        hidden,
        weight,
        bias,
        targets,
        layout.cu_scores,
        layout.host_cu_scores,
        layout.cu_groups,
        list(loss_inputs),
        loss.handle,
        transform.scale,
        transform.softcap,
        transform.temperature,
        ",".join(statistics),
        compute_dtype(hidden),
        pick_backend(backend, hidden.dtype, hidden.device),
        budget_bytes,
        *needs,
        *(() if shards is None else shards.arguments),
    )
    return PreferenceLoss(value, row_logps_of(logps, sums, stacked, statistics))
