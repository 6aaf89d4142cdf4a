"""A store serves no row of another store, however a file or a folder of the other has come to it."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_fast.errors import InputError
from dpo_fast.reference.store import index
from dpo_fast.reference.store.files import DESCRIPTION as FILE
from dpo_fast.reference.store.files import Folder, is_index, is_part
from dpo_fast.reference.store.index import write_index
from dpo_fast.reference.store.maintenance import export, verify
from dpo_fast.reference.store.parts import STORE, IndexedPart, SpilledRows, part_name, part_rows, sequence_logp
from dpo_fast.reference.store.store import ReferenceStore
from stores import DESCRIPTION, assert_serves, filled, rows

OTHER = {"weights": "xyz", "dtype": "float32"}
COUNT = 40


def without_name(folder: Path, part: Path) -> Path:
    """Writes a part as it was written before the store's name was in it."""
    sink = pa.BufferOutputStream()
    pq.write_table(pq.read_table(part).replace_schema_metadata(None), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    old = folder / part_name(data)
    old.write_bytes(data)
    return old


def parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_part(path.name))


def make_old(folder: Path) -> None:
    """Makes a store one of before: parts without its name, and no index."""
    for part in parts(folder):
        without_name(folder, part)
        part.unlink()
    for path in filter(lambda path: is_index(path.name), folder.iterdir()):
        path.unlink()


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A store of half of the rows, and another one with other values of all of them; also as it was before."""
    root = tmp_path_factory.mktemp("templates")
    filled(root / "stores", COUNT // 2, 10)
    with ReferenceStore(root / "stores", OTHER) as other:
        for start in range(0, COUNT, 10):
            keys, values = rows(*range(start, start + 10))
            other.add(keys, [value + 1 for value in values])
            other.flush()
    shutil.copytree(other.folder, root / "old")
    make_old(root / "old")
    return Path(ReferenceStore(root / "stores", DESCRIPTION).folder), Path(other.folder), root / "old"


def copy_part(mine: Path, other: Path, old: Path, draw: random.Random) -> None:
    for part in draw.sample(parts(other), draw.randint(1, 4)):
        shutil.copy2(part, mine)


def link_part(mine: Path, other: Path, old: Path, draw: random.Random) -> None:
    for part in draw.sample(parts(other), draw.randint(1, 4)):
        draw.choice([os.symlink, os.link])(part, mine / part.name)


def copy_everything(mine: Path, other: Path, old: Path, draw: random.Random) -> None:
    """Over what is there, the description too or not."""
    for path in other.iterdir():
        if path.name != FILE or draw.random() < 0.5:
            shutil.copy2(path, mine)


def copy_index(mine: Path, other: Path, old: Path, draw: random.Random) -> None:
    """With parts of the other's names that are mine."""
    for path in [*filter(lambda path: is_index(path.name), [*mine.iterdir()])]:
        path.unlink()
    for path in filter(lambda path: is_index(path.name), other.iterdir()):
        shutil.copy2(path, mine)
    for part in parts(other):
        target = mine / part.name
        shutil.copy2(draw.choice(parts(mine)), target)
        os.utime(target, ns=(part.stat().st_mtime_ns,) * 2)


def copied_folder(mine: Path, other: Path, old: Path, draw: random.Random) -> None:
    """Under my name."""
    shutil.rmtree(mine)
    shutil.copytree(other, mine)


def copied_old_folder(mine: Path, other: Path, old: Path, draw: random.Random) -> None:
    shutil.rmtree(mine)
    shutil.copytree(old, mine)


def renamed_folder(mine: Path, other: Path, old: Path, draw: random.Random) -> None:
    shutil.rmtree(mine)
    draw.choice([old, other]).rename(mine)


def merged_old_folder(mine: Path, other: Path, old: Path, draw: random.Random) -> None:
    """Of which the description has come last."""
    shutil.copytree(old, mine, dirs_exist_ok=True)


def other_columns(mine: Path, other: Path, old: Path, draw: random.Random) -> None:
    """Of the other's values, with the name of my store."""
    for part in parts(other):
        table = pq.read_table(part)
        change = draw.choice([lambda table: table.rename_columns(["key", "n", "logp", "token_logps"]),
                              lambda table: table.drop_columns(["num_tokens"]),
                              lambda table: table.set_column(2, "logp", table["logp"].cast(pa.float64()))])  # fmt: skip
        sink = pa.BufferOutputStream()
        pq.write_table(change(table).replace_schema_metadata({STORE: mine.name}), sink)
        data = sink.getvalue().to_pybytes()
        (mine / part_name(data)).write_bytes(data)


def other_bytes(mine: Path, other: Path, old: Path, draw: random.Random) -> None:
    """Under the names of my parts."""
    for target, source in zip(parts(mine), parts(other), strict=False):
        target.write_bytes(source.read_bytes())


def name_edited(mine: Path, other: Path, old: Path, draw: random.Random) -> None:
    """In the bytes of the other's parts, which keep their file names."""
    for part in parts(other):
        (mine / part.name).write_bytes(part.read_bytes().replace(other.name.encode(), mine.name.encode()))


def index_of_before(mine: Path, other: Path, old: Path, draw: random.Random) -> None:
    """Which covers parts of the other that were served then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "INDEX_VERSION", 1)
        folder, runs, covered = Folder(mine), SpilledRows(Folder(mine)), []
        for part in parts(other):
            shutil.copy2(part, mine)
            runs.add(part_rows(pq.read_table(part), len(covered)))
            covered.append(IndexedPart(part.name, *folder.stat(part.name), 10))
        write_index(folder, covered, None, runs)


def set_aside_undone(mine: Path, other: Path, old: Path, draw: random.Random) -> None:
    copy_part(mine, other, old, draw)
    ReferenceStore(mine.parent, DESCRIPTION).close()
    for path in mine.glob("*.damaged"):
        path.rename(path.with_suffix(""))


WAYS = [copy_part, link_part, copy_everything, copy_index, copied_folder, copied_old_folder, renamed_folder,
        merged_old_folder, other_columns, other_bytes, name_edited, index_of_before, set_aside_undone]  # fmt: skip


def assert_served_rows_are_mine(store: ReferenceStore) -> None:
    keys, expected = rows(*range(COUNT))
    found, logps, _ = store.lookup(keys)
    assert all(logps[i] == sequence_logp(expected[i]) for i in np.flatnonzero(found))
    here = np.flatnonzero(found)
    served = store.token_logps(keys[here])
    assert all(np.array_equal(value, expected[i]) for value, i in zip(served, here, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_no_row_of_another_store_is_served(tmp_path, templates, caplog, way):
    try_way(tmp_path, templates, caplog, way, range(5))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_no_row_of_another_store_is_served_in_fifty_runs(tmp_path, templates, caplog, way):
    try_way(tmp_path, templates, caplog, way, range(50))


def try_way(tmp_path, templates, caplog, way, runs) -> None:
    for number in runs:
        draw, root = random.Random(number), tmp_path / str(number)
        mine, other = (root / "stores" / template.name for template in templates[:2])
        shutil.copytree(templates[0].parent, root / "stores")
        shutil.copytree(templates[2], root / "old")
        open_before = ReferenceStore(mine.parent, DESCRIPTION) if number % 2 else None
        caplog.clear()
        way(mine, other, root / "old", draw)
        copied, way_warnings = {path.name for path in parts(mine)}, len(caplog.records)
        if number % 5 == 4:
            assert verify(mine).damaged
        store = open_before or ReferenceStore(mine.parent, DESCRIPTION)
        if open_before:
            assert_served_rows_are_mine_or_gone(store)
            store.refresh()
        assert_served_rows_are_mine(store)
        aside = copied - {path.name for path in parts(mine)}
        assert aside or number % 5 == 4, "what is not mine is set aside"
        warnings = [record for record in caplog.records[way_warnings:] if "set aside" in record.getMessage()]
        assert len(warnings) <= 1 + (number % 5 == 4), "in one warning"
        if number % 10 < 2:
            with store:
                store.add(*rows(*range(COUNT)))
            assert_serves(ReferenceStore(mine.parent, DESCRIPTION), COUNT)
            report = verify(mine)
            assert (report.damaged, report.missing, report.unnamed) == ((), (), ())
        if other.exists():
            assert verify(other).rows == COUNT, "the other store is as before"
        shutil.rmtree(root)


def assert_served_rows_are_mine_or_gone(store: ReferenceStore) -> None:
    """What an open store has mapped it may say still."""
    keys, expected = rows(*range(COUNT))
    found, logps, _ = store.lookup(keys)
    assert all(logps[i] == sequence_logp(expected[i]) for i in np.flatnonzero(found))


def test_a_link_to_another_store_is_refused_and_leaves_the_other_as_it_was(tmp_path, templates):
    mine, other = (tmp_path / template.name for template in templates[:2])
    shutil.copytree(templates[1], other)
    mine.symlink_to(other)
    before = sorted(path.name for path in other.iterdir())
    with pytest.raises(InputError, match=f"is a link to a folder of the store {other.name}; remove the link"):
        ReferenceStore(tmp_path, DESCRIPTION)
    report = verify(mine)
    assert report.rows == 0 and all("cannot be set aside" in report.reasons[part.name] for part in parts(other))
    assert sorted(path.name for path in other.iterdir() if not is_index(path.name)) == [
        name for name in before if not is_index(name)
    ]
    assert ReferenceStore(tmp_path, OTHER).num_rows == COUNT


def test_a_store_may_be_copied_and_linked_under_its_own_name(tmp_path, templates, caplog):
    shutil.copytree(templates[0], tmp_path / "copy" / templates[0].name)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / templates[0].name).symlink_to(templates[0])
    for where in ("copy", "link"):
        assert_serves(ReferenceStore(tmp_path / where, DESCRIPTION), COUNT // 2, 0)
    assert not caplog.records


def test_verify_tells_of_a_part_of_another_store(tmp_path, templates):
    mine, other = (tmp_path / template.name for template in templates[:2])
    for target, source in ((mine, templates[0]), (other, templates[1])):
        shutil.copytree(source, target)
    shutil.copy2(parts(other)[0], mine)
    report = verify(mine)
    assert report.damaged == (parts(other)[0].name,)
    assert report.reasons[report.damaged[0]] == f"belongs to another store, {other.name}"
    assert (mine / f"{parts(other)[0].name}.damaged").exists() and report.rows == COUNT // 2


# ---- parts of before, which do not say which store they are of ----


@pytest.fixture
def half_old(tmp_path, templates) -> Path:
    """My store of before, and one part of before of another store in it, with other values of rows 0 … 9."""
    mine = tmp_path / templates[0].name
    shutil.copytree(templates[0], mine)
    make_old(mine)
    return mine


def test_parts_of_before_serve_and_are_known(half_old, templates):
    with ReferenceStore(half_old.parent, DESCRIPTION) as store:
        assert_serves(store, COUNT // 2)
        assert sorted(store.unnamed_parts) == [part.name for part in parts(half_old)]
        store.add(*rows(COUNT))
        keys = rows(0, COUNT, COUNT + 1)[0]
        assert store.are_unnamed(keys).tolist() == [True, False, False]
        assert store.parts_of(keys)[0] in store.unnamed_parts and store.parts_of(keys)[1:] == [None, None]
    again = ReferenceStore(half_old.parent, DESCRIPTION)  # from the index
    assert again.are_unnamed(keys).tolist() == [True, False, False] and len(again.unnamed_parts) == 2
    assert verify(half_old).unnamed == tuple(sorted(again.unnamed_parts)) and verify(half_old).damaged == ()


def test_adopted_parts_are_named_and_lose_nothing(half_old, caplog):
    store, beside = (ReferenceStore(half_old.parent, DESCRIPTION) for _ in range(2))
    old = store.unnamed_parts
    store.adopt(old[:1])
    assert len(store.unnamed_parts) == 1 and store.are_unnamed(rows(*range(COUNT))[0]).sum() == 10
    store.adopt(store.unnamed_parts)
    assert not caplog.messages, "nobody is told that parts are gone, for none is lost"
    for one in (store, beside, ReferenceStore(half_old.parent, DESCRIPTION)):
        assert len(one.token_logps(rows(*range(COUNT // 2))[0])) == COUNT // 2, "also where it was open before"
        assert_serves(one, COUNT // 2)
        assert one.unnamed_parts == []
    report = verify(half_old)
    assert (report.damaged, report.unnamed, report.rows) == ((), (), COUNT // 2)
    assert not set(old) & {part.name for part in parts(half_old)}


def test_a_kill_between_the_two_steps_of_adopting_loses_nothing(half_old, monkeypatch):
    store = ReferenceStore(half_old.parent, DESCRIPTION)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            store.adopt(store.unnamed_parts)
    assert len(parts(half_old)) == 3
    again = ReferenceStore(half_old.parent, DESCRIPTION)
    assert_serves(again, COUNT // 2)
    assert again.are_unnamed(rows(*range(COUNT))[0]).sum() == 10, "a named row goes before an unnamed one"
    again.adopt(again.unnamed_parts)
    assert_serves(again, COUNT // 2)
    assert len(parts(half_old)) == 2


@pytest.mark.parametrize("seed", range(5))
def test_named_rows_go_before_unnamed_ones_and_rejected_ones_are_gone(tmp_path, templates, seed):
    mine = tmp_path / templates[0].name
    shutil.copytree(templates[0], mine)
    foreign = random.Random(seed).sample(parts(templates[2]), 3)
    for part in foreign:
        shutil.copy2(part, mine)
    with ReferenceStore(mine.parent, DESCRIPTION) as store:
        keys, expected = rows(*range(COUNT // 2))
        assert np.array_equal(store.lookup(keys)[1], [sequence_logp(value) for value in expected])
        export(mine, tmp_path / "rows.jsonl")
        exported = {row["key"]: row["logp"] for row in map(json.loads, (tmp_path / "rows.jsonl").open())}
        for key, value in zip(keys.astype(">u8"), expected, strict=True):
            assert exported[key.tobytes().hex()] == sequence_logp(value)
        assert sorted(store.unnamed_parts) == sorted(part.name for part in foreign)
        store.reject(store.unnamed_parts, "holds what the reference does not say")
        assert_serves(store, COUNT // 2)
        assert store.lost_rows() and not store.lost_rows() and store.unnamed_parts == []
        assert len([*mine.glob("*.damaged")]) == 3
        store.add(*rows(*range(COUNT)))
    assert_serves(ReferenceStore(mine.parent, DESCRIPTION), COUNT)
