"""Sums over the raw bits of tensors: the same on every device, and those of a tensor's pieces add up to the tensor's.

Bits are read as words v of at most 32 bits. A lane is the sum

    Σ_i v_i · k(i)  mod 2^64,    k(i) = t(i mod 2^20) · m(i div 2^20),    t, m odd and pseudo-random (splitmix64),

over the words' positions i in the whole tensor; there are two lanes with numbers of their own. Sums do not care for
order, so they are the same however a tensor is cut, sharded and shared out among threads.

When do two tensors collide? An odd k is invertible, so a change of any one word changes both lanes. Changes d_1, d_2, …
of several words have to cancel in Σ d·k. As |d| < 2^32 while sums have 64 bits, even the worst (sign bits: d = ±2^31)
leaves 32 random bits of Σ ±k: a chance of 2^-32 in a lane, which the factors m may raise to 2^-27, so at most 2^-54 in
both; changed low bits leave more. This guards against mistakes: who knows the numbers can construct a collision.

`fold` is the specification, and what accelerators run. `fold_all` sums many tensors. Those in the host's memory are
read once, by all threads, with the loops of `lanes.c` where it was compiled.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LANES = 2
BLOCK = 2**20  # entries of the table
# Words a step: temporaries are 16 bytes a word, a core's cache on the CPU and 64 MiB elsewhere.
CPU_CHUNK, DEVICE_CHUNK = 2**16, 2**22
COLUMNS = 2**14  # of the table that a thread of `lanes.c` keeps in its cache
BATCH_BYTES = 2**28  # of weights that are gone through column by column, so that a file that is mapped is read in order


class Piece(NamedTuple):
    """A rectangular piece of a tensor.

    Attributes:
        local: the piece, of any dtype and strides.
        offsets: where it begins in the whole tensor, an index a dimension.
        global_shape: of the whole tensor.
    """

    local: Tensor
    offsets: Sequence[int]
    global_shape: Sequence[int]


def _odd_numbers(first: int, count: int) -> np.ndarray:
    """Outputs first … first + count − 1 of splitmix64 with seed 0, made odd; int64 [count]."""
    z = (np.arange(count, dtype=np.uint64) + np.uint64(first + 1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)


@functools.cache
def table(device: torch.device) -> Tensor:  # [LANES, BLOCK]
    return torch.from_numpy(_odd_numbers(0, LANES * BLOCK)).view(LANES, BLOCK).to(device)


def _multipliers(first: int, last: int, device: torch.device) -> Tensor:  # [LANES, last − first + 1]
    """The factors m of blocks first … last; their numbers follow those of the table."""
    numbers = _odd_numbers(LANES * (BLOCK + first), LANES * (last - first + 1))
    return torch.from_numpy(numbers).view(-1, LANES).T.to(device)


def _runs(piece: Piece, most: int) -> Iterator[tuple[Tensor, np.ndarray]]:
    """The words of a piece, [rows · n], and the position of each row's first one, int64 [rows].

    Args:
        most: words of a copy, which a piece whose words do not lie in order needs.
    """
    local, offsets, global_shape = piece
    local = local.detach().resolve_conj().resolve_neg()
    if local.numel() == 0:
        return
    if not local.is_contiguous() and local.numel() > most:
        split = next(dim for dim, size in enumerate(local.shape) if size > 1)
        half = local.shape[split] // 2
        after = [offset + half * (dim == split) for dim, offset in enumerate(offsets)]
        first, second = local.tensor_split([half], split)
        yield from _runs(Piece(first, offsets, global_shape), most)
        yield from _runs(Piece(second, after, global_shape), most)
        return
    line = local.contiguous().as_strided((local.numel(),), (1,))  # of one element, any stride is contiguous
    words = line.view({1: torch.uint8, 2: torch.int16}.get(local.itemsize, torch.int32))
    per_element = words.numel() // local.numel()
    shape, whole = [*local.shape, per_element], [*global_shape, per_element]
    strides = [math.prod(whole[dim + 1 :]) for dim in range(len(whole))]
    starts = np.array([sum(offset * stride for offset, stride in zip(offsets, strides, strict=False))])
    # The piece is rows of consecutive words: it spans the dimensions after `split` entirely.
    split = max((dim for dim, size in enumerate(shape) if size != whole[dim]), default=0)
    for size, stride in zip(shape[:split], strides, strict=False):
        starts = (starts[:, None] + stride * np.arange(size)).reshape(-1)
    yield words, starts


# ---- PyTorch ----


def fold(local: Tensor, offsets: Sequence[int], global_shape: Sequence[int]) -> Tensor:
    """The lanes of a piece, int64 [LANES] on its device; all pieces' add up to the whole's."""
    chunk = CPU_CHUNK if local.device.type == "cpu" else DEVICE_CHUNK
    sums = torch.zeros(LANES, dtype=torch.int64, device=local.device)
    for words, starts in _runs(Piece(local, offsets, global_shape), chunk):
        sums += _fold_row(words, int(starts[0]), chunk) if len(starts) == 1 else _fold_rows(words, starts, chunk)
    return sums


def _fold_row(
    words: Tensor,  # [n], consecutive
    start: int,
    chunk: int,
) -> Tensor:
    numbers, block = table(words.device), start // BLOCK
    multipliers = _multipliers(block, (start + words.numel() - 1) // BLOCK, words.device)
    sums = torch.zeros(LANES, dtype=torch.int64, device=words.device)
    position, end = start, start + words.numel()
    while position < end:
        column = position % BLOCK
        count = min(end - position, BLOCK - column, chunk)
        rows = 1
        if count == BLOCK:
            rows = min(end - position, chunk) // BLOCK
        values = words[position - start :][: rows * count].view(rows, count).to(torch.int64)
        row = position // BLOCK - block
        for lane in range(LANES):
            row_sums = (values * numbers[lane, column : column + count]).sum(1)
            sums[lane] += (row_sums * multipliers[lane, row : row + rows]).sum()
        position += rows * count
    return sums


def _fold_rows(
    words: Tensor,  # [rows · n]
    first_positions: np.ndarray,  # [rows]
    chunk: int,
) -> Tensor:
    numbers, block = table(words.device), int(first_positions[0]) // BLOCK
    length = words.numel() // len(first_positions)
    multipliers = _multipliers(block, (int(first_positions[-1]) + length - 1) // BLOCK, words.device)
    starts = torch.from_numpy(first_positions).to(words.device)
    sums = torch.zeros(LANES, dtype=torch.int64, device=words.device)
    chunk = max(chunk // 4, 1)  # there are more temporaries: positions and keys
    for begin in range(0, words.numel(), chunk):
        values = words[begin : begin + chunk].to(torch.int64)
        index = torch.arange(begin, begin + values.numel(), device=words.device)
        positions = starts[index // length] + index % length
        column, row = positions % BLOCK, positions // BLOCK - block
        for lane in range(LANES):
            sums[lane] += (values * numbers[lane, column] * multipliers[lane, row]).sum()
    return sums


# ---- compiled ----


def fold_all(pieces: Sequence[Piece]) -> list[Tensor]:
    """The lanes of many pieces, as `fold` has them."""
    compiled = compiled_fold()
    on_host = [number for number, piece in enumerate(pieces) if piece.local.device.type == "cpu" and compiled]
    sums = dict(zip(on_host, _fold_on_host([pieces[number] for number in on_host]), strict=True))
    return [sums[number] if number in sums else fold(*piece) for number, piece in enumerate(pieces)]


def _fold_on_host(pieces: Sequence[Piece]) -> Tensor:  # [pieces, LANES]
    sums = np.zeros((len(pieces), LANES), np.int64)
    kept: list[Tensor] = []  # what spans point to
    spans: list[np.ndarray] = []
    size = 0
    for number, piece in enumerate(pieces):
        for words, starts in _runs(piece, DEVICE_CHUNK):
            kept.append(words)
            spans.append(_spans(words, starts, number))
            size += words.nbytes
            if size > BATCH_BYTES:
                sums += _fold_spans(np.concatenate(spans), len(pieces))
                kept, spans, size = [], [], 0
    return torch.from_numpy(sums + _fold_spans(np.concatenate(spans), len(pieces)) if spans else sums)


def _spans(words: Tensor, starts: np.ndarray, number: int) -> np.ndarray:  # int64 [rows, 5], as in `lanes.c`
    length = words.numel() // len(starts)
    spans = np.empty((len(starts), 5), np.int64)
    spans[:, 0] = words.data_ptr() + np.arange(len(starts)) * length * words.itemsize
    spans[:, 1], spans[:, 2], spans[:, 3], spans[:, 4] = words.itemsize, starts, length, number
    return spans


def _fold_spans(spans: np.ndarray, num_sums: int) -> np.ndarray:  # int64 [num_sums, LANES]
    begins, ends = spans[:, 2], spans[:, 2] + spans[:, 3]
    within = begins // BLOCK == (ends - 1) // BLOCK
    columns = int(np.where(within, (ends - 1) % BLOCK + 1, BLOCK).max())

    def run(first: int) -> np.ndarray:
        sums = np.zeros((num_sums, LANES), np.int64)
        compiled_fold()(spans.ctypes.data, len(spans), BLOCK, first, min(first + COLUMNS, columns), sums.ctypes.data)
        return sums

    firsts = range(0, columns, COLUMNS)
    threads = min(torch.get_num_threads(), len(firsts))
    if threads == 1:
        return sum(map(run, firsts))
    with ThreadPoolExecutor(threads, thread_name_prefix="dpo_fast-hash") as executor:
        return sum(executor.map(run, firsts))


@functools.cache
def compiled_fold() -> Callable[[int, int, int, int, int, int], None] | None:
    """Load what was compiled of `lanes.c`; return None where it was not, or does not sum as the formula says."""
    for path in (Path(__file__).with_name(f"_lanes{suffix}") for suffix in EXTENSION_SUFFIXES):
        try:
            function = ctypes.CDLL(str(path)).dpo_fast_fold  # ctypes lets other threads run meanwhile
        except (OSError, AttributeError):
            continue
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        function.argtypes, function.restype = (pointer, number, number, number, number, pointer), None
        if all(_agrees(function, np.dtype(word)) for word in ("u1", "i2", "i4")):
            return function
        logger.warning("%s does not compute what lanes.py says: it is not used; install dpo_fast again", path)
    return None


def _agrees(function: Callable[[int, int, int, int, int, int], None], word: np.dtype) -> bool:
    """Whether it finds the formula's sums of some words, over several blocks of eight."""
    block, start, count = 8, 5, 93
    words = _odd_numbers(7, count).astype(word)  # their low bits
    positions = np.arange(start, start + count)
    t = _odd_numbers(0, LANES * block).reshape(LANES, block)[:, positions % block]
    m = _odd_numbers(LANES * block, LANES * (positions[-1] // block + 1)).reshape(-1, LANES).T[:, positions // block]
    spans = np.array([[words.ctypes.data, word.itemsize, start, count, 0]])
    sums = np.zeros((1, LANES), np.int64)
    for first in (0, 5):
        function(spans.ctypes.data, 1, block, first, 5 if first == 0 else block, sums.ctypes.data)
    return sums[0].tolist() == (words.astype(np.int64) * t * m).sum(1).tolist()
