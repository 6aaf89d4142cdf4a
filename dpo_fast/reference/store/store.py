"""Reference log-probs, computed once and kept on disk.

A store is a folder of immutable Parquet parts, `<root>/<key>/part-<checksum>.parquet`, a row a completion:

    key          16 bytes, hash of the prompt's and the completion's token ids as the model sees them (`keys.py`)
    num_tokens   int32, scored tokens
    logp         fp32, their summed log-prob, in nats
    token_logps  list of fp32

The folder's key is the hash of `reference.json`, which describes everything that the numbers depend on. A part is named
after the hash of its bytes, so a damaged one is known, and written under a temporary name, so readers see whole parts
only. Parts are the truth: an index (`index.py`) makes them quick to open and is made anew where it is lacking.
Any number of processes may write to one folder; where two have computed the same completion, the value of the
alphabetically first part is served. No pickle anywhere.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from dpo_fast.errors import InputError
from dpo_fast.reference.store.files import (
    DAY,
    DESCRIPTION,
    Folder,
    hexadecimal_hash,
    is_ours,
    is_part,
    is_stale,
    write_bytes,
)
from dpo_fast.reference.store.index import Index, best_index, report_gone, write_index
from dpo_fast.reference.store.parts import (
    IndexedPart,
    Rows,
    SpilledRows,
    alphabetical_order,
    column_values,
    part_rows,
    read_part,
    sequence_logp,
    write_part,
)

logger = logging.getLogger(__name__)

ROWS_PER_PART = 10_000
SECONDS_PER_PART = 60.0
ROWS_IN_MEMORY = 1 << 20  # that no index covers yet, 32 bytes each


class ReferenceStore:
    """Reference log-probs of one reference model, in a folder under `root`.

    Opening verifies what no index covers yet, sets damaged parts aside, and brings the index up to date. A store is
    used by one thread; parts are written on a thread of its own. A process that is killed loses at most one part: what
    was added since the last one, or the one being written, for `add` waits for it. Lookups work after `close` too.

    Args:
        root: any path that fsspec knows: a local one, `memory://…`, `s3://…`.
        description: everything that the numbers depend on besides the tokens; its hash names the folder.

    Attributes:
        folder: where its parts lie.
        computed: how many rows were added since the store was opened.
    """

    def __init__(self, root: str | os.PathLike[str], description: Mapping[str, Any]):
        text = json.dumps(description, sort_keys=True, indent=2).encode()
        self._files = Folder(f"{os.fspath(root).removesuffix('/')}/{hexadecimal_hash(text)}")
        self._files.fs.makedirs(self._files.path(""), exist_ok=True)
        self.folder = self._files.url
        self.computed = 0
        self._pending: dict[tuple[int, int], np.ndarray] = {}
        self._writing: dict[tuple[int, int], np.ndarray] = {}
        self._write: Future[tuple[IndexedPart, Rows]] | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._last_flush = time.monotonic()
        self._describe(text)
        self._open()

    def _describe(self, text: bytes) -> None:
        """Keeps the description in the folder; the time of its file says, to a day, when the store was last opened."""
        files = self._files.list()
        file = files.get(DESCRIPTION)
        if file is None or self._files.read(DESCRIPTION) != text:
            if file is not None or any(map(is_part, files)):
                logger.warning("%s was damaged or missing: written anew", self._files.path(DESCRIPTION))
            write_bytes(self._files, DESCRIPTION, text)
        elif file.modified is not None and time.time() - file.modified > DAY:
            with suppress(OSError):  # a store that may only be read
                write_bytes(self._files, DESCRIPTION, text)

    def _open(self) -> None:
        files = self._files.list()
        foreign = sorted(name for name in files if not is_ours(name))
        if foreign:
            logger.debug("%s: files that are not the store's are left alone: %s", self.folder, ", ".join(foreign))
        for name, file in files.items():
            if is_stale(name, file):
                self._files.remove(name)
        self._start_from(best_index(self._files))
        self._update_index(*self._new_rows())

    def _start_from(self, index: Index | None) -> None:
        """Knows what an index covers, and nothing else."""
        self._index = index
        self._parts = list(index.parts) if index else []
        self._tail = Rows.zeros(0)  # sorted rows of the parts that the index does not cover

    def _new_rows(self) -> tuple[list[IndexedPart], SpilledRows]:
        """All parts, and rows of those that are not known yet. Known ones that were changed are verified again."""
        present = {name: file for name, file in self._files.list().items() if is_part(name)}
        for number, part in enumerate(self._parts):
            file = present.get(part.name)
            if file is not None and file != (part.size, part.modified):
                if read_part(self._files, part.name, []) is None:
                    del present[part.name]
                self._parts[number] = part._replace(size=file.size, modified=file.modified)
        gone = {part.name for part in self._parts} - present.keys()
        if gone:
            report_gone(self._files, gone)
            self._start_from(None)  # an index keeps one row of equal keys: another part may have what is lost
        parts, runs = [*self._parts], SpilledRows(self._files)
        for name in sorted(present.keys() - {part.name for part in parts}):
            table = read_part(self._files, name, ["key", "logp", "num_tokens"])
            if table is not None:
                runs.add(part_rows(table, len(parts)))
                parts.append(IndexedPart(name, *present[name], table.num_rows))
        return parts, runs

    def _absorb(self, parts: list[IndexedPart], runs: SpilledRows) -> None:
        """Knows parts as well whose rows are given; where it is interrupted, they are as unknown as before."""
        if len(self._tail.row) + runs.num_rows > ROWS_IN_MEMORY:
            self._update_index(parts, runs)
        elif len(parts) > len(self._parts):
            tail = Rows.concatenate([self._tail, *runs.range(0, 0)]).sorted_unique(alphabetical_order(parts))
            self._tail, self._parts = tail, parts

    def _update_index(self, parts: list[IndexedPart], runs: SpilledRows) -> None:
        """Writes an index of these parts, if there is none, and removes those that it supersedes."""
        if sorted(parts) != (self._index.parts if self._index else []):
            runs.add(self._tail)
            write_index(self._files, parts, self._index, runs)
            self._start_from(best_index(self._files))  # another writer's, if that covers more
            self._absorb(*self._new_rows())

    @property
    def num_rows(self) -> int:
        """Different completions, on disk and added."""
        indexed = self._index.num_rows if self._index else 0
        tail = np.stack([self._tail.key_high, self._tail.key_low], 1)
        unsaved = np.array([*self._writing, *self._pending], np.uint64).reshape(-1, 2)
        rows = indexed + len(tail) + len(unsaved) - int((self._locate(unsaved)[1] >= 0).sum())
        return rows - int(self._index.find(tail)[0].sum()) if self._index else rows

    def _locate(self, keys: np.ndarray) -> tuple[Rows, np.ndarray]:
        """Rows of keys, and the number of the part that each is in, int64 [n], -1 where it is in none."""
        if keys.dtype != np.uint64 or keys.ndim != 2 or keys.shape[1] != 2:
            raise InputError(f"keys: {keys.dtype} {list(keys.shape)}, give uint64 [n, 2], as key_array makes them")
        found, rows = self._index.find(keys) if self._index else (np.zeros(len(keys), bool), Rows.zeros(len(keys)))
        position = self._tail.find(keys)
        better = position >= 0
        both = np.flatnonzero(better & found)
        if len(both):
            rank = alphabetical_order(self._parts)
            better[both] = rank[self._tail.part[position[both]]] < rank[rows.part[both]]
        for column, source in zip(rows, self._tail, strict=True):
            column[better] = source[position[better]]
        return rows, np.where(found | better, rows.part.astype(np.int64), -1)

    def _unsaved(self, keys: np.ndarray) -> list[np.ndarray | None]:
        """Token log-probs of keys that were added and are in no part yet."""
        pairs = map(tuple, keys.tolist())
        return [self._pending.get(pair, self._writing.get(pair)) for pair in pairs]

    def lookup(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of keys, uint64 [n, 2], on disk or added.

        Returns:
            which keys have a row, bool [n]; their log-probs, fp32 [n], NaN without a row; their tokens, int32 [n].
        """
        rows, part = self._locate(keys)
        found, logps = part >= 0, np.where(part >= 0, rows.logp, np.float32(np.nan))
        missing = np.flatnonzero(~found) if self._pending or self._writing else []
        for i, values in zip(missing, self._unsaved(keys[missing]), strict=True):
            if values is not None:
                found[i], logps[i], rows.num_tokens[i] = True, sequence_logp(values), len(values)
        return found, logps, rows.num_tokens

    def token_logps(self, keys: np.ndarray) -> list[np.ndarray]:
        """Token log-probs of keys, uint64 [n, 2]: fp32 [num_tokens] each. A part is read once, and verified.

        Raises:
            ValueError: rows that are missing, or whose part turns out to be damaged.
        """
        rows, part = self._locate(keys)
        values: list[np.ndarray | None] = [None] * len(keys)
        missing = np.flatnonzero(part < 0)
        for i, unsaved in zip(missing, self._unsaved(keys[missing]), strict=True):
            values[i] = unsaved
        order = np.argsort(part, kind="stable")[len(missing) :]
        for here in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
            table = read_part(self._files, self._parts[part[here[0]]].name, ["token_logps"]) if len(here) else None
            if table is not None:
                column = table["token_logps"].combine_chunks()
                tokens, offsets = column_values(column.values, "<f4"), column_values(column.offsets, "<i4")
                for i in here:
                    values[i] = tokens[offsets[rows.row[i]] : offsets[rows.row[i] + 1]].copy()
        if lacking := sum(value is None for value in values):
            raise InputError(
                f"keys: {lacking} of {len(keys)} have no token log-probs in {self.folder}; compute and add those that"
                " lookup does not find, and open the store again if it finds all: a part was damaged"
            )
        return values

    def add(self, keys: np.ndarray, token_logps: Sequence[np.ndarray]) -> None:
        """Adds completions: keys, uint64 [n, 2], and an fp32 vector each; those that are there already are ignored.

        A part is flushed every 10 000 rows or 60 s, and written while the caller computes what it adds next. What went
        wrong in writing it is raised by the next `add`, `flush` or `close`, and its rows are kept for the next part.
        """
        if len(keys) != len(token_logps):
            raise InputError(f"token_logps: {len(token_logps)} for {len(keys)} keys, give one array for each key")
        self._collect()
        found, _, _ = self.lookup(keys)
        for i in np.flatnonzero(~found):
            values = np.array(token_logps[i], np.float32)
            if values.ndim != 1:
                raise InputError(f"token_logps: shape {values.shape} of number {i}, give a vector, a value a token")
            self.computed += tuple(keys[i].tolist()) not in self._pending
            self._pending.setdefault(tuple(keys[i].tolist()), values)
        if len(self._pending) >= ROWS_PER_PART or time.monotonic() - self._last_flush > SECONDS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Begins to write what was added since the last part, in the background, after the write before it is done."""
        self._last_flush = time.monotonic()
        self._collect()
        if self._pending:
            self._executor = self._executor or ThreadPoolExecutor(1, thread_name_prefix="dpo_fast-store")
            self._writing, self._pending = self._pending, {}
            keys = np.array(list(self._writing), np.uint64)
            self._write = self._executor.submit(write_part, self._files, keys, list(self._writing.values()))

    def _collect(self) -> None:
        """Waits for the write in flight, if there is one, and takes its rows over from memory."""
        if self._write is None:
            return
        try:
            part, rows = self._write.result()
        except Exception:
            self._write, self._writing, self._pending = None, {}, {**self._writing, **self._pending}
            raise
        self._write, self._writing = None, {}
        if part.name not in {known.name for known in self._parts}:
            runs = SpilledRows(self._files)
            runs.add(rows._replace(part=np.full_like(rows.part, len(self._parts))))
            self._absorb([*self._parts, part], runs)

    def refresh(self) -> None:
        """Waits for the own write in flight and picks up the parts that other writers have added since."""
        self._collect()
        self._absorb(*self._new_rows())

    def close(self) -> None:
        """Writes what is pending, waits for it, and brings the index up to date."""
        try:
            self.flush()
            self._collect()
            self._update_index(*self._new_rows())
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = None

    def __enter__(self) -> ReferenceStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
