"""The products of the LM head, with their sums in fp32 whatever the dtype of the factors.

    logits(x, w) = x·wᵀ in fp32        product(a, b) = a·b        accumulate(acc, d, x) = acc + dᵀ·x in fp32

float64 factors give float64. On CUDA the library hands over its fp32 accumulator. A CPU has no such call: there, bf16
factors are cast to fp32 in blocks that stay in the cache, and for the length of one product oneDNN is told that it may
round fp32 factors to bf16. These lose nothing by it, so the result is the fp32 product at a third of its time; on a CPU
without bf16 units it is the fp32 product as it is. fp16 factors are held in fp32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

_CPU_BLOCK = 1 << 22  # elements that are cast at a time: 16 MiB of fp32, few enough blocks for threads to keep pace


@dataclass(frozen=True)
class Gemm:
    """Products in one compute dtype on one kind of device.

    Attributes:
        dtype: compute dtype, that the factors are rounded to.
        device_type: "cuda", "cpu", …
    """

    dtype: torch.dtype
    device_type: str

    @property
    def factor_dtype(self) -> torch.dtype:
        """What the factors of a product are held in."""
        return torch.float32 if self.dtype == torch.float16 and self.device_type != "cuda" else self.dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def factor(self, tensor: Tensor) -> Tensor:
        """Returns `tensor` rounded to the compute dtype and held as the products take it."""
        return tensor.to(self.dtype).to(self.factor_dtype)

    def logits(
        self,
        x: Tensor,  # [N, H]
        w: Tensor,  # [V, H]
        out: Tensor,  # [N, V]
    ) -> Tensor:
        if self.factor_dtype == self.sum_dtype:
            return torch.mm(x, w.t(), out=out)
        if self.device_type == "cuda":
            return torch.mm(x, w.t(), out_dtype=self.sum_dtype, out=out)
        x = x.to(self.sum_dtype)
        with _bf16_factors():
            for columns in _column_blocks(w.shape[0], rows=w.shape[1]):
                torch.mm(x, w[columns].to(self.sum_dtype).t(), out=out[:, columns])
        return out

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns a·b, in fp32 on CUDA and in the factors' dtype on a CPU."""
        if self.device_type == "cuda" and self.factor_dtype != self.sum_dtype:
            return torch.mm(a, b, out_dtype=self.sum_dtype)  # a long sum may be split, and its parts not be rounded
        return torch.mm(a, b)

    def accumulate(
        self,
        acc: Tensor,  # [V, H], in fp32; in the factors' dtype where one product is all of the sum
        d: Tensor,  # [N, V]
        x: Tensor,  # [N, H]
        *,
        first: bool = False,
    ) -> None:
        """Adds dᵀ·x to `acc` in place; the first product of a sum is written instead, to memory that is not read."""
        beta = 0 if first else 1
        if self.factor_dtype == acc.dtype:
            acc.addmm_(d.t(), x, beta=beta)
        elif self.device_type == "cuda" and first:
            torch.mm(d.t(), x, out_dtype=self.sum_dtype, out=acc)
        elif self.device_type == "cuda":
            torch.addmm(acc, d.t(), x, out_dtype=self.sum_dtype, out=acc)
        else:
            x = x.to(self.sum_dtype)
            with _bf16_factors():
                for columns in _column_blocks(d.shape[1], rows=d.shape[0]):
                    acc[columns].addmm_(d[:, columns].to(self.sum_dtype).t(), x, beta=beta)

    def added(self, total: Tensor | None, d: Tensor, x: Tensor, *, is_all: bool = False) -> Tensor:
        """Returns total + dᵀ·x, in the memory of the total; None is 0.

        Args:
            total: fp32 [V, H].
            d, x: the factors, [N, V] and [N, H].
            is_all: whether nothing else is added, so that the product may come in the factors' dtype.
        """
        first = total is None
        if total is None:
            dtype = self.factor_dtype if is_all else self.sum_dtype
            total = x.new_empty((d.shape[1], x.shape[1]), dtype=dtype)
        self.accumulate(total, d, x, first=first)
        return total

    def in_range(self, coefficient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Splits row coefficients into factor · unit, so that fp16 rows scaled by them neither vanish nor overflow.

        The unit is None where factors have fp32's range.
        """
        if self.factor_dtype != torch.float16 or coefficient.numel() == 0:
            return coefficient, None
        unit = coefficient.abs().amax().clamp_min(torch.finfo(coefficient.dtype).tiny)
        return coefficient / unit, unit


def _column_blocks(columns: int, rows: int) -> Iterator[slice]:
    step = max(1, _CPU_BLOCK // max(1, rows))
    return (slice(start, start + step) for start in range(0, columns, step))


@contextmanager
def _bf16_factors() -> Iterator[None]:
    """Lets oneDNN round the fp32 factors of a product to bf16. The setting is the process's, and is put back."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
