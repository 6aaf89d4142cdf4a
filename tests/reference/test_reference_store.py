"""A store serves what was put in and nothing else: after kills, beside other writers, on any filesystem, damaged."""

from __future__ import annotations

import inspect
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.reference.store import maintenance
from dpo_fast.reference.store import store as store_module
from dpo_fast.reference.store.files import WRITING, Folder, hexadecimal_hash, is_index, is_part
from dpo_fast.reference.store.keys import completion_key, key_array
from dpo_fast.reference.store.maintenance import export, info, prune, verify
from dpo_fast.reference.store.parts import sequence_logp
from dpo_fast.reference.store.store import ReferenceStore
from stores import DESCRIPTION, assert_serves, filled, key, names, rows, values

# A writer in a process of its own: rows in an order, a part every 50, each computed row's number noted in a file.
WRITER = """
import os, random, sys, time
from dpo_fast.reference.store import store as module
from dpo_fast.reference.store.keys import key_array
from tests_rows import key, values
root, count, seed, pause, noted = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
module.ROWS_IN_MEMORY = 200
notes = os.open(noted, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
order = list(range(count))
if seed:
    random.Random(seed).shuffle(order)
with module.ReferenceStore(root, {"weights": "abc", "dtype": "float32"}) as store:
    keys = key_array([key(i) for i in order])
    missing = [j for j, found in enumerate(store.lookup(keys)[0]) if not found]
    print("ready", flush=True)
    for number, j in enumerate(missing, 1):
        store.add(keys[j : j + 1], [values(order[j])])
        os.write(notes, b"%d\\n" % order[j])
        time.sleep(pause)
        if number % 50 == 0:
            store.flush()
"""


@pytest.fixture
def writer(tmp_path):
    """Starts a writer process."""
    functions = "".join(map(inspect.getsource, (key, values)))
    imports = "import numpy as np\nfrom dpo_fast.reference.store.keys import completion_key\n"
    (tmp_path / "tests_rows.py").write_text(imports + functions)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def start(root: Path, count: int, seed: int = 0, pause: float = 0.0, noted: str = os.devnull) -> subprocess.Popen:
        command = [sys.executable, "-c", WRITER, str(root), str(count), str(seed), str(pause), noted]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, cwd="/", **pipes)

    return start


@pytest.mark.parametrize("where", ["local", "memory"])
def test_rows_come_back_bitwise(tmp_path, where):
    root = tmp_path if where == "local" else f"memory://test-{uuid.uuid4().hex}"
    store = ReferenceStore(root, DESCRIPTION)
    store.add(*rows(*range(60)))
    assert_serves(store, 60)  # pending
    store.flush()
    assert_serves(store, 60)  # being written, or just written
    store.add(*rows(*range(50, 100)))
    assert_serves(store, 100)
    assert store.computed == 100, "rows that are there are ignored"
    store.close()
    assert_serves(store, 100)
    again = ReferenceStore(root, DESCRIPTION)
    assert_serves(again, 100)
    assert again.computed == 0 and again.folder == store.folder
    files = names(store)
    assert sorted(map(is_part, files)) == [False, False, True, True] and sum(map(is_index, files)) == 1
    assert verify(store.folder).rows == 100
    assert ReferenceStore(root, {**DESCRIPTION, "dtype": "bfloat16"}).num_rows == 0


def test_keys_and_folders_are_those_of_earlier_stores(tmp_path):
    assert completion_key([1, 2], [3, 4, 5], 1).hex() == "2c9046d32753ef133cf64632700a8652"
    assert key_array([bytes(range(16))]).tolist() == [[0x0001020304050607, 0x08090A0B0C0D0E0F]]
    for root in (tmp_path, f"{tmp_path}/", f"file://{tmp_path}"):
        assert ReferenceStore(root, {"a": 1}).folder == str(tmp_path / "490ef31e3a8115c0f551073d1b14bc9e")
    assert ReferenceStore("memory://", {"a": 1}).folder == "memory:///490ef31e3a8115c0f551073d1b14bc9e"
    assert [store.description for store in info("memory://")] == [{"a": 1}]
    assert len(prune("memory://", 0)[0]) == 1 and info("memory://") == []
    with pytest.raises(ValueError, match="16 bytes"):
        key_array([b"short"])


def test_content_does_not_depend_on_the_order_of_insertion(tmp_path):
    order = list(range(120))
    exports = []
    for seed in range(3):
        random.Random(seed).shuffle(order)
        with ReferenceStore(tmp_path / str(seed), DESCRIPTION) as store:
            for start in range(0, 120, 40 + seed):
                store.add(*rows(*order[start : start + 40 + seed]))
                store.flush()
        export(store.folder, tmp_path / f"{seed}.jsonl")
        exports.append((tmp_path / f"{seed}.jsonl").read_bytes())
    assert len(exports[0]) > 1000 and len(set(exports)) == 1
    one, other = (filled(tmp_path / name, 100) for name in ("one", "other"))
    assert [n for n in names(one) if is_part(n)] == [n for n in names(other) if is_part(n)], "same rows, same bytes"


some_keys = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=6)
steps = st.sampled_from(["flush", "refresh", "close", "reopen"]) | st.tuples(
    st.sampled_from(["mine", "other"]), some_keys
)


@given(st.lists(steps, max_size=14))
def test_lookup_equals_a_dict(tmp_path_factory, steps):
    """Keys share their high halves; two writers take turns; few rows fill the memory."""
    root, known = tmp_path_factory.mktemp("store"), {}
    store, other = ReferenceStore(root, DESCRIPTION), ReferenceStore(root, DESCRIPTION)
    every = np.array([(high, low) for high in range(3) for low in range(5)], np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "ROWS_IN_MEMORY", 6)
        for step in steps:
            if step == "reopen":
                store.close()
                store = ReferenceStore(root, DESCRIPTION)
            elif isinstance(step, str):
                getattr(store, step)()
            else:  # a value depends on its key alone, as log-probs do
                writer, keys = step
                data = [np.array([0.5, high, 10 * low][: 1 + low % 3], np.float32) for high, low in keys]
                known |= dict(zip(keys, data, strict=True))
                (store if writer == "mine" else other).add(np.array(keys, np.uint64), data)
                if writer == "other":
                    other.flush()
                    other.refresh()
                    store.refresh()
            found, logps, num_tokens = store.lookup(every)
            expected = [known.get(key) for key in map(tuple, every.tolist())]
            assert found.tolist() == [value is not None for value in expected]
            present = [value for value in expected if value is not None]
            assert logps[found].tolist() == [sequence_logp(value) for value in present]
            assert num_tokens[found].tolist() == [len(value) for value in present]
            served = store.token_logps(every[found])
            assert all(np.array_equal(a, b) for a, b in zip(served, present, strict=True))
            assert store.num_rows == len(known)


def test_an_error_in_the_background_is_raised_and_loses_nothing(tmp_path, monkeypatch):
    store = ReferenceStore(tmp_path, DESCRIPTION)
    store.add(*rows(0, 1))

    def full(*arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", full)
        for call in (lambda: store.add(*rows(2)), store.flush, store.close):
            store.flush()
            assert store._write.exception() is not None
            with pytest.raises(OSError, match="disk full"):
                call()
    assert_serves(store, 2)
    store.add(*rows(2))
    store.close()
    assert_serves(ReferenceStore(tmp_path, DESCRIPTION), 3)


def test_parts_are_flushed_by_rows_and_by_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "ROWS_PER_PART", 10)
    store = ReferenceStore(tmp_path, DESCRIPTION)
    store.add(*rows(*range(9)))
    store.refresh()
    assert not any(map(is_part, names(store)))
    store.add(*rows(9))
    store.refresh()
    assert sum(map(is_part, names(store))) == 1
    monkeypatch.setattr(store_module, "SECONDS_PER_PART", 0.0)
    store.add(*rows(10))
    store.refresh()
    assert sum(map(is_part, names(store))) == 2


def test_mistakes_are_named(tmp_path):
    store = filled(tmp_path, 3)
    with pytest.raises(ValueError, match="keys: 2 of 4 have no token log-probs"):
        store.token_logps(rows(1, 50, 2, 51)[0])
    with pytest.raises(ValueError, match="token_logps: 1 for 2 keys"):
        store.add(rows(5, 6)[0], [values(5)])
    with pytest.raises(ValueError, match="uint64"):
        store.lookup(rows(5)[0].astype(np.int64))
    with pytest.raises(ValueError, match="vector"):
        store.add(rows(5)[0], [np.zeros((2, 2), np.float32)])
    with pytest.raises(ValueError, match="jsonl"):
        export(store.folder, tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="older_than_days"):
        prune(tmp_path, -1)


def test_opening_and_asking_load_little(tmp_path):
    filled(tmp_path, 20)
    code = f"""
import sys
from dpo_fast.reference.store.keys import key_array
from dpo_fast.reference.store.store import ReferenceStore
with ReferenceStore({str(tmp_path)!r}, {DESCRIPTION!r}) as store:
    keys = key_array([bytes.fromhex("{key(3).hex()}")])
    assert store.lookup(keys)[0].all() and len(store.token_logps(keys)[0]) == {len(values(3))}
    store.add(keys + keys, store.token_logps(keys))
print([name for name in ("torch", "transformers", "datasets", "pandas") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_an_interrupted_refresh_loses_no_rows(tmp_path, monkeypatch):
    mine, other = ReferenceStore(tmp_path, DESCRIPTION), filled(tmp_path, 60, 20)
    original, read = store_module.read_part, []

    def interrupted(*arguments):
        read.append(arguments)
        if len(read) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(store_module, "read_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mine.refresh()
    for name in filter(is_index, names(other)):
        (Path(other.folder) / name).unlink()
    mine.close()
    assert_serves(mine, 60)
    assert_serves(ReferenceStore(tmp_path, DESCRIPTION), 60)


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_whole_parts(writer, tmp_path, kills):
    """Killed at random moments, then left to finish: nothing is wrong, little is computed twice."""
    count = 6000
    generator, hits = random.Random(0), 0
    root, noted = tmp_path / "killed", tmp_path / "noted"
    for _ in range(kills):
        process = writer(root, count, pause=2e-4, noted=str(noted))
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(generator.uniform(0, 0.06))
        hits += process.poll() is None
        process.kill()
        process.communicate()
    last = writer(root, count, noted=str(noted))
    assert last.wait() == 0 and last.communicate()[1] == ""
    assert hits == kills, "every kill hit a writing process"
    assert_serves(ReferenceStore(root, DESCRIPTION), count)
    computed = [int(line) for line in noted.read_text().split()]
    assert set(computed) == set(range(count))
    # What is lost is one of the writer's parts.
    repeated = len(computed) - count
    assert repeated <= kills * 50, f"{repeated} rows repeated in {kills} restarts"
    undisturbed = filled(tmp_path / "undisturbed", count)
    for store in (root / Path(undisturbed.folder).name, undisturbed.folder):
        export(store, f"{store}.jsonl")
    assert Path(f"{store}.jsonl").read_bytes() == (root / f"{Path(store).name}.jsonl").read_bytes()
    report = verify(root / Path(undisturbed.folder).name)
    assert (report.damaged, report.missing, report.foreign) == ((), (), ())


def test_concurrent_writers_make_one_store(writer, tmp_path):
    root = tmp_path / "shared"
    processes = [writer(root, 600, seed) for seed in range(1, 5)]
    for process in processes:
        out, error = process.communicate()
        assert (process.returncode, out, error) == (0, "ready\n", "")
    store = ReferenceStore(root, DESCRIPTION)
    assert_serves(store, 600)
    files = names(store)
    assert sum(map(is_index, files)) == 1 and "reference.json" in files
    assert all(is_part(name) or is_index(name) or name == "reference.json" for name in files), "no litter"
    undisturbed = filled(tmp_path / "undisturbed", 600)
    export(store.folder, tmp_path / "a.jsonl")
    export(undisturbed.folder, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def corrupt(folder: Path, generator: random.Random) -> tuple[str, str, bool]:
    """One random damage. Returns its kind, the file's name, and whether its size and time are as before."""
    files = sorted(folder.iterdir())
    kind = generator.choice(["truncate", "flip", "delete", "swap"])
    target = generator.choice(files if generator.random() < 0.5 else [file for file in files if is_part(file.name)])
    if kind == "swap":
        target, other = generator.sample([file for file in files if is_part(file.name)], 2)
        one, two = target.read_bytes(), other.read_bytes()
        damages = [(target, two), (other, one)]
    elif kind == "delete":
        target.unlink()
        return kind, target.name, False
    else:
        data = bytearray(target.read_bytes())
        place = generator.randrange(len(data))
        if kind == "flip":
            data[place] ^= 1 << generator.randrange(8)
        damages = [(target, bytes(data if kind == "flip" else data[:place]))]
    hidden = generator.random() < 0.5  # as a bad disk does it: without a trace in the file's time
    for file, data in damages:
        time_before = file.stat().st_mtime_ns
        file.write_bytes(data)
        if hidden:
            os.utime(file, ns=(time_before, time_before))
    return kind, target.name, hidden and kind != "truncate"


def test_200_corruptions_are_detected_and_serve_no_wrong_value(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    count, generator = 80, random.Random(1)
    whole = Path(filled(tmp_path / "whole", count, 20).folder)
    keys, truth = rows(*range(count))
    kinds = set()
    for number in range(200):
        root = tmp_path / str(number)
        folder = root / whole.name
        shutil.copytree(whole, folder)  # keeps the times
        kind, name, hidden = corrupt(folder, generator)
        kinds.add((kind, name.split("-")[0]))
        caplog.clear()
        store = ReferenceStore(root, DESCRIPTION)
        at_opening = bool(caplog.records)
        found, logps, num_tokens = store.lookup(keys)
        for i in np.flatnonzero(found):
            assert (logps[i], num_tokens[i]) == (sequence_logp(truth[i]), len(truth[i])), (kind, name)
        for start in range(0, count, 20):  # of one part
            here = start + np.flatnonzero(found[start : start + 20])
            with suppress(ValueError):
                served = store.token_logps(keys[here])
                assert all(np.array_equal(a, truth[i]) for a, i in zip(served, here, strict=True)), (kind, name)
        report = verify(folder)
        if (kind, is_index(name)) == ("delete", True):
            assert any(map(is_index, names(store))), "nothing is lost: it is made again"
        else:
            assert caplog.records or report.damaged or report.missing, (kind, name)
            assert at_opening or hidden, "what a file's size or time tells is seen at opening"
        with ReferenceStore(root, DESCRIPTION) as store:
            store.add(keys, truth)
            recomputed = store.computed
        assert recomputed <= 40 and (recomputed > 0) == is_part(name), (kind, name)
        assert_serves(ReferenceStore(root, DESCRIPTION), count)
        report = verify(folder)
        assert (report.damaged, report.missing, report.rows) == ((), (), count)
        shutil.rmtree(root)
    assert len(kinds) >= 10, kinds


def test_what_is_not_a_part_of_ours_is_told_and_left_alone(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "dpo_fast")
    store = filled(tmp_path, 30)
    folder = Path(store.folder)
    (folder / "notes.txt").write_text("mine")
    table = pq.read_table(next(folder.glob("part-*"))).rename_columns(["key", "n", "logp", "token_logps"])
    pq.write_table(table, folder / "other.parquet")
    data = (folder / "other.parquet").read_bytes()
    foreign = f"part-{hexadecimal_hash(data)}.parquet"
    (folder / "other.parquet").rename(folder / foreign)
    old, young = folder / f"{WRITING}old", folder / f"{WRITING}young"
    for file in (old, young):
        file.touch()
    os.utime(old, (1.0, 1.0))
    assert_serves(ReferenceStore(tmp_path, DESCRIPTION), 30)
    assert "has other columns (key, n, logp, token_logps)" in caplog.text and (folder / f"{foreign}.damaged").exists()
    assert (folder / "notes.txt").read_text() == "mine" and caplog.text.count("notes.txt") == 1
    assert young.exists() and not old.exists()
    assert verify(folder).foreign == ("notes.txt",)


def test_a_part_is_read_once_for_all_its_rows(tmp_path, monkeypatch):
    store, read, original = filled(tmp_path, 60, 20), [], Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, name: read.append(name) or original(self, name))
    store.token_logps(rows(*range(60), *range(60))[0])
    assert len(read) == 3


def test_refresh_finds_what_others_wrote_and_what_was_lost(tmp_path, caplog):
    mine, other = ReferenceStore(tmp_path, DESCRIPTION), ReferenceStore(tmp_path, DESCRIPTION)
    other.add(*rows(*range(20)))
    other.flush()
    other.refresh()
    assert mine.num_rows == 0
    mine.refresh()
    assert_serves(mine, 20)
    (part,) = Path(mine.folder).glob("part-*")
    part.unlink()
    mine.refresh()
    assert_serves(mine, 0)
    assert part.name in caplog.text


def test_export_is_sorted_and_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(maintenance, "EXPORT_BYTES", 1000)
    store = filled(tmp_path, 300, 50)
    with ReferenceStore(tmp_path, DESCRIPTION) as twin:  # a second value of a key, in a part of its own
        twin._pending[tuple(rows(3)[0][0].tolist())] = values(3)
    expected = sorted((key(i).hex(), len(values(i)), sequence_logp(values(i)), values(i).tolist()) for i in range(300))
    export(store.folder, tmp_path / "rows.parquet")
    table = pq.read_table(tmp_path / "rows.parquet")
    assert pq.read_metadata(tmp_path / "rows.parquet").num_row_groups > 1
    assert [tuple(row.values()) for row in table.to_pylist()] == expected
    export(store.folder, tmp_path / "rows.jsonl")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == expected


def test_info_and_prune_know_the_stores_of_a_root(tmp_path):
    used, old = filled(tmp_path, 30), filled(tmp_path, 20, description={"weights": "old"})
    (tmp_path / "not a store").mkdir()
    stores = {store.folder: store for store in info(tmp_path)}
    assert stores.keys() == {used.folder, old.folder}
    assert stores[old.folder].description == {"weights": "old"}
    assert (stores[old.folder].rows, stores[used.folder].rows) == (20, 30)
    for file in Path(old.folder).iterdir():
        os.utime(file, (time.time() - 10 * 86400,) * 2)
    aside = Path(used.folder) / f"part-{0:032x}.parquet.damaged"
    aside.write_bytes(b"1234")
    assert abs({store.folder: store for store in info(tmp_path)}[old.folder].modified - time.time() + 864000) < 100
    size = sum(file.stat().st_size for file in Path(old.folder).iterdir()) + 4
    expected = {*(str(file) for file in Path(old.folder).iterdir()), str(aside)}
    for dry_run in (True, False):
        assert Path(old.folder).exists()
        removed, removed_bytes = prune(tmp_path, 9, dry_run)
        assert (set(removed), removed_bytes) == (expected, size)
    assert not Path(old.folder).exists() and not aside.exists()
    assert_serves(ReferenceStore(tmp_path, DESCRIPTION), 30)
    assert prune(tmp_path, 9) == ([], 0)


def test_opening_a_store_counts_as_using_it(tmp_path):
    folder = Path(filled(tmp_path, 10).folder)
    old = time.time() - 10 * 86400
    for _ in range(2):  # the first time, the index is written anew: parts have another time
        for file in folder.iterdir():
            os.utime(file, (old, old))
        assert len(prune(tmp_path, 9, dry_run=True)[0]) == 3
        ReferenceStore(tmp_path, DESCRIPTION)
    assert {file.name for file in folder.iterdir() if file.stat().st_mtime > old + 1} == {"reference.json"}
    assert prune(tmp_path, 9) == ([], 0)
