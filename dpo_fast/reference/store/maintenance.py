"""Looking after reference stores: what there is, whether it is whole, removing and exporting it."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_fast.errors import InputError
from dpo_fast.reference.store.files import (
    DAY,
    DESCRIPTION,
    File,
    Folder,
    hexadecimal_hash,
    is_aside,
    is_index,
    is_ours,
    is_part,
    is_stale,
    set_aside,
)
from dpo_fast.reference.store.index import open_index
from dpo_fast.reference.store.parts import MAX_BITS, SCHEMA, part_keys, range_edges, read_part

EXPORT_BYTES = 1 << 26  # of parts, for each range of keys that is sorted in memory


@dataclass(frozen=True)
class Verification:
    """What reading a store completely has shown.

    Attributes:
        parts, rows, bytes: of the parts that are whole.
        damaged: files that were damaged. Parts and the description were set aside, an index was removed.
        missing: files that ought to be there.
        foreign: files that are not the store's.
    """

    parts: int
    rows: int
    bytes: int
    damaged: tuple[str, ...]
    missing: tuple[str, ...]
    foreign: tuple[str, ...]


def verify(folder: str | os.PathLike[str]) -> Verification:
    """Reads everything in a store's folder; what is damaged is set aside, and recomputed by the next run."""
    files = Folder(folder)
    listed = files.list()
    damaged, missing, sizes, rows = [], {DESCRIPTION} - listed.keys(), [], 0
    for name in sorted(listed):
        if is_part(name):
            table = read_part(files, name, SCHEMA.names)
            if table is None:
                damaged.append(name)
            else:
                sizes.append(listed[name].size)
                rows += table.num_rows
        elif is_index(name):
            index = open_index(files, name)
            damaged += [] if index else [name]
            missing |= {part.name for part in index.parts} - listed.keys() if index else set()
        elif name == DESCRIPTION and hexadecimal_hash(files.read(name)) != files.name:
            set_aside(files, name, "does not match its folder's name", "the next run writes it anew")
            damaged.append(name)
    foreign = (name for name in sorted(listed) if not is_ours(name))
    return Verification(len(sizes), rows, sum(sizes), tuple(damaged), tuple(sorted(missing)), tuple(foreign))


def _stores(root: str | os.PathLike[str]) -> Iterator[Folder]:
    url = os.fspath(root).removesuffix("/")
    for name in sorted(Folder(root).list(folders=True)):
        if re.fullmatch("[0-9a-f]{32}", name):
            yield Folder(f"{url}/{name}")


@dataclass(frozen=True)
class StoreInfo:
    """One store under a root.

    Attributes:
        parts, rows, bytes: of its parts; a completion that two writers have computed counts twice.
        modified: when it was last opened or added to, to a day, in seconds since 1970.
    """

    folder: str
    description: dict[str, Any]
    parts: int
    rows: int
    bytes: int
    modified: float | None


def info(root: str | os.PathLike[str]) -> list[StoreInfo]:
    """What stores there are under a root, from the ends of their files."""
    stores = []
    for files in _stores(root):
        listed = files.list()
        parts = [name for name in listed if is_part(name)]
        rows, size = sum(_num_rows(files, name) for name in parts), sum(listed[name].size for name in parts)
        description = {}
        with suppress(FileNotFoundError, ValueError):
            description = json.loads(files.read(DESCRIPTION))
        stores.append(StoreInfo(files.url, description, len(parts), rows, size, _newest(listed)))
    return stores


def _num_rows(folder: Folder, name: str) -> int:
    try:
        with folder.fs.open(folder.path(name), "rb") as file:
            return pq.read_metadata(file).num_rows
    except (OSError, pa.ArrowException):
        return 0


def _newest(files: Mapping[str, File]) -> float | None:
    times = [file.modified for file in files.values()]
    return None if None in times else max(times, default=None)


def prune(root: str | os.PathLike[str], older_than_days: float, dry_run: bool = False) -> tuple[list[str], int]:
    """Removes stores that were not opened for some days, and from the others what was set aside or never finished.

    Returns:
        what was removed (with `dry_run`, what would be), and its bytes.
    """
    if not older_than_days >= 0:
        raise InputError(f"older_than_days: {older_than_days}, give a number of days from 0 on")
    removed, size = [], 0
    for files in _stores(root):
        listed = files.list()
        newest = _newest(listed)
        old = newest is not None and time.time() - newest > older_than_days * DAY
        names = [
            name for name in sorted(listed) if is_ours(name) and (old or is_aside(name) or is_stale(name, listed[name]))
        ]
        if not dry_run:
            for name in names:
                files.remove(name)
            if len(names) == len(listed):
                with suppress(OSError):  # a writer has come back
                    files.fs.rmdir(files.path(""))
        removed += [files.path(name) for name in names]
        size += sum(listed[name].size for name in names)
    return removed, size


def export(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Writes all rows of a store's folder to one Parquet or JSON lines file, by its suffix, sorted by key (as hex)."""
    parent, _, name = os.fspath(path).rpartition("/")
    schema = SCHEMA.set(0, pa.field("key", pa.string()))

    def fill_parquet(file: BinaryIO) -> str:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for table in _sorted_tables(Folder(folder), schema):
                writer.write_table(table)
        return name

    def fill_json_lines(file: BinaryIO) -> str:
        for table in _sorted_tables(Folder(folder), schema):
            file.writelines(json.dumps(row).encode() + b"\n" for row in table.to_pylist())
        return name

    fill = {".parquet": fill_parquet, ".jsonl": fill_json_lines}.get(os.path.splitext(name)[1])
    if fill is None:
        raise InputError(f"path: {os.fspath(path)!r}, give a name that ends in .parquet or .jsonl")
    Folder(parent or ".").write(fill)


def _sorted_tables(folder: Folder, schema: pa.Schema) -> Iterator[pa.Table]:
    """All rows, keys as hex: parts are cut into ranges of keys in a temporary file, then each range is sorted."""
    files = folder.list()
    names = sorted(filter(is_part, files))
    bits = min(MAX_BITS, (sum(files[name].size for name in names) // EXPORT_BYTES).bit_length())
    pieces: list[list[tuple[int, int]]] = [[] for _ in range(1 << bits)]
    with tempfile.TemporaryFile(dir=folder.path("") if folder.local else None) as file:
        for name in names:
            table = read_part(folder, name, SCHEMA.names)
            if table is None:
                continue
            keys = part_keys(table)
            order = np.lexsort((keys[:, 1], keys[:, 0]))
            edges = range_edges(keys[order, 0], bits)
            for number in np.flatnonzero(np.diff(edges)):
                cut = table.take(order[edges[number] : edges[number + 1]]).combine_chunks()
                piece = cut.to_batches()[0].serialize()
                pieces[number].append((file.tell(), piece.size))
                file.write(piece)
        for places in pieces:
            batches = []
            for start, size in places:
                file.seek(start)
                batches.append(pa.ipc.read_record_batch(pa.py_buffer(file.read(size)), SCHEMA))
            table = pa.Table.from_batches(batches, SCHEMA).combine_chunks()
            keys = part_keys(table)
            order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal keys the first part's comes first
            first = np.append(True, (np.diff(keys[order], axis=0) != 0).any(1))[: len(order)]
            table = table.take(order[first])
            names = [key.hex() for key in table["key"].to_pylist()]
            yield table.set_column(0, schema.field("key"), pa.array(names, pa.string()))
