"""The index of a reference store: every completion's log-prob by key, and where its token log-probs lie.

The index says what every completion's log-prob is and where its token
log-probs lie. It is a file `index-<checksum>.arrow` beside the parts, derived from them and never the truth: Arrow IPC,
not compressed, so that it is mapped and not read. 32 bytes a row, sorted by key, every key once:

    key_high, key_low  uint64, the key's halves as big-endian numbers
    logp               fp32, summed log-prob in nats
    num_tokens         int32
    part, row          uint32, number in the list of parts and row in that part

Record batch i holds the keys whose leading `bits` bits are i. Keys are hashes, so batches are of nearly equal size,
about a million rows at most, and any set of rows is merged batch by batch in bounded memory and linear time. The
schema's metadata holds version, bits, the store's name and, of each part, name, size, modification time, rows and
whether the store's name is in it. The same parts give the same bytes, and the name is a checksum of these (XXH3, 128
bits) that is verified when an index is opened.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

from dpo_fast.errors import InputError
from dpo_fast.reference.store.files import File, Folder, discard, is_index
from dpo_fast.reference.store.parts import (
    COLUMNS,
    MAX_BITS,
    RECORD,
    IndexedPart,
    Rows,
    SpilledRows,
    arrow,
    by_precedence,
    column_values,
    precedence,
    range_edges,
)

logger = logging.getLogger(__name__)

INDEX_VERSION = 2
ROWS_PER_BATCH = 1 << 20
_METADATA = b"dpo_fast"


class OtherVersion(InputError):
    """An index is of another version."""


class Index:
    """An index file, mapped. A reader keeps what it has mapped when the file is removed.

    Attributes:
        name: of the file.
        parts: that it covers, in the order in which they are believed, which numbers them.
        num_rows: different keys.

    Raises:
        ValueError: its bytes do not match its name, or it is of another version or store.
        FileNotFoundError: another process has removed it.
    """

    def __init__(self, folder: Folder, name: str):
        self.name = name
        path = folder.path(name)
        if not folder.local:
            self._copy = tempfile.NamedTemporaryFile(prefix="dpo_fast-")  # noqa: SIM115
            folder.fs.get_file(path, self._copy.name)
            path = self._copy.name
        if f"index-{_checksum(path)}.arrow" != name:
            raise InputError("does not match its checksum")
        reader = pa.ipc.open_file(pa.memory_map(path))
        metadata = json.loads(reader.schema.metadata[_METADATA])
        if metadata["version"] != INDEX_VERSION:
            raise OtherVersion(f"is of version {metadata['version']}, not {INDEX_VERSION}")
        if metadata["store"] != folder.name:
            raise InputError(f"is of another store, {metadata['store']}")
        self.parts, self._bits = [IndexedPart(*part) for part in metadata["parts"]], metadata["bits"]
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._batches = [Rows(*map(column_values, batch.columns, COLUMNS.values())) for batch in batches]
        self.num_rows = sum(len(batch.row) for batch in self._batches)

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, Rows]:
        """Which keys, uint64 [n, 2], it holds: bool [n], and their rows, zeros for the others."""
        found, rows = np.zeros(len(keys), bool), Rows.zeros(len(keys))
        order = np.argsort(keys[:, 0])
        edges = range_edges(keys[order, 0], self._bits)
        for number in np.flatnonzero(np.diff(edges)):
            here = order[edges[number] : edges[number + 1]]
            position = self._batches[number].find(keys[here])
            here, position = here[position >= 0], position[position >= 0]
            found[here] = True
            for column, source in zip(rows, self._batches[number], strict=True):
                column[here] = source[position]
        return found, rows

    def range(self, bits: int, number: int) -> Rows:
        """Its rows whose keys' leading bits are a number; at least as many bits as the index has."""
        batch = self._batches[number >> (bits - self._bits)]
        if bits == self._bits:
            return batch
        first, last = np.uint64(number << (64 - bits)), np.uint64(((number + 1) << (64 - bits)) - 1)
        end = np.searchsorted(batch.key_high, last, "right")
        return batch.take(slice(np.searchsorted(batch.key_high, first), end))


def _checksum(path: str) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(1 << 22))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def open_index(folder: Folder, name: str, reasons: dict[str, str] | None = None) -> Index | None:
    """None for an index that is damaged or of another version or store: it is removed, for it can be made again.

    Args:
        reasons: where to note what is wrong with it, unless it is the version alone.
    """
    try:
        return Index(folder, name)
    except ValueError as error:
        logger.warning("%s %s: removed, the next run makes it anew", folder.path(name), error)
        if reasons is not None and not isinstance(error, OtherVersion):
            reasons[name] = str(error)
        discard(folder, name)
        return None


def write_index(folder: Folder, parts: Sequence[IndexedPart], old: Index | None, runs: SpilledRows) -> str:
    """Writes the index of an old index's rows and of others, and returns its file's name.

    Args:
        parts: all that it covers; their places number them in `runs`, and those of `old` come first, in its order.
        old: an index of some of them.
        runs: the rows of the others.
    """
    rank = precedence(parts)
    # Rows with repeats, so that the ranges depend on the set of parts and not on the order in which they were merged.
    bits = min(MAX_BITS, (max(sum(part.rows for part in parts) - 1, 0) // ROWS_PER_BATCH).bit_length())
    of_store = {"version": INDEX_VERSION, "store": folder.name}
    metadata = json.dumps({**of_store, "bits": bits, "parts": by_precedence(parts)})
    fields = [pa.field(name, pa.from_numpy_dtype(RECORD[name]), nullable=False) for name in Rows._fields]
    schema = pa.schema(fields, metadata={_METADATA: metadata.encode()})

    def fill(file: BinaryIO) -> str:
        with pa.ipc.new_file(file, schema) as writer:
            for number in range(1 << bits):
                pieces = ([old.range(bits, number)] if old else []) + runs.range(bits, number)
                rows = Rows.concatenate(pieces).sorted_unique(rank)
                rows = rows._replace(part=rank[rows.part])
                writer.write_batch(pa.record_batch([*map(arrow, rows)], schema=schema))
        file.flush()
        return f"index-{_checksum(file.name)}.arrow"

    return folder.write(fill)


def best_index(folder: Folder, files: dict[str, File] | None = None) -> Index | None:
    """The index that covers most parts, none of them gone, or else the newest; those that it covers are removed.

    Args:
        files: what a recent listing of the folder says.
    """
    indices = []
    files = folder.list() if files is None else files
    for name in sorted(filter(is_index, files), key=lambda name: (files[name].modified or 0.0, name)):
        try:
            index = open_index(folder, name)
        except FileNotFoundError:  # a writer has replaced it by one that covers more
            return best_index(folder)
        if index is None:
            continue
        present = folder.list().keys()  # listed last: parts are older than their index
        gone = {part.name for part in index.parts} - present
        if gone:
            report_gone(folder, gone)
            discard(folder, name)
        else:
            indices.append(index)
    best = max(reversed(indices), key=lambda index: len(index.parts), default=None)
    for index in indices:
        if index is not best and {part.name for part in index.parts} <= {part.name for part in best.parts}:
            discard(folder, index.name)
    return best


def report_gone(folder: Folder, names: set[str]) -> None:
    message = "%s: %d parts are gone (%s, …), rows that only they had are recomputed"
    logger.warning(message, folder.url, len(names), min(names))
