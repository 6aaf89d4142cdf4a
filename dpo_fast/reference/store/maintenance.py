"""Looking after reference stores: what there is, whether it is whole, removing and exporting it."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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
    PRUNING,
    File,
    Folder,
    hexadecimal_hash,
    is_aside,
    is_description,
    is_index,
    is_ours,
    is_part,
    is_stale,
    set_aside,
)
from dpo_fast.reference.store.index import open_index
from dpo_fast.reference.store.lease import in_use, remove_expired, remove_unless_in_use
from dpo_fast.reference.store.parts import MAX_BITS, SCHEMA, is_named, part_keys, range_edges, read_part

logger = logging.getLogger(__name__)

EXPORT_BYTES = 1 << 26  # of parts, for each range of keys that is sorted in memory


@dataclass(frozen=True)
class Verification:
    """What reading a store completely has shown.

    Attributes:
        parts, rows, bytes: of the parts that are whole.
        damaged: files that were damaged, or of another store. Parts and the description were set aside, an index was
            removed.
        missing: files that ought to be there.
        foreign: files that are not the store's.
        reasons: of each damaged file, what is wrong with it, and why it could not be set aside where that failed.
        unnamed: parts without the store's name, from before it was written into them; a run checks them.
    """

    parts: int
    rows: int
    bytes: int
    damaged: tuple[str, ...]
    missing: tuple[str, ...]
    foreign: tuple[str, ...]
    reasons: Mapping[str, str]
    unnamed: tuple[str, ...]


def verify(folder: str | os.PathLike[str]) -> Verification:
    """Reads everything in a store's folder; what is damaged is set aside, and recomputed by the next run."""
    files = Folder(folder)
    listed = files.list()
    missing, sizes, rows, unnamed = {DESCRIPTION} - listed.keys(), {}, {}, set()
    parts: dict[str, str] = {}  # that are not to be served, and why
    others: dict[str, str] = {}
    for name in sorted(listed):
        if is_part(name):
            table = read_part(files, name, SCHEMA.names, parts)
            if table is not None:
                sizes[name], rows[name] = listed[name].size, table.num_rows
                unnamed |= set() if is_named(table) else {name}
        elif is_index(name):
            index = open_index(files, name, others)
            missing |= {part.name for part in index.parts} - listed.keys() if index else set()
    kept = {}
    if DESCRIPTION in listed and hexadecimal_hash(data := files.read(DESCRIPTION)) != files.name:
        others[DESCRIPTION] = "does not match its folder's name"
        if is_description(data):
            parts |= dict.fromkeys(unnamed, "has no store's name, and came with the description of another store")
        kept = set_aside(files, {DESCRIPTION: others[DESCRIPTION]}, "the next run writes it anew")
    kept |= set_aside(files, parts)
    for name in parts:
        sizes.pop(name, None), rows.pop(name, None), unnamed.discard(name)
    reasons = {name: f"{reason}, and cannot be set aside: {kept[name]}" if name in kept else reason
             for name, reason in sorted({**parts, **others}.items())}  # fmt: skip
    foreign = tuple(name for name in sorted(listed) if not is_ours(name))
    return Verification(
        len(sizes), sum(rows.values()), sum(sizes.values()), tuple(reasons), tuple(sorted(missing)), foreign, reasons,
        tuple(sorted(unnamed)),
    )  # fmt: skip


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


def stores_in_use(root: str | os.PathLike[str]) -> list[str]:
    """Return the folders of stores that somebody uses, or did in the last hours without closing them."""
    return [files.url for files in _stores(root) if in_use(files)]


def prune(root: str | os.PathLike[str], older_than_days: float, dry_run: bool = False) -> tuple[list[str], int]:
    """Removes stores that were not opened for some days, and from the others what was set aside or never finished.

    A store that is in use is left alone, whatever its age.

    Returns:
        what was removed (with `dry_run`, what would be), and its bytes.
    """
    if not older_than_days >= 0:
        raise InputError(f"older_than_days: {older_than_days}, give a number of days from 0 on")
    removed, size = [], 0
    for files in _stores(root):
        if in_use(files):
            logger.info("%s is in use and left alone", files.url)
            continue
        listed = files.list()
        newest = _newest(listed)
        old = newest is not None and time.time() - newest > older_than_days * DAY
        names = [name for name, file in sorted(listed.items()) if _may_go(name, file, old)]
        if not dry_run:
            names = remove_unless_in_use(files, names)
            if len(names) == len(listed):
                with suppress(OSError):  # a writer has come back
                    files.fs.rmdir(files.path(""))
        removed += [files.path(name) for name in names]
        size += sum(listed[name].size for name in names)
    if not dry_run:
        remove_expired(Folder(root))
    return removed, size


def _may_go(name: str, file: File, old: bool) -> bool:
    """Whether a prune removes a file of a store that nobody uses, and that is old or not."""
    if is_stale(name, file) or is_aside(name):
        return True
    return old and is_ours(name) and not name.startswith(PRUNING)  # the mark of another prune


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


def _by_precedence(folder: Folder, names: Sequence[str]) -> Iterator[pa.Table]:
    """Yield parts, those without the store's name last."""
    unnamed = []
    for name in names:
        table = read_part(folder, name, SCHEMA.names)
        if table is not None and is_named(table):
            yield table
        elif table is not None:
            unnamed.append(name)
    for name in unnamed:
        table = read_part(folder, name, SCHEMA.names)
        if table is not None:
            yield table


def _sorted_tables(folder: Folder, schema: pa.Schema) -> Iterator[pa.Table]:
    """All rows, keys as hex: parts are cut into ranges of keys in a temporary file, then each range is sorted."""
    files = folder.list()
    names = sorted(filter(is_part, files))
    bits = min(MAX_BITS, (sum(files[name].size for name in names) // EXPORT_BYTES).bit_length())
    pieces: list[list[tuple[int, int]]] = [[] for _ in range(1 << bits)]
    with tempfile.TemporaryFile(dir=folder.scratch) as file:
        for table in _by_precedence(folder, names):
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
