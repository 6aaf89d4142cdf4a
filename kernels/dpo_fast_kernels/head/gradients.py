"""The gradients of the LM head while tiles add to them.

    dX = g ⊙ (D·W)        dW = Dᵀ·(g ⊙ X)        db = Dᵀ·g

D holds no coefficient: rounded to bf16, a factor that all targets share would bias every gradient alike. The factor g
goes to the fp32 product and to the rows of X instead, whose roundings are as good as random. dW and db are summed in
fp32: the first product is written where the others are added, and one product that is all of dW comes rounded.
N score rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast_kernels.head.gemm import Gemm


@dataclass
class UnscaledGradients:
    """What rows of one completion add before their common coefficient is known: U = D·W, DᵀX and Dᵀ1."""

    hidden: Tensor | None  # [rows, H]
    weight: Tensor | None = None  # [V, H]
    bias: Tensor | None = None  # [V, 1]


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns what a gradient is kept in until the loss is scaled: fp16's in fp32, whose range it may need."""
    return torch.float32 if dtype == torch.float16 else dtype


class HeadGradients:
    """dX, dW and db of a head, as far as they are needed.

    Args:
        x: hidden rows in the compute dtype, [N, H].
        w: the head's weight in the compute dtype, [V, H].
        gemm: how products are taken.
        dtypes: what dX, dW and db come in; None where there is no need of one.
    """

    def __init__(self, x: Tensor, w: Tensor, gemm: Gemm, dtypes: Sequence[torch.dtype | None]):
        self._x, self._w, self._gemm = x, w, gemm
        self._hidden_dtype, self._weight_dtype, self._bias_dtype = dtypes
        self.hidden = x.new_empty(x.shape, dtype=self._hidden_dtype) if self._hidden_dtype else None
        self._weight = self._bias = None  # until the first product

    def add(self, rows: slice, d: Tensor, g: Tensor) -> None:
        """Adds a tile whose coefficients g [rows] are known."""
        if self.hidden is not None:
            self.hidden[rows] = self._gemm.product(d, self._w).to(g.dtype).mul_(g[:, None])
        factor, unit = self._gemm.in_range(g)
        if self._weight_dtype:
            scaled = (self._x[rows] * factor[:, None]).to(self._x.dtype)
            is_all = d.shape[0] == self._x.shape[0] and self._weight_dtype == self._x.dtype
            self._weight = self._added(self._weight, d, scaled, unit, is_all)
        if self._bias_dtype:
            self._bias = self._added(self._bias, d, factor[:, None].to(self._x.dtype), unit)

    def _added(
        self, total: Tensor | None, d: Tensor, rows: Tensor, unit: Tensor | None, is_all: bool = False
    ) -> Tensor:
        if unit is None:
            return self._gemm.added(total, d, rows, is_all=is_all)
        return _add_scaled(total, self._gemm.product(d.t(), rows), unit)

    def unscaled(self, rows: int) -> UnscaledGradients:
        """Returns the part of a completion of so many rows, to which none has been added."""
        shape = (rows, self._x.shape[1])
        return UnscaledGradients(self._x.new_empty(shape, dtype=self._gemm.sum_dtype) if self._hidden_dtype else None)

    def add_unscaled(self, part: UnscaledGradients, rows: slice, start: int, d: Tensor) -> None:
        """Adds rows of the completion that begins at row `start` to its part."""
        if part.hidden is not None:
            part.hidden[rows.start - start : rows.stop - start] = self._gemm.product(d, self._w)
        if self._weight_dtype:
            part.weight = self._gemm.added(part.weight, d, self._x[rows])
        if self._bias_dtype:
            part.bias = self._gemm.added(part.bias, d, self._x.new_ones((d.shape[0], 1)))

    def add_scaled(self, part: UnscaledGradients, rows: slice, g: Tensor) -> None:
        """Adds a completion's part now that its coefficient g, a scalar tensor, is known."""
        if part.hidden is not None:
            self.hidden[rows] = part.hidden.mul_(g)
        if part.weight is not None:
            self._weight = _add_scaled(self._weight, part.weight, g)
        if part.bias is not None:
            self._bias = _add_scaled(self._bias, part.bias, g)

    def weight(self) -> Tensor | None:
        """Returns dW, [V, H]."""
        return self._finished(self._weight, self._weight_dtype, self._w.shape[1])

    def bias(self) -> Tensor | None:
        """Returns db, [V]."""
        total = self._finished(self._bias, self._bias_dtype, 1)
        return None if total is None else total[:, 0]

    def _finished(self, total: Tensor | None, dtype: torch.dtype | None, columns: int) -> Tensor | None:
        if total is None and dtype:  # of no rows
            return self._x.new_zeros((self._w.shape[0], columns), dtype=dtype)
        return None if total is None else total.to(dtype)


def _add_scaled(total: Tensor | None, part: Tensor, factor: Tensor) -> Tensor:
    """Returns total + factor·part, in the memory of the total or, where there is none yet, of the part."""
    return part.mul_(factor) if total is None else total.addcmul_(part, factor)
