"""The compiled sums of weights are PyTorch's, bit by bit: every dtype, size, stride, shard and number of threads."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.reference import lanes
from dpo_fast.reference.fingerprint import weights_fingerprint
from dpo_fast.reference.lanes import Piece, compiled_fold, fold, fold_all
from repository import ROOT

DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128),
    *(
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.int16,
        torch.int32,
        torch.int64,
    ),
]
SIZES = [0, 1, 2, 63, lanes.COLUMNS - 1, lanes.COLUMNS, 2 * lanes.COLUMNS + 507]
AROUND_BLOCKS = [2**20 - 1, 2**20, 2**20 + 1, 5 * 2**20 + 77]

needs_compiler = pytest.mark.skipif(
    not list((ROOT / "dpo_fast" / "reference").glob("_lanes.*")), reason="lanes.c was not compiled"
)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    count = int(np.prod(shape)) * dtype.itemsize
    bits = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, count, dtype=np.uint8)
    return torch.from_numpy(bits).view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


def whole(tensor: torch.Tensor) -> Piece:
    return Piece(tensor, [0] * tensor.ndim, tensor.shape)


def agree(pieces: list[Piece]) -> None:
    assert [sums.tolist() for sums in fold_all(pieces)] == [fold(*piece).tolist() for piece in pieces]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
def test_what_was_compiled_is_used():
    assert compiled_fold() is not None, "it is there and does not sum as the formula says"


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_size_and_number_of_threads(dtype, threads):
    pieces = [whole(random_bits((size,), dtype, seed)) for seed, size in enumerate(SIZES)]
    pieces += [whole(random_bits((), dtype)), whole(random_bits((3, 507, 5), dtype))]
    expected = [fold(*piece).tolist() for piece in pieces]
    for count in (1, 2, 3, 16):
        threads(count)
        assert [sums.tolist() for sums in fold_all(pieces)] == expected


@needs_compiler
def test_tensors_of_several_blocks_and_of_many_kinds_together():
    big = [whole(random_bits((size,), dtype)) for dtype in (torch.bfloat16, torch.int32) for size in AROUND_BLOCKS]
    small = [whole(random_bits((100 + seed,), DTYPES[seed % len(DTYPES)], seed)) for seed in range(60)]
    agree([*small[:30], *big, *small[30:]])


@needs_compiler
def test_more_weights_than_a_batch(monkeypatch):
    monkeypatch.setattr(lanes, "BATCH_BYTES", 10_000)
    agree([whole(random_bits((997,), torch.float32, seed)) for seed in range(30)])


@needs_compiler
def test_words_that_are_not_aligned():
    """As in a file that is mapped, whose header may end anywhere."""
    for dtype, shift in itertools.product((torch.bfloat16, torch.float32), (1, 3)):
        aligned = random_bits((3001,), dtype)
        memory = np.zeros(aligned.nbytes + 16, np.uint8)
        moved = memory[shift : shift + aligned.nbytes]
        moved[:] = aligned.view(torch.uint8).numpy()
        agree([whole(torch.frombuffer(memory, dtype=dtype, count=3001, offset=shift))])
        assert fold_all([whole(torch.frombuffer(memory, dtype=dtype, count=3001, offset=shift))])[0].tolist() == (
            fold(*whole(aligned)).tolist()
        )


@needs_compiler
@given(st.data())
def test_pieces_with_any_strides(data):
    """Of every rectangular sharding, blocks of 16 words, columns of 5: their borders are everywhere."""
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4), "shape"))
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    tensor = random_bits(shape, dtype)
    if data.draw(st.booleans(), "transposed"):
        tensor = tensor.permute(*range(tensor.ndim)[::-1])
    ends = [sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2), "cut")) for size in tensor.shape]
    local = tensor[tuple(slice(*end) for end in ends)]
    piece = Piece(
        local.clone() if data.draw(st.booleans(), "own") else local, [begin for begin, _ in ends], tensor.shape
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("BLOCK", 16), ("COLUMNS", 5), ("DEVICE_CHUNK", 12), ("CPU_CHUNK", 24)):
            patch.setattr(lanes, name, value)
        lanes.table.cache_clear()
        agree([piece, whole(tensor)])
    lanes.table.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_element_with_any_stride(dtype):
    tensor = random_bits((3, 4), dtype)
    piece = Piece(tensor[1:2, 2:3].as_strided((1,), (4,), 6), [0], [1])
    assert fold(*piece).tolist() == fold(*whole(piece.local.clone())).tolist()
    agree([piece])


@needs_compiler
def test_conjugated_and_negated_views_are_what_they_say():
    values = random_bits((40,), torch.complex64).nan_to_num()
    for view in (values.conj(), values.conj().imag):
        agree([whole(view)])
        assert fold(*whole(view)).tolist() == fold(*whole(view.resolve_conj().resolve_neg().clone())).tolist()


def wrong(*arguments: int) -> None:
    """Sums nothing, as a library of another version may."""


def test_a_library_that_sums_otherwise_is_not_used(monkeypatch, caplog):
    class Library:
        dpo_fast_fold = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 6)(wrong)

    monkeypatch.setattr(ctypes, "CDLL", lambda path: Library)
    compiled_fold.cache_clear()
    try:
        assert compiled_fold() is None
        assert "install dpo_fast again" in caplog.text
    finally:
        compiled_fold.cache_clear()


def test_without_a_compiler_pytorch_finds_the_same_fingerprint(monkeypatch, caplog):
    model = torch.nn.Sequential(torch.nn.Linear(63, 100), torch.nn.Linear(100, 7).bfloat16())
    caplog.set_level("INFO", "dpo_fast")
    expected = weights_fingerprint(model, True)
    assert "hashed 0.00 GB of weights in" in caplog.text
    monkeypatch.setattr(lanes, "compiled_fold", lambda: None)
    assert weights_fingerprint(model, True) == expected
