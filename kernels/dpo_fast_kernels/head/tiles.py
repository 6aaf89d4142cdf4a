"""Tiles of logits: how many rows they have, where they begin and end, and the memory that they pass through.

A tile is as many rows of logits as a budget of bytes holds. It is what bounds the memory of every strategy of the LM
head, and all strategies take the same tiles, so that equal weights give equal log-probs.  N score rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpo_fast_kernels.head.gemm import Gemm

ROW_MULTIPLE = (
    64  # elements: cuBLAS's fast products want rows that begin at multiples of 16 bytes, full cache lines best
)
MIN_ROWS = 2048  # below it the products are slower than the memory they save is worth
CPU_ROWS = 512  # on a CPU more rows are no faster
CPU_GROUP_ROWS = 1024  # where a tile holds whole groups: pairs of 512 tokens fit, small groups come together
_MULTIPLE = 128


def bytes_per_row(vocabulary: int, gemm: Gemm) -> int:
    """Bytes of a row of logits, and of its gradient where that cannot take the logits' place."""
    in_place = gemm.factor_dtype == gemm.sum_dtype
    return vocabulary * (gemm.sum_dtype.itemsize + (0 if in_place else gemm.factor_dtype.itemsize))


def tile_rows(rows: int, vocabulary: int, budget_bytes: int, gemm: Gemm) -> int:
    """Returns how many rows a tile has. It must not depend on what needs a gradient: equal tiles, equal log-probs."""
    if gemm.device_type == "cpu":
        return max(1, min(rows, CPU_ROWS))
    tile = max(MIN_ROWS, budget_bytes // bytes_per_row(vocabulary, gemm) // _MULTIPLE * _MULTIPLE)
    return max(1, min(rows, tile))


def group_tile_rows(rows: int, shape: tuple[int, int], budget_bytes: int, gemm: Gemm) -> tuple[int, int]:
    """Returns how many rows of whole groups a tile has, and the most rows of one group that have a tile of their own.

    A larger group is cut up, at the price of a [V, H] for each of its completions: a tile may take as much as that.

    Args:
        rows: all score rows.
        shape: of the weight, (V, H).
        budget_bytes: bound of a tile.
        gemm: how products are taken.
    """
    vocabulary, width = shape
    row = bytes_per_row(vocabulary, gemm)
    step = CPU_GROUP_ROWS if gemm.device_type == "cpu" else tile_rows(rows, vocabulary, budget_bytes, gemm)
    pair_of_weights = 2 * vocabulary * width * gemm.sum_dtype.itemsize
    return step, max(step, budget_bytes // row, pair_of_weights // row)


def tile_slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Yields slices of at most `step` rows; one empty slice where there are no rows."""
    for first in range(start, max(stop, start + 1), step):
        yield slice(first, min(first + step, stop))


def empty_rows(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns memory for logits or their gradient, [N, V], in rows that begin `ROW_MULTIPLE` elements apart or more."""
    stride = (vocabulary + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    return torch.empty_strided((rows, vocabulary), (stride, 1), dtype=dtype, device=device)


class TileMemory:
    """The memory that logits and their gradient D pass through, one tile at a time."""

    def __init__(self, gemm: Gemm, rows: int, vocabulary: int, device: torch.device):
        self._gemm, self._device = gemm, device
        self._shape = (rows, vocabulary)
        self._logits = self._factor = None

    def logits(self, rows: int, kept: Tensor | None = None) -> Tensor:
        """Returns memory for the logits of `rows` rows: that of the D to be kept where it can hold them."""
        dtype = self._gemm.sum_dtype
        if kept is not None and kept.dtype == dtype:
            return kept
        if self._logits is None:
            self._logits = empty_rows(*self._shape, dtype, self._device)
        return self._logits[:rows]

    def gradient(self, logits: Tensor) -> Tensor:
        """Returns memory for the D of `logits`: the logits' own where the products can read it."""
        dtype = self._gemm.factor_dtype
        if logits.dtype == dtype:
            return logits
        if self._factor is None:
            self._factor = empty_rows(*self._shape, dtype, self._device)
        return self._factor[: logits.shape[0]]
