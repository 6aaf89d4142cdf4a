"""The index finds every row, says nothing of keys it lacks, and its bytes depend on the set of parts alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.reference.store import index, parts
from dpo_fast.reference.store.files import Folder, is_index, is_part
from dpo_fast.reference.store.index import Index, best_index, write_index
from dpo_fast.reference.store.keys import completion_key, key_array
from dpo_fast.reference.store.parts import IndexedPart, Rows, SpilledRows
from dpo_fast.reference.store.store import ReferenceStore

halves = st.one_of(st.integers(0, 3), st.integers(2**64 - 3, 2**64 - 1), st.integers(0, 2**64 - 1))
keys_of_parts = st.lists(st.lists(st.tuples(halves, halves), max_size=12), min_size=1, max_size=5)


@pytest.fixture(autouse=True)
def small_batches_and_runs(monkeypatch):
    """Few rows fill a batch, a run and the memory, so that small stores take the paths of large ones."""
    monkeypatch.setattr(index, "ROWS_PER_BATCH", 8)
    monkeypatch.setattr(parts, "ROWS_PER_RUN", 10)


def rows_of(keys, part: IndexedPart, number: int) -> Rows:
    """Rows whose values tell by the part's name which part and row they are."""
    pairs = np.array(keys, np.uint64).reshape(-1, 2)
    row = np.arange(len(pairs), dtype=np.uint32)
    values = (100 * int(part.name[5:37], 16) + row).astype(np.float32)
    return Rows(pairs[:, 0], pairs[:, 1], values, row.astype(np.int32), np.full(len(pairs), number, np.uint32), row)


def parts_of(keys) -> list[IndexedPart]:
    """Parts whose alphabetical order is not that of their numbers."""
    return [IndexedPart(f"part-{(7 * number + 3) % 11:032x}.parquet", 10, 1.5, len(k)) for number, k in enumerate(keys)]


def build(folder: Folder, keys, parts, old: Index | None = None, first: int = 0) -> Index:
    runs = SpilledRows(folder)
    for number in range(first, len(parts)):
        runs.add(rows_of(keys[number], parts[number], number))
    return Index(folder, write_index(folder, parts, old, runs))


@given(keys_of_parts, st.lists(st.tuples(halves, halves), max_size=5))
def test_lookup_equals_a_dict_also_of_keys_that_share_halves(tmp_path_factory, keys, others):
    folder = Folder(tmp_path_factory.mktemp("index"))
    parts = parts_of(keys)
    index = build(folder, keys, parts)
    expected = {}
    for number in sorted(range(len(parts)), key=lambda number: parts[number].name, reverse=True):
        rows = rows_of(keys[number], parts[number], number)
        pairs = zip(reversed(keys[number]), reversed(rows.logp.tolist()), reversed(rows.row.tolist()), strict=True)
        expected |= {key: (parts[number].name, logp, row) for key, logp, row in pairs}
    asked = [*others, *expected, *others]
    found, rows = index.find(np.array(asked, np.uint64).reshape(-1, 2))
    names = [index.parts[part].name for part in rows.part]
    got = [value if there else None for there, *value in zip(found, names, rows.logp, rows.row, strict=True)]
    assert got == [list(expected[key]) if key in expected else None for key in asked]
    assert index.num_rows == len(expected)


@given(keys_of_parts, st.integers(0, 5))
def test_merged_into_an_old_index_or_built_at_once_the_bytes_are_the_same(tmp_path_factory, keys, count):
    folder = Folder(tmp_path_factory.mktemp("index"))
    parts = parts_of(keys)
    whole = build(folder, keys, parts)
    count = min(count, len(parts))
    old = build(folder, keys[:count], parts[:count])
    # The parts of an old index are numbered in its order.
    order = [parts.index(part) for part in old.parts] + list(range(count, len(parts)))
    merged = build(folder, [keys[i] for i in order], [parts[i] for i in order], old, count)
    backwards = build(folder, keys[::-1], parts[::-1])
    assert merged.name == backwards.name == whole.name


@pytest.mark.parametrize("url", ["", "memory://index"])
def test_the_name_is_a_checksum_of_every_byte(tmp_path, url):
    folder = Folder(url or tmp_path)
    folder.fs.makedirs(folder.path(""), exist_ok=True)
    index = build(folder, [[(i << 59, i) for i in range(30)]], parts_of([[0] * 30]))
    data = bytearray(folder.read(index.name))
    for place in [0, 9, len(data) // 2, len(data) - 1]:
        data[place] ^= 1
        folder.fs.pipe_file(folder.path(index.name), bytes(data))
        with pytest.raises(ValueError, match="checksum"):
            Index(folder, index.name)
        data[place] ^= 1
    folder.fs.pipe_file(folder.path(index.name), bytes(data))
    assert Index(folder, index.name).num_rows == 30
    folder.fs.pipe_file(folder.path(index.name), bytes(data[:-8]))
    assert best_index(folder) is None and not [name for name in folder.list() if is_index(name)]


def test_the_index_of_most_parts_is_taken_and_those_it_covers_are_removed(tmp_path):
    folder = Folder(tmp_path)
    keys = [[(i, i)] for i in range(3)]
    parts = parts_of(keys)
    for part in parts:
        (tmp_path / part.name).touch()
    whole = build(folder, keys, parts)
    small = build(folder, keys[:2], parts[:2])
    assert best_index(folder).name == whole.name
    assert [name for name in folder.list() if is_index(name)] == [whole.name]
    assert small.find(np.array([[0, 0]], np.uint64))[0].all(), "a reader keeps what it has mapped"


def test_an_index_that_names_a_part_that_is_gone_is_reported_and_not_taken(tmp_path, caplog):
    folder = Folder(tmp_path)
    keys = [[(i, i)] for i in range(3)]
    parts = parts_of(keys)
    build(folder, keys, parts)
    for part in parts[1:]:
        (tmp_path / part.name).touch()
    small = build(folder, keys[1:], parts[1:])
    assert best_index(folder).name == small.name
    assert "1 parts are gone" in caplog.text and parts[0].name in caplog.text


def test_batches_are_bounded_and_hold_ranges_of_keys(tmp_path):
    generator = np.random.default_rng(0)
    keys = [generator.integers(0, 2**64, (50, 2), np.uint64) for _ in range(20)]
    index = build(Folder(tmp_path), keys, [IndexedPart(f"part-{i:032x}.parquet", 1, None, 50) for i in range(20)])
    sizes = [len(batch.row) for batch in index._batches]
    assert len(sizes) == 128 and sum(sizes) == 1000 and max(sizes) < 3 * 8
    high = np.concatenate([batch.key_high for batch in index._batches])
    assert (np.diff(high.astype(np.float64)) >= 0).all()


def test_a_file_that_cannot_be_written_whole_leaves_nothing(tmp_path):
    folder = Folder(tmp_path)

    def fill(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.write(fill)
    assert list(tmp_path.iterdir()) == []


def test_an_index_of_another_version_is_made_anew(tmp_path, caplog, monkeypatch):
    folder = Folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(index, "INDEX_VERSION", 7)
        name = write_index(folder, [], None, SpilledRows(folder))
    assert best_index(folder) is None and "is of version 7, not 2" in caplog.text
    assert not (tmp_path / name).exists()


def test_of_two_values_of_a_key_the_alphabetically_first_part_s_is_served(tmp_path):
    keys = key_array([completion_key([1], [2])])
    stores = [ReferenceStore(tmp_path, {}) for _ in range(6)]
    for number, store in enumerate(stores):
        store.add(keys, [np.array([number], np.float32)])
    for store in stores:
        store.flush()
        store.refresh()
    for store in stores:
        store.refresh()
    first = min(name for name in Folder(stores[0].folder).list() if is_part(name))
    value = pq.read_table(Path(stores[0].folder) / first)["logp"].to_pylist()
    assert len([name for name in Folder(stores[0].folder).list() if is_part(name)]) == 6
    assert [store.lookup(keys)[1].tolist() for store in stores] == [value] * 6
    assert [store.token_logps(keys)[0].tolist() for store in stores] == [value] * 6
    assert [store.num_rows for store in stores] == [1] * 6
    for store in stores[::-1]:
        store.close()
    assert ReferenceStore(tmp_path, {}).lookup(keys)[1].tolist() == value


@pytest.mark.parametrize("number", range(6))
def test_the_alphabetically_first_part_counts_also_when_an_index_covers_the_other(tmp_path, number):
    keys = key_array([completion_key([1], [2])])
    early, late = ReferenceStore(tmp_path, {}), ReferenceStore(tmp_path, {})
    for value, store in enumerate((early, late), 2 * number):
        store.add(keys, [np.array([value], np.float32)])
    early.close()
    reader = ReferenceStore(tmp_path, {})
    assert reader.lookup(keys)[1].tolist() == [2 * number]
    late.flush()
    late.refresh()
    reader.refresh()
    first = min(name for name in Folder(reader.folder).list() if is_part(name))
    expected = pq.read_table(Path(reader.folder) / first)["logp"].to_pylist()
    assert reader.lookup(keys)[1].tolist() == reader.token_logps(keys)[0].tolist() == expected
    assert reader.num_rows == 1


def test_copies_are_verified_once_and_then_trusted(tmp_path, monkeypatch):
    for number in range(3):
        with ReferenceStore(tmp_path / "whole", {}) as store:
            store.add(key_array([completion_key([number], [2])]), [np.zeros(2, np.float32)])
    shutil.copytree(store.folder, tmp_path / "copy" / Path(store.folder).name, copy_function=shutil.copyfile)
    read, original = [], Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, name: read.append(name) or original(self, name))
    for expected in (3, 0):
        read.clear()
        assert ReferenceStore(tmp_path / "copy", {}).num_rows == 3
        assert sum(map(is_part, read)) == expected
