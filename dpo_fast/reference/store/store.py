"""Reference log-probs, computed once and kept on disk.

A store is a folder of immutable Parquet parts, `<root>/<key>/part-<checksum>.parquet`, a row a completion:

    key          16 bytes, hash of the prompt's and the completion's token ids as the model sees them (`keys.py`)
    num_tokens   int32, scored tokens
    logp         fp32, their summed log-prob, in nats
    token_logps  list of fp32

The folder's key is the hash of `reference.json`, which describes everything that the numbers depend on. A part is named
after the hash of its bytes, so a damaged one is known, and written under a temporary name, so readers see whole parts
only. The key is in its metadata, so a part of another store is known as well. Parts are the truth: an index
(`index.py`) makes them quick to open and is made anew where it is lacking.
Any number of processes may write to one folder; where two have computed the same completion, the value of the
alphabetically first part is served. A lease (`lease.py`) keeps those who prune away. No pickle anywhere.
"""

from __future__ import annotations

import json
import logging
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from dpo_fast.errors import InputError
from dpo_fast.reference.store.files import (
    DAY,
    DESCRIPTION,
    PRUNING,
    UNWRITABLE,
    WRITING,
    File,
    Folder,
    cannot_write,
    discard,
    hexadecimal_hash,
    is_description,
    is_ours,
    is_part,
    is_stale,
    set_aside,
    unwritable,
    write_bytes,
)
from dpo_fast.reference.store.index import Index, best_index, report_gone, write_index
from dpo_fast.reference.store.lease import Lease, wait_for_prune
from dpo_fast.reference.store.parts import (
    SCHEMA,
    IndexedPart,
    Rows,
    SpilledRows,
    by_precedence,
    column_values,
    is_named,
    part_rows,
    precedence,
    read_part,
    sequence_logp,
    write_part,
    write_table,
)

logger = logging.getLogger(__name__)

ROWS_PER_PART = 10_000
SECONDS_PER_PART = 60.0  # once there are many; the first one comes after
FIRST_SECONDS = 5.0  # and every other a tenth later than the one before, so that a pass of ten hours makes 600
WRITES_PER_PART = 100.0  # times that the last write took, at least, so that a slow place costs a hundredth
ROWS_IN_MEMORY = 1 << 20  # that no index covers yet, 32 bytes each


class ReferenceStore:
    """Reference log-probs of one reference model, in a folder under `root`.

    Opening verifies what no index covers yet, sets damaged parts aside, and brings the index up to date. A store is
    used by one thread; parts are written on a thread of its own. A process that is killed loses at most one part: what
    was added since the last one, or the one being written, for `add` waits for it. Lookups work after `close` too.
    Until then, or until it is collected as garbage, nobody prunes it. Where the folder may only be read, it serves what
    it has; where the folder goes away, it is made again with what is added from then on.

    Args:
        root: any path that fsspec knows: a local one, `memory://…`, `s3://…`.
        description: everything that the numbers depend on besides the tokens; its hash names the folder.

    Attributes:
        folder: where its parts lie.
        computed: how many rows were added since the store was opened.
        own_parts: names of the parts that were written since then.

    Raises:
        ValueError: it cannot be made, or its folder is a link to another store's.
    """

    def __init__(self, root: str | os.PathLike[str], description: Mapping[str, Any]):
        self._text = json.dumps(description, sort_keys=True, indent=2).encode()
        self._files = Folder(f"{os.fspath(root).removesuffix('/')}/{hexadecimal_hash(self._text)}")
        self.folder = self._files.url
        self.computed = 0
        self.own_parts: set[str] = set()
        self._pending: dict[tuple[int, int], np.ndarray] = {}
        self._writing: dict[tuple[int, int], np.ndarray] = {}
        self._write: Future[tuple[IndexedPart, Rows, float, set[str]]] | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._last_flush, self._flushes, self._write_seconds = time.monotonic(), 0, 0.0
        self._refused: set[str] = set()  # parts that are not served, and could not be set aside
        self._lost = self._index_failed = False
        self._lease = Lease(self._files)
        weakref.finalize(self, self._lease.release).atexit = False  # a run that is interrupted may come back
        self._open()

    def _open(self) -> None:
        try:
            self._files.make()
        except UNWRITABLE as error:
            if not self._files.list():
                raise unwritable(self._files, error) from error
        self._lease.take()
        files = self._files.list()
        if any(name.startswith(PRUNING) for name in files):
            wait_for_prune(self._files)
            files = self._files.list()
        foreign = sorted(name for name in files if not is_ours(name))
        if foreign:
            logger.debug("%s: files that are not the store's are left alone: %s", self.folder, ", ".join(foreign))
        if self._files.real.name != self._files.name and (other := self._other_store()):
            raise InputError(
                f"reference_cache_dir: {self.folder} is a link to a folder of the store {other}; remove the link"
            )
        for name, file in files.items():
            if is_stale(name, file):
                discard(self._files, name)
        self._start_from(best_index(self._files, files))
        self._update_index(*self._new_rows())
        self._describe(files)

    def _other_store(self) -> str | None:
        """Return the store that the folder's description is of, if that is another one and not just damaged."""
        with suppress(FileNotFoundError):
            text = self._files.read(DESCRIPTION)
            return hexadecimal_hash(text) if text != self._text and is_description(text) else None
        return None

    def _describe(self, files: dict[str, File]) -> None:
        """Keeps the description in the folder; the time of its file says, to a day, when the store was last opened."""
        file = files.get(DESCRIPTION)
        whole = file is not None and self._files.read(DESCRIPTION) == self._text
        if whole and (file.modified is None or time.time() - file.modified < DAY):
            return
        with suppress(*UNWRITABLE):  # a store that may only be read
            self._write_description()
            if not whole and (file is not None or any(map(is_part, files))):
                logger.warning("%s was damaged or missing: written anew", self._files.path(DESCRIPTION))

    def _write_description(self) -> None:
        """Writes it, into a folder that is made where it is gone."""
        for attempt in range(3):
            self._files.make()
            try:
                write_bytes(self._files, DESCRIPTION, self._text)
            except FileNotFoundError:  # somebody has removed the folder again
                if attempt == 2:
                    raise
            else:
                return

    def _start_from(self, index: Index | None) -> None:
        """Knows what an index covers, and nothing else."""
        self._index = index
        self._parts = list(index.parts) if index else []
        self._tail = Rows.zeros(0)  # sorted rows of the parts that the index does not cover

    def _new_rows(self) -> tuple[list[IndexedPart], SpilledRows]:
        """All parts, and rows of those that are not known yet. Known ones that were changed are verified again."""
        present = {name: file for name, file in self._files.list().items() if is_part(name)}
        present = {name: file for name, file in present.items() if name not in self._refused}
        refused: dict[str, str] = {}
        for number, part in enumerate(self._parts):
            file = present.get(part.name)
            if file is not None and file != (part.size, part.modified):
                if read_part(self._files, part.name, [], refused) is None:
                    del present[part.name]
                self._parts[number] = part._replace(size=file.size, modified=file.modified)
        gone = {part.name for part in self._parts} - present.keys()
        if gone:
            report_gone(self._files, gone)
            self._lost = True
            self._start_from(None)  # an index keeps one row of equal keys: another part may have what is lost
        parts, runs = [*self._parts], SpilledRows(self._files)
        for name in sorted(present.keys() - {part.name for part in parts}):
            table = read_part(self._files, name, ["key", "logp", "num_tokens"], refused)
            if table is not None and not is_named(table) and (other := self._other_store()):
                refused[name] = f"has no store's name, and came with the description of the store {other}"
            elif table is not None:
                runs.add(part_rows(table, len(parts)))
                parts.append(IndexedPart(name, *present[name], table.num_rows, is_named(table)))
        self._set_aside(refused)
        return parts, runs

    def _set_aside(self, reasons: Mapping[str, str]) -> None:
        """Sets parts aside, and serves them no more even where that fails."""
        self._refused |= set_aside(self._files, reasons).keys()

    def _absorb(self, parts: list[IndexedPart], runs: SpilledRows) -> None:
        """Knows parts as well whose rows are given; where it is interrupted, they are as unknown as before."""
        if len(self._tail.row) + runs.num_rows > ROWS_IN_MEMORY and not self._index_failed:
            self._update_index(parts, runs)
        elif len(parts) > len(self._parts):
            tail = Rows.concatenate([self._tail, *runs.range(0, 0)]).sorted_unique(precedence(parts))
            self._tail, self._parts = tail, parts

    def _update_index(self, parts: list[IndexedPart], runs: SpilledRows) -> None:
        """Writes an index of these parts, if there is none, and removes those that it supersedes."""
        if by_precedence(parts) == (self._index.parts if self._index else []):
            return
        if not self._index_failed:
            runs.add(self._tail)
            try:
                write_index(self._files, parts, self._index, runs)
            except UNWRITABLE as error:
                logger.warning("%s: no index written (%s), parts are read again when it is opened", self.folder, error)
                self._index_failed = True
        if self._index_failed:
            return self._absorb(parts, runs)
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
            rank = precedence(self._parts)
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
        values = self._read(keys)
        lacking = [i for i, value in enumerate(values) if value is None]
        if lacking:  # another process may have written a part anew, under another name
            self.refresh()
            for i, value in zip(lacking, self._read(keys[lacking]), strict=True):
                values[i] = value
        if lacking := sum(value is None for value in values):
            raise InputError(
                f"keys: {lacking} of {len(keys)} have no token log-probs in {self.folder}; compute and add those that"
                " lookup does not find, and open the store again if it finds all: a part was damaged"
            )
        return values

    def _read(self, keys: np.ndarray) -> list[np.ndarray | None]:
        """Token log-probs of keys, None for those that are missing or whose part is not to be served."""
        rows, part = self._locate(keys)
        values: list[np.ndarray | None] = [None] * len(keys)
        missing = np.flatnonzero(part < 0)
        for i, unsaved in zip(missing, self._unsaved(keys[missing]), strict=True):
            values[i] = unsaved
        order, refused = np.argsort(part, kind="stable")[len(missing) :], {}
        for here in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
            if not len(here):
                continue
            table = read_part(self._files, self._parts[part[here[0]]].name, ["token_logps"], refused)
            if table is not None:
                column = table["token_logps"].combine_chunks()
                tokens, offsets = column_values(column.values, "<f4"), column_values(column.offsets, "<i4")
                for i in here:
                    values[i] = tokens[offsets[rows.row[i]] : offsets[rows.row[i] + 1]].copy()
        self._set_aside(refused)
        return values

    def add(self, keys: np.ndarray, token_logps: Sequence[np.ndarray]) -> None:
        """Adds completions: keys, uint64 [n, 2], and an fp32 vector each; those that are there already are ignored.

        A part is flushed every 10 000 rows, or 5 s after the last one and later and later up to 60 s. It is written
        while the caller computes what it adds next. What went wrong in writing it is raised by the next `add`, `flush`
        or `close`, and its rows are kept for the next part.
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
        if len(self._pending) >= ROWS_PER_PART or time.monotonic() - self._last_flush > self._seconds_per_part():
            self.flush()

    def _seconds_per_part(self) -> float:
        often = max(FIRST_SECONDS * 1.1 ** min(self._flushes, 100), WRITES_PER_PART * self._write_seconds)
        return min(often, SECONDS_PER_PART)

    def flush(self) -> None:
        """Begins to write what was added since the last part, in the background, after the write before it is done."""
        self._last_flush = time.monotonic()
        self._collect()
        if self._pending:
            self._lease.take()
            self._executor = self._executor or ThreadPoolExecutor(1, thread_name_prefix="dpo_fast-store")
            self._writing, self._pending = self._pending, {}
            self._flushes += 1
            keys = np.array(list(self._writing), np.uint64)
            self._write = self._executor.submit(self._write_part, keys, list(self._writing.values()))

    def _write_part(
        self, keys: np.ndarray, token_logps: Sequence[np.ndarray]
    ) -> tuple[IndexedPart, Rows, float, set[str]]:
        """Writes a part, in a folder that is made again where it is gone.

        Returns:
            the part, its rows, the seconds that it took, and what is in the folder now.
        """
        began = time.perf_counter()
        try:
            part, rows = write_part(self._files, keys, token_logps)
        except FileNotFoundError:
            self._write_description()
            part, rows = write_part(self._files, keys, token_logps)
        present = self._files.list().keys()
        if DESCRIPTION not in present:  # where a folder need not be made
            self._write_description()
        return part, rows, time.perf_counter() - began, set(present)

    def _collect(self) -> None:
        """Waits for the write in flight, if there is one, and takes its rows over from memory."""
        if self._write is None:
            return
        try:
            part, rows, self._write_seconds, present = self._write.result()
        except Exception as error:
            self._write, self._writing, self._pending = None, {}, {**self._writing, **self._pending}
            if cannot_write(error):
                raise unwritable(self._files, error) from error
            raise
        self._write, self._writing = None, {}
        self.own_parts.add(part.name)
        known = {known.name for known in self._parts}
        if not known <= present:
            self._absorb(*self._new_rows())
        elif part.name not in known:
            runs = SpilledRows(self._files)
            runs.add(rows._replace(part=np.full_like(rows.part, len(self._parts))))
            self._absorb([*self._parts, part], runs)

    def refresh(self) -> None:
        """Waits for the own write in flight and picks up the parts that other writers have added since."""
        self._lease.take()
        self._collect()
        self._absorb(*self._new_rows())

    def expect_additions(self, keys: np.ndarray) -> None:
        """See before anything is computed that what the store lacks of keys, uint64 [n, 2], can be added.

        Raises:
            ValueError: it lacks some, and its folder cannot be written.
        """
        try:
            self._files.make()
            discard(self._files, write_bytes(self._files, f"{WRITING}probe-{os.getpid()}", bytes(1 << 16)))
        except UNWRITABLE as error:
            if lacking := len(np.unique(keys[~self.lookup(keys)[0]], axis=0)):
                raise unwritable(self._files, error, lacking) from error

    def lost_rows(self) -> bool:
        """Whether known parts have gone since it was last asked, so that a pass may have to begin again."""
        lost, self._lost = self._lost, False
        return lost

    # ---- parts that were written before the store's name was in them ----

    @property
    def unnamed_parts(self) -> list[str]:
        """Names of the parts that do not say which store they are of."""
        return [part.name for part in self._parts if not part.named]

    def parts_of(self, keys: np.ndarray) -> list[str | None]:
        """Names of the parts that the rows of keys, uint64 [n, 2], come from; None for a row that is in no part."""
        return [self._parts[number].name if number >= 0 else None for number in self._locate(keys)[1]]

    def are_unnamed(self, keys: np.ndarray) -> np.ndarray:
        """Which keys, uint64 [n, 2], have a row that comes from an unnamed part, bool [n]."""
        unnamed = np.array([*(not part.named for part in self._parts), False])
        return unnamed[self._locate(keys)[1]]

    def adopt(self, names: Sequence[str]) -> None:
        """Write unnamed parts, whose rows were found to be right, with the store's name; where nothing can be written
        they stay as they are.
        """
        self._collect()
        refused: dict[str, str] = {}
        try:
            for name in names:
                table = read_part(self._files, name, SCHEMA.names, refused)
                if table is not None and not is_named(table):
                    write_table(self._files, table)
                    self._files.remove(name)
        except UNWRITABLE as error:
            logger.warning("%s: parts without the store's name stay as they are (%s)", self.folder, error)
        self._set_aside(refused)
        self._read_again()

    def reject(self, names: Sequence[str], reason: str) -> None:
        """Set parts aside whose rows were found to be wrong: what they have is lacking from then on."""
        self._collect()
        self._set_aside(dict.fromkeys(names, reason))
        self._lost = True
        self._read_again()

    def _read_again(self) -> None:
        if self._index is not None:  # it covers parts that this process has taken away
            with suppress(*UNWRITABLE):
                self._files.remove(self._index.name)
        self._start_from(None)
        self._update_index(*self._new_rows())

    def save(self) -> None:
        """Writes what is pending, waits for it, and brings the index up to date."""
        try:
            self.flush()
            self._collect()
            self._update_index(*self._new_rows())
        finally:
            self._flushes = 0
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = None

    def close(self) -> None:
        """Does what `save` does, and lets the store be pruned."""
        try:
            self.save()
        finally:
            self._lease.release()

    def __enter__(self) -> ReferenceStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
