"""Rows that are read more than once, with a gradient that is summed in a fixed order.

    y[m] = x[index[m]]                  dx[t] = Σ_{m : index[m] = t} dy[m],   m ascending

A prompt's keys and values are read once by each of its K completions, and the hidden row of its last token predicts the
first token of every completion. `torch.index_select` sums such repeats with atomics on a GPU, in an order that changes
from run to run. Here the inverse of the index is made with the batch (for every row of x, the rows of y that it went
to), and each row of dx is one sum in fp32 (float64 for float64), in ascending order.

Bytes moved: forward 2·M·D·itemsize; backward (T + M)·D·itemsize.  T rows of x, M rows of y, D columns.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GatherPlan:
    """Which rows are read, in which order, and where each row of x went. R − 1 is the largest row that is read.

    Attributes:
        index: int64 [M], the row of x that becomes row m of y.
        uses: int64 [M], rows of y by the row of x they come from, ascending within it.
        use_offsets: int64 [R + 1], row t of x went to `uses[use_offsets[t] : use_offsets[t + 1]]`.
    """

    index: Tensor
    uses: Tensor
    use_offsets: Tensor

    @classmethod
    def build(cls, index: Sequence[int] | Tensor) -> GatherPlan:
        """Build the plan on the host from the row indices `index` [M], also a NumPy array; none of them negative."""
        index = torch.as_tensor(index, dtype=torch.int64)
        if index.ndim != 1 or (len(index) and index.min() < 0):
            lowest = int(index.min()) if index.numel() else "none"
            raise ValueError(
                f"index must be one row of non-negative numbers, got shape {tuple(index.shape)}, lowest {lowest}; "
                "count rows from 0"
            )
        offsets = torch.nn.functional.pad(index.bincount().cumsum(0), (1, 0))
        return cls(index, index.argsort(stable=True), offsets)

    def to(self, *args, **kwargs) -> GatherPlan:
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> GatherPlan:
        return self._map(Tensor.pin_memory)

    def _map(self, move) -> GatherPlan:
        return GatherPlan(move(self.index), move(self.uses), move(self.use_offsets))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def segment_sum(
    dy: Tensor,  # [M, ...]
    uses: Tensor,  # int64 [M]
    use_offsets: Tensor,  # int64 [R + 1]
    num_rows: int,  # T ≥ R
) -> Tensor:  # [T, ...]
    """Returns dx: row t is the sum of dy's rows that row t went to, 0 where it went nowhere."""
    if dy.is_cuda and _has_triton():
        from dpo_fast_kernels.gather.gather_rows_triton import segment_sum_triton

        return segment_sum_triton(dy, uses, use_offsets, num_rows)
    return segment_sum_torch(dy, uses, use_offsets, num_rows)


def segment_sum_torch(dy: Tensor, uses: Tensor, use_offsets: Tensor, num_rows: int) -> Tensor:
    """`segment_sum` in plain PyTorch: the first use of every row in one copy, then the others of the few that have any.

    Nearly every row has one use or none, so that dy is read and dx written about once. index_add_ would zero dx first
    and then read and write it once more, all of it in fp32.
    """
    if dy.shape[0] == 0:
        return dy.new_zeros((num_rows, *dy.shape[1:]))
    counts = torch.zeros(num_rows, dtype=torch.int64, device=dy.device)
    starts = torch.zeros_like(counts)
    counts[: use_offsets.numel() - 1] = use_offsets.diff()
    starts[: use_offsets.numel() - 1] = use_offsets[:-1].clamp(max=dy.shape[0] - 1)
    dx = dy.index_select(0, uses[starts])
    dx.index_fill_(0, (counts == 0).nonzero()[:, 0], 0)
    repeated = (counts > 1).nonzero()[:, 0]
    total = dx[repeated].to(torch.promote_types(dy.dtype, torch.float32))
    level, going = 1, torch.arange(repeated.numel(), device=dy.device)
    while going.numel():  # level k adds the k-th further use; each row occurs at most once in it
        rows = repeated[going]
        total[going] += dy[uses[starts[rows] + level]].to(total.dtype)
        level += 1
        going = going[counts[rows] > level]
    dx[repeated] = total.to(dx.dtype)
    return dx


@torch.library.custom_op("dpo_fast::gather_rows", mutates_args=())
def _gather_rows(x: Tensor, index: Tensor, uses: Tensor, use_offsets: Tensor) -> Tensor:
    return x.index_select(0, index)


@_gather_rows.register_fake
def _(x, index, uses, use_offsets):
    return x.new_empty((index.shape[0], *x.shape[1:]))


@torch.library.custom_op("dpo_fast::sum_gathered_rows", mutates_args=())
def _sum_gathered_rows(dy: Tensor, uses: Tensor, use_offsets: Tensor, num_rows: int) -> Tensor:
    return segment_sum(dy, uses, use_offsets, num_rows)


@_sum_gathered_rows.register_fake
def _(dy, uses, use_offsets, num_rows):
    return dy.new_empty((num_rows, *dy.shape[1:]))


def _setup_context(ctx, inputs, output):
    x, _, uses, use_offsets = inputs
    ctx.save_for_backward(uses, use_offsets)
    ctx.num_rows = x.shape[0]


def _backward(ctx, dy: Tensor):
    return _sum_gathered_rows(dy, *ctx.saved_tensors, ctx.num_rows), None, None, None


_gather_rows.register_autograd(_backward, setup_context=_setup_context)


def gather_rows(
    x: Tensor,  # [T, ...]
    plan: GatherPlan,  # M rows
) -> Tensor:  # [M, ...]
    """Returns `x[plan.index]`, differentiable once; the gradient of a repeated row is summed in ascending order of use.

    Raises:
        ValueError: the plan reads rows that x does not have, or lies on another device.
    """
    rows = plan.use_offsets.shape[0] - 1
    if x.ndim == 0 or x.shape[0] < rows:
        raise ValueError(f"x has shape {tuple(x.shape)} and plan reads row {rows - 1}: build the plan for these rows")
    if plan.index.device != x.device:
        raise ValueError(f"plan is on {plan.index.device} and x on {x.device}: move it with plan.to(x.device)")
    return _gather_rows(x, plan.index, plan.uses, plan.use_offsets)
