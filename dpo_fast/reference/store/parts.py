"""The parts of a reference store: immutable Parquet files, named after the hash of their bytes.

The name of the store stands in their metadata, so that no other store takes them for its own. Parts that were written
before lack it.

    key          16 bytes, hash of the prompt's and the completion's token ids as the model sees them
    num_tokens   int32, scored tokens
    logp         fp32, their summed log-prob, in nats
    token_logps  list of fp32

Rows are sorted by key.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_fast.reference.store.files import Folder, hexadecimal_hash, set_aside, write_bytes

ROWS_PER_RUN = 1 << 20
STORE = b"dpo_fast.store"  # key of the store's name in a part's metadata
MAX_BITS = 12
_FLOAT = pa.float32()
SCHEMA = pa.schema({"key": pa.binary(16), "num_tokens": pa.int32(), "logp": _FLOAT, "token_logps": pa.list_(_FLOAT)})
COLUMNS = {"key_high": "<u8", "key_low": "<u8", "logp": "<f4", "num_tokens": "<i4", "part": "<u4", "row": "<u4"}
RECORD = np.dtype([*COLUMNS.items()])


class Rows(NamedTuple):
    """Rows of an index, as columns."""

    key_high: np.ndarray  # uint64 [n]
    key_low: np.ndarray  # uint64 [n]
    logp: np.ndarray  # fp32 [n]
    num_tokens: np.ndarray  # int32 [n]
    part: np.ndarray  # uint32 [n]
    row: np.ndarray  # uint32 [n]

    @classmethod
    def zeros(cls, count: int) -> Rows:
        return cls(*(np.zeros(count, RECORD[name]) for name in cls._fields))

    @classmethod
    def concatenate(cls, pieces: Sequence[Rows]) -> Rows:
        return cls(*map(np.concatenate, zip(*pieces, strict=True))) if pieces else cls.zeros(0)

    def take(self, index: np.ndarray | slice) -> Rows:
        return Rows(*(column[index] for column in self))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Positions of keys, uint64 [n, 2], in sorted rows; -1 where they are not."""
        high, low = keys[:, 0], keys[:, 1]
        left, right = (np.searchsorted(self.key_high, high, side) for side in ("left", "right"))
        for i in np.flatnonzero(right - left > 1):  # of hashes, next to none share a half
            left[i] += np.searchsorted(self.key_low[left[i] : right[i]], low[i])
        found = left < right
        found[found] = self.key_low[left[found]] == low[found]
        return np.where(found, left, -1)

    def sorted_unique(self, rank: np.ndarray) -> Rows:
        """Sorted by key; of equal keys the row of the part with the lowest rank, then the first in that part."""
        order = np.argsort(self.key_high)
        high = self.key_high[order]
        if not (high[1:] == high[:-1]).any():
            return self.take(order)
        rows = self.take(np.lexsort((self.row, rank[self.part], self.key_low, self.key_high)))
        again = (rows.key_high[1:] == rows.key_high[:-1]) & (rows.key_low[1:] == rows.key_low[:-1])
        return rows.take(np.flatnonzero(np.concatenate([[True], ~again])))


class IndexedPart(NamedTuple):
    """A part as an index remembers it."""

    name: str
    size: int
    modified: float | None
    rows: int
    named: bool = True  # whether the store's name is in it


def by_precedence(parts: Sequence[IndexedPart]) -> list[IndexedPart]:
    """Sort parts in the order in which they are believed: those with the store's name first, then by file name."""
    return sorted(parts, key=lambda part: (not part.named, part.name))


def precedence(parts: Sequence[IndexedPart]) -> np.ndarray:
    """Place of every part in the order in which they are believed, uint32."""
    place = {part.name: number for number, part in enumerate(by_precedence(parts))}
    return np.array([place[part.name] for part in parts], np.uint32)


class SpilledRows:
    """Rows in any order and number, taken back by ranges of keys.

    Sorted runs of about a million rows lie one after another in a temporary file without a name (in memory while they
    are few), so that nothing is left behind when the process is killed.
    """

    def __init__(self, folder: Folder):
        self.num_rows = 0
        self._file = tempfile.SpooledTemporaryFile(2 * ROWS_PER_RUN * RECORD.itemsize, dir=folder.scratch)  # noqa: SIM115
        self._bounds: list[np.ndarray] = []
        self._waiting: list[Rows] = []
        self._waiting_rows = 0

    def add(self, rows: Rows) -> None:
        self._waiting.append(rows)
        self._waiting_rows += len(rows.row)
        self.num_rows += len(rows.row)
        if self._waiting_rows >= ROWS_PER_RUN:
            self._spill()

    def _spill(self) -> None:
        rows = Rows.concatenate(self._waiting)
        self._waiting, self._waiting_rows = [], 0
        rows = rows.take(np.argsort(rows.key_high))
        records = np.empty(len(rows.row), RECORD)
        for name, column in zip(Rows._fields, rows, strict=True):
            records[name] = column
        self._file.seek(0, os.SEEK_END)
        self._bounds.append(self._file.tell() // RECORD.itemsize + range_edges(rows.key_high, MAX_BITS))
        self._file.write(records.view(np.uint8).data)

    def range(self, bits: int, number: int) -> list[Rows]:
        """Rows whose keys' leading bits are a number, unsorted, run by run."""
        if self._waiting:
            self._spill()
        pieces = []
        for bounds in self._bounds:
            start, end = bounds[number << (MAX_BITS - bits)], bounds[(number + 1) << (MAX_BITS - bits)]
            self._file.seek(int(start) * RECORD.itemsize)
            records = np.frombuffer(self._file.read(int(end - start) * RECORD.itemsize), RECORD)
            pieces.append(Rows(*(records[name] for name in Rows._fields)))
        return pieces


def range_edges(high: np.ndarray, bits: int) -> np.ndarray:
    """Where in sorted high halves each range of leading bits begins, and the end: int64 [2^bits + 1]."""
    firsts = np.arange(1 << bits, dtype=np.uint64) << np.uint64(64 - bits) if bits else np.zeros(1, np.uint64)
    return np.append(np.searchsorted(high, firsts), len(high))


def sequence_logp(token_logps: np.ndarray) -> np.float32:
    """Sum of token log-probs, in float64, rounded once."""
    return np.float32(token_logps.sum(dtype=np.float64))


def part_name(data: bytes) -> str:
    return f"part-{hexadecimal_hash(data)}.parquet"


def write_part(folder: Folder, keys: np.ndarray, token_logps: Sequence[np.ndarray]) -> tuple[IndexedPart, Rows]:
    """Writes a part of keys, uint64 [n, 2], and returns it with its rows, sorted by key."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys, token_logps = keys[order], [token_logps[i] for i in order]
    num_tokens = np.array([len(values) for values in token_logps], np.int32)
    logps = np.array([sequence_logp(values) for values in token_logps], np.float32)
    offsets = np.append(np.int32(0), np.cumsum(num_tokens, dtype=np.int32))
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), [None, pa.py_buffer(keys.astype(">u8"))]),
        arrow(num_tokens),
        arrow(logps),
        pa.ListArray.from_arrays(arrow(offsets), arrow(np.concatenate(token_logps))),
    ]
    table = pa.Table.from_arrays(columns, schema=SCHEMA)
    return write_table(folder, table), part_rows(table, 0)


def write_table(folder: Folder, table: pa.Table) -> IndexedPart:
    """Write a part with the name of its store."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({STORE: folder.name}), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    name = write_bytes(folder, part_name(data), data)
    return IndexedPart(name, *folder.stat(name), table.num_rows)


class Refused(Exception):
    """Why a part is not served."""


def load_part(folder: Folder, name: str, columns: Sequence[str]) -> pa.Table:
    """Columns of a part, its bytes verified.

    Raises:
        Refused: it is damaged, or of another store.
        FileNotFoundError: it is gone.
    """
    data = folder.read(name)
    if part_name(data) != name:
        raise Refused("does not match its checksum")
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        table = file.read(columns=[*columns], use_threads=False).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise Refused(f"cannot be read as Parquet ({error})") from error
    store = (file.schema_arrow.metadata or {}).get(STORE, folder.name.encode()).decode(errors="replace")
    if store != folder.name:
        raise Refused(f"belongs to another store, {store}")
    if not file.schema_arrow.equals(SCHEMA):
        raise Refused(f"has other columns ({', '.join(file.schema_arrow.names)})")
    if any(column.null_count for column in table.columns):
        raise Refused("has rows without a value")
    return table


def is_named(table: pa.Table) -> bool:
    """Whether the store's name was in the part that a table is of."""
    return STORE in (table.schema.metadata or {})


def read_part(
    folder: Folder, name: str, columns: Sequence[str], refused: dict[str, str] | None = None
) -> pa.Table | None:
    """Columns of a part, its bytes verified; None for one that is gone, or is not to be served.

    What is not to be served is set aside, or noted in `refused` with the reason, where that is given.
    """
    try:
        return load_part(folder, name, columns)
    except FileNotFoundError:
        return None
    except Refused as reason:
        if refused is None:
            set_aside(folder, {name: str(reason)})
        else:
            refused[name] = str(reason)
        return None


def column_values(column: pa.Array, dtype: Any) -> np.ndarray:
    """An Arrow column as it lies in memory. `to_numpy` imports pandas, which takes longer than to open a store."""
    return np.frombuffer(column.buffers()[1] or b"", dtype)[column.offset : column.offset + len(column)]


def arrow(values: np.ndarray) -> pa.Array:
    buffer = pa.py_buffer(np.ascontiguousarray(values))  # as `to_numpy`, `pa.array` would import pandas
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])


def part_rows(table: pa.Table, number: int) -> Rows:
    keys = part_keys(table)
    logp, num_tokens = (column_values(table[name].combine_chunks(), COLUMNS[name]) for name in ("logp", "num_tokens"))
    part = np.full(len(keys), number, np.uint32)
    return Rows(keys[:, 0], keys[:, 1], logp, num_tokens, part, np.arange(len(keys), dtype=np.uint32))


def part_keys(table: pa.Table) -> np.ndarray:
    return column_values(table["key"].combine_chunks(), ">u8, >u8").view(">u8").reshape(-1, 2).astype(np.uint64)
