"""Rows that are read more than once, with a gradient that is summed in a fixed order.

    y[m] = x[index[m]]                  dx[t] = Σ_{m : index[m] = t} dy[m],   m ascending

A prompt's keys and values are read once by each of its K completions, and the hidden row of its last token predicts the
first token of every completion. `torch.index_select` sums such repeats with atomics on a GPU, in an order that changes
from run to run. Here the uses of a row are dealt into levels when the batch is built (level k holds the k-th use of
every row), so that each level writes every row at most once and the levels run one after another.

Bytes moved: forward 2·M·D·itemsize; backward (T + 2·M)·D·itemsize.  T rows of x, M rows of y, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class GatherPlan:
    """Which rows are read, in which order, and how often each.

    Attributes:
        index: int64 [M], the row of x that becomes row m of y.
        levels: for k = 0, 1, …, the pair (rows of x, rows of y), both int64, of the k-th use of every row.
    """

    index: Tensor
    levels: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def build(cls, index: np.ndarray) -> GatherPlan:
        """Builds the plan on the host from the int64 row indices `index` [M]."""
        uses = np.argsort(index, kind="stable")
        rows = index[uses]
        starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]]) if rows.size else np.empty(0, np.int64)
        counts = np.diff(np.r_[starts, rows.size])
        rank = np.arange(rows.size) - np.repeat(starts, counts)
        levels = tuple(
            (torch.from_numpy(rows[rank == k]), torch.from_numpy(uses[rank == k]))
            for k in range(int(counts.max(initial=0)))
        )
        return cls(torch.from_numpy(index), levels)

    def to(self, *args, **kwargs) -> GatherPlan:
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> GatherPlan:
        return self._map(Tensor.pin_memory)

    def _map(self, move) -> GatherPlan:
        return GatherPlan(move(self.index), tuple((move(rows), move(uses)) for rows, uses in self.levels))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, plan: GatherPlan) -> Tensor:
        ctx.plan, ctx.num_rows = plan, x.shape[0]
        return x.index_select(0, plan.index)

    @staticmethod
    def backward(ctx, dy: Tensor):
        dx = dy.new_zeros((ctx.num_rows, *dy.shape[1:]))
        for level, (rows, uses) in enumerate(ctx.plan.levels):
            part = dy.index_select(0, uses)
            dx.index_copy_(0, rows, part) if level == 0 else dx.index_add_(0, rows, part)
        return dx, None


def gather_rows(
    x: Tensor,  # [T, ...]
    plan: GatherPlan,  # M rows
) -> Tensor:  # [M, ...]
    """Returns `x[plan.index]`, differentiable; the gradient of a repeated row is summed in ascending order of use."""
    return _GatherRows.apply(x, plan)
