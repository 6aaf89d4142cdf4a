"""The gradients of the LM head while tiles add to them.

    dX = g ⊙ (D·W)        dW = Dᵀ·(g ⊙ X)        db = Dᵀ·g

D holds no coefficient: rounded to bf16, a factor that all targets share would bias every gradient alike. The factor g
goes to the fp32 product and to the rows of X instead, whose roundings are as good as random.
N score rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast_kernels.head.gemm import Gemm


@dataclass
class UnscaledGradients:
    """What rows of one completion add before their common coefficient is known: U = D·W, DᵀX and Dᵀ1."""

    hidden: Tensor | None  # [rows, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V, 1]


class HeadGradients:
    """dX, dW and db of a head, as far as they are needed; None where not.

    Args:
        x: hidden rows in the compute dtype, [N, H].
        w: the head's weight in the compute dtype, [V, H].
        gemm: how products are taken.
        needs: whether hidden, weight and bias need a gradient.
        hidden_dtype: of dX; fp16's is kept in fp32, whose range it may leave before the loss is scaled.
    """

    def __init__(self, x: Tensor, w: Tensor, gemm: Gemm, needs: tuple[bool, bool, bool], hidden_dtype: torch.dtype):
        self._x, self._w, self._gemm = x, w, gemm
        dtype = gemm.sum_dtype if hidden_dtype == torch.float16 else hidden_dtype
        self.hidden = x.new_empty(x.shape, dtype=dtype) if needs[0] else None
        self.weight = gemm.zeros(w.shape, x.device) if needs[1] else None
        self.bias = gemm.zeros((w.shape[0], 1), x.device) if needs[2] else None

    def add(self, rows: slice, d: Tensor, g: Tensor) -> None:
        """Adds a tile whose coefficients g [rows] are known."""
        if self.hidden is not None:
            self.hidden[rows] = self._gemm.product(d, self._w).to(g.dtype).mul_(g[:, None])
        factor, unit = self._gemm.in_range(g)
        if self.weight is not None:
            self._accumulate(self.weight, d, (self._x[rows] * factor[:, None]).to(self._x.dtype), unit)
        if self.bias is not None:
            self._accumulate(self.bias, d, factor[:, None].to(self._x.dtype), unit)

    def _accumulate(self, total: Tensor, d: Tensor, rows: Tensor, unit: Tensor | None) -> None:
        if unit is None:
            self._gemm.accumulate(total, d, rows)
        else:
            total.addcmul_(self._gemm.product(d.t(), rows), unit)

    def unscaled(self, rows: int) -> UnscaledGradients:
        """Returns memory for a completion of so many rows."""
        return UnscaledGradients(
            None if self.hidden is None else self._x.new_empty((rows, self._x.shape[1]), dtype=self._gemm.sum_dtype),
            None if self.weight is None else torch.zeros_like(self.weight),
            None if self.bias is None else torch.zeros_like(self.bias),
        )

    def add_unscaled(self, part: UnscaledGradients, rows: slice, start: int, d: Tensor) -> None:
        """Adds rows of the completion that begins at row `start` to its part."""
        if part.hidden is not None:
            part.hidden[rows.start - start : rows.stop - start] = self._gemm.product(d, self._w)
        if part.weight is not None:
            self._gemm.accumulate(part.weight, d, self._x[rows])
        if part.bias is not None:
            self._gemm.accumulate(part.bias, d, self._x.new_ones((d.shape[0], 1)))

    def add_scaled(self, part: UnscaledGradients, rows: slice, g: Tensor) -> None:
        """Adds a completion's part now that its coefficient g, a scalar tensor, is known."""
        if part.hidden is not None:
            self.hidden[rows] = part.hidden.mul_(g)
        if part.weight is not None:
            self.weight.addcmul_(part.weight, g)
        if part.bias is not None:
            self.bias.addcmul_(part.bias, g)
