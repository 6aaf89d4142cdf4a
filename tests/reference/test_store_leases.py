"""Nobody prunes what a run uses, and a run whose folder goes away makes it again and loses nothing that it has."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC
from pathlib import Path

import numpy as np
import pytest

from dpo_fast.reference.store import lease
from dpo_fast.reference.store import store as store_module
from dpo_fast.reference.store.files import PRUNING, WRITING, Folder, is_part
from dpo_fast.reference.store.lease import IN_USE, in_use
from dpo_fast.reference.store.maintenance import prune, stores_in_use
from dpo_fast.reference.store.store import ReferenceStore
from stores import DESCRIPTION, assert_serves, filled, names, rows

HOURS_AGO = 7 * 3600.0


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path) -> str:
    return str(tmp_path / "root") if request.param == "local" else f"memory://leases-{uuid.uuid4().hex}"


def leases(root: str) -> list[str]:
    return [name for name in Folder(root).list() if IN_USE in name]


def age(root: str, name: str, seconds: float) -> None:
    """Makes a file look as if it was written long ago."""
    folder = Folder(root)
    if folder.local:
        os.utime(folder.path(name), (time.time() - seconds,) * 2)
    else:
        from datetime import datetime, timedelta

        folder.fs.store[folder.path(name)].created = datetime.now(UTC) - timedelta(seconds=seconds)


def test_a_store_is_in_use_from_its_opening_until_it_is_closed_or_collected(root):
    store = ReferenceStore(root, DESCRIPTION)
    assert stores_in_use(root) == [store.folder] and prune(root, 0) == ([], 0)
    store.add(*rows(*range(20)))
    store.save()
    assert prune(root, 0) == ([], 0), "a run that has saved goes on"
    other = ReferenceStore(root, DESCRIPTION)
    store.close()
    assert prune(root, 0) == ([], 0) and len(leases(root)) == 1, "the other one uses it"
    del other
    assert leases(root) == [] == stores_in_use(root)
    store.add(*rows(30))
    store.flush()
    assert prune(root, 0) == ([], 0), "it is used again after it was closed"
    store.close()
    again = ReferenceStore(root, DESCRIPTION)
    again.close()
    again.refresh()
    assert prune(root, 0) == ([], 0)
    assert_has(again, [*range(20), 30])
    again.close()
    removed, size = prune(root, 0)
    assert len(removed) == 4 and size > 0 and Folder(root).list(folders=True) == {} == Folder(root).list()


def assert_has(store: ReferenceStore, numbers: list[int]) -> None:
    keys, expected = rows(*numbers)
    served = store.token_logps(keys)
    assert all(np.array_equal(value, row) for value, row in zip(served, expected, strict=True))


def test_set_aside_and_unfinished_files_of_a_store_in_use_stay(root):
    store = filled(root, 20)
    folder = Folder(store.folder)
    for name in (f"part-{0:032x}.parquet.damaged", f"{WRITING}old"):
        folder.touch(name)
    age(store.folder, f"{WRITING}old", 2 * 86400)
    store.refresh()
    assert prune(root, 9) == ([], 0) == prune(root, 9, dry_run=True)
    store.close()
    assert len(prune(root, 9)[0]) == 2


def test_a_lease_that_was_left_behind_expires(root):
    store = ReferenceStore(root, DESCRIPTION)
    (name,) = leases(root)
    age(root, name, 3600)
    assert in_use(Folder(store.folder))
    age(root, name, HOURS_AGO)
    assert not in_use(Folder(store.folder))
    assert len(prune(root, 0, dry_run=True)[0]) == 1 and leases(root)
    assert len(prune(root, 0)[0]) == 1 and not leases(root)


def test_a_lease_is_kept_recent_while_the_program_waits(root, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "_thread", None)  # that of this process beats slowly
    beating = set(threading.enumerate())
    store = ReferenceStore(root, DESCRIPTION)
    try:
        (name,) = leases(root)
        dead = f"{'0' * 32}{IN_USE}dead"
        Folder(root).touch(dead)
        for file in (name, dead):
            age(root, file, HOURS_AGO)
        until = time.monotonic() + 10
        while (not in_use(Folder(store.folder)) or dead in leases(root)) and time.monotonic() < until:
            time.sleep(0.01)
        assert leases(root) == [name] and in_use(Folder(store.folder))
    finally:
        monkeypatch.undo()
        (thread,) = set(threading.enumerate()) - beating
        assert thread.daemon


def test_a_forked_process_does_not_give_back_the_lease_of_its_parent(tmp_path):
    store = ReferenceStore(tmp_path, DESCRIPTION)
    child = os.fork()
    if child == 0:
        store.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert stores_in_use(tmp_path) == [store.folder]


def test_who_opens_a_store_while_it_is_pruned_waits(root, monkeypatch):
    """At any moment of the prune: either it sees the lease and stops, or the store is opened when it is over."""
    for moment in range(6):
        filled(root, 40, 10)
        opened: list[ReferenceStore] = []
        openers: list[threading.Thread] = []
        steps = iter(range(100))
        original_remove, original_touch = Folder.remove, Folder.touch

        def open_at_moment(moment=moment, opened=opened, openers=openers, steps=steps):
            if threading.current_thread() is threading.main_thread() and next(steps) == moment:
                thread = threading.Thread(target=lambda: opened.append(ReferenceStore(root, DESCRIPTION)))
                openers.append(thread)
                thread.start()
                thread.join(0.1)

        def remove(self, name, original=original_remove, before=open_at_moment):
            before()
            original(self, name)

        def touch(self, name, original=original_touch, before=open_at_moment):
            if name.startswith(PRUNING):
                before()
            original(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "remove", remove)
            patch.setattr(Folder, "touch", touch)
            removed, _ = prune(root, 0)
        (thread,) = openers
        thread.join(10)
        (store,) = opened
        assert store.num_rows == (0 if removed else 40), moment
        assert (len(removed) == 6) == (moment > 0), "the first moment is before the mark is set"
        with store:
            store.add(*rows(*range(40)))
        assert_serves(ReferenceStore(root, DESCRIPTION), 40)
        assert not [name for name in names(store) if name.startswith(PRUNING)]
        del store
        opened.clear()
        assert len(prune(root, 0)[0]) in (3, 6)


def test_the_mark_of_a_prune_that_was_killed_delays_nobody_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "PATIENCE", 0.2)
    folder = Folder(filled(tmp_path, 10).folder)
    folder.touch(f"{PRUNING}killed")
    began = time.monotonic()
    assert_serves(ReferenceStore(tmp_path, DESCRIPTION), 10)
    assert 0.2 < time.monotonic() - began < 5
    monkeypatch.undo()
    age(str(folder.url), f"{PRUNING}killed", HOURS_AGO)
    began = time.monotonic()
    assert_serves(ReferenceStore(tmp_path, DESCRIPTION), 10)
    assert time.monotonic() - began < 30, "an old one delays nobody"


def take_away(store: ReferenceStore, what: str) -> None:
    folder = Folder(store.folder)
    if what == "everything":
        folder.fs.rm(folder.path("").rstrip("/"), recursive=True)
    elif what == "root":
        folder.fs.rm(folder.parent.path("").rstrip("/"), recursive=True)
    else:
        for name in filter(is_part, folder.list()):
            folder.fs.rm_file(folder.path(name))


@pytest.mark.parametrize("what", ["everything", "root", "parts"])
@pytest.mark.parametrize("when", ["before the first part", "between parts", "before the close", "after the close"])
def test_a_folder_that_has_gone_is_made_again_with_what_is_in_memory(root, what, when, caplog):
    store = ReferenceStore(root, DESCRIPTION)
    if when == "before the first part":
        take_away(store, what)
        store.add(*rows(*range(30)))
    else:
        store.add(*rows(*range(10)))
        store.flush()
        store.refresh()
        store.add(*rows(*range(10, 20)))
        if when == "after the close":
            store.close()
        take_away(store, what)
        if when == "between parts":
            store.flush()
            store._write.result()
            store.add(*rows(*range(20, 30)))
            assert not store.lookup(rows(0)[0])[0].any(), "what is gone is not served as known"
            assert store.lookup(rows(*range(10, 30))[0])[0].all(), "what is in memory was not lost"
        else:
            store.add(*rows(*range(20, 30)))
    store.close()
    again = ReferenceStore(root, DESCRIPTION)
    kept = {"before the first part": 0, "between parts": 10, "before the close": 10, "after the close": 20}[when]
    assert_has(again, [*range(kept, 30)])
    assert again.num_rows == 30 - kept
    assert store.lost_rows() == (kept > 0)
    assert "reference.json" in names(again) and not any("missing" in text for text in caplog.messages)
    with store:
        store.add(*rows(*range(30)))
    assert_serves(ReferenceStore(root, DESCRIPTION), 30)


def test_a_pass_computes_again_what_somebody_has_removed(tmp_path):
    """The whole way, with a model: the folder is removed while the pass runs."""
    from preferences import make_trainer, pairs

    expected = make_trainer(tmp_path / "whole", pairs(30)).train_dataset["ref_logps"]
    original, taken = ReferenceStore.add, []

    def add(self, keys, token_logps):
        original(self, keys, token_logps)
        self.flush()
        if len(taken) == 1:
            self._write.result()
            shutil.rmtree(self.folder)
        taken.append(keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceStore, "add", add)
        trainer = make_trainer(tmp_path / "cut", pairs(30), max_tokens_per_micro_batch=256)
    assert len(taken) > 3
    assert np.allclose(np.array(trainer.train_dataset["ref_logps"]), np.array(expected), atol=1e-4)


# ---- kills of writers under a pruner ----


def prune_all_the_time(root: str) -> None:
    while True:
        with suppress(FileNotFoundError):
            prune(root, 0)


def write_until_killed(root: str, noted: str, count: int) -> None:
    """Adds rows that are lacking, a part of ten each, and notes those that are in a part."""
    notes = os.open(noted, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with ReferenceStore(root, DESCRIPTION) as store:
        known = store.lookup(rows(*range(count))[0])[0]
        for start in range(0, count, 10):
            if not known[start : start + 10].all():
                store.add(*rows(*range(start, start + 10)))
                store.flush()
                store.refresh()
                os.write(notes, b"".join(b"%d\n" % number for number in range(start, start + 10)))
                time.sleep(0.003)


def kill_under_pruner(folder: Path, kills: int, count: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_store_leases"])
    root, noted = str(folder / "root"), folder / "noted"
    pruners = [context.Process(target=prune_all_the_time, args=(root,), daemon=True) for _ in range(2)]
    for pruner in pruners:
        pruner.start()
    done = 0
    try:
        for number in range(kills):
            writer = context.Process(target=write_until_killed, args=(root, str(noted), count))
            writer.start()
            until = time.monotonic() + 30
            while len(noted.read_text().split() if noted.exists() else []) < done + 30 and time.monotonic() < until:
                time.sleep(0.002)
            assert writer.exitcode is None, "the kill hits a writing process"
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
            written = noted.read_text().split()
            done = len(written)
            assert done == len(set(written)), "no row that was flushed was computed again"
            assert_kept(root, {int(line) for line in written}, number)
        last = context.Process(target=write_until_killed, args=(root, str(noted), count))
        last.start()
        last.join()
        assert last.exitcode == 0 and len(noted.read_text().split()) == count
    finally:
        for pruner in pruners:
            assert pruner.exitcode is None, "the pruner prunes to the end"
            os.kill(pruner.pid, signal.SIGKILL)
            pruner.join()
    assert_serves(ReferenceStore(root, DESCRIPTION), count)


def assert_kept(root: str, numbers: set[int], kill: int) -> None:
    store = ReferenceStore(root, DESCRIPTION)
    assert_has(store, sorted(numbers))
    assert not store.lost_rows(), kill


def test_three_writers_killed_under_a_pruner_lose_nothing(tmp_path):
    kill_under_pruner(tmp_path, 3, 300)


@pytest.mark.slow
def test_twenty_writers_killed_under_a_pruner_lose_nothing(tmp_path):
    kill_under_pruner(tmp_path, 20, 2000)


# ---- a kill loses seconds ----


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("batch", [1.0, 7.0, 45.0])
def test_parts_come_after_seconds_at_first_and_are_hundreds_in_the_end(tmp_path, monkeypatch, batch):
    clock = Clock()
    monkeypatch.setattr(store_module.time, "monotonic", clock.monotonic)
    flushes: list[float] = []
    monkeypatch.setattr(ReferenceStore, "flush", lambda self: flushes.append(clock.now) or counted(self))

    def counted(store):
        store._last_flush, store._flushes = clock.now, store._flushes + 1
        store._pending = {}

    store = ReferenceStore(tmp_path, DESCRIPTION)
    for number in range(int(36_000 / batch)):
        clock.now += batch
        store.add(*rows(number % 7))
    gaps = np.diff([0.0, *flushes])
    assert gaps[0] <= 5 + batch and max(gaps) <= 60 + batch, "what a kill loses"
    assert sum(np.array(flushes) <= 20) >= min(3, 20 // max(batch, 5)), "of a pass of 20 s"
    assert len(flushes) < 700


def test_a_slow_place_is_written_to_less_often(tmp_path):
    store = ReferenceStore(tmp_path, DESCRIPTION)
    assert store._seconds_per_part() == 5.0
    store._write_seconds = 0.2
    assert store._seconds_per_part() == pytest.approx(20.0)
    store._write_seconds = 3.0
    assert store._seconds_per_part() == 60.0


def slow_scores(root: str, noted: str) -> None:
    """A pass of 20 s: a row and a half a second."""
    notes = os.open(noted, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with ReferenceStore(root, DESCRIPTION) as store:
        for number in range(200):
            time.sleep(0.1)
            store.add(*rows(number))
            os.write(notes, b"%d\n" % number)


@pytest.mark.slow
def test_a_pass_of_twenty_seconds_that_is_killed_keeps_what_it_has(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(
        target=slow_scores, args=(str(tmp_path / "root"), str(tmp_path / "noted"))
    )
    process.start()
    process.join(19)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    computed = len((tmp_path / "noted").read_text().split())
    kept = ReferenceStore(tmp_path / "root", DESCRIPTION).num_rows
    assert computed > 100 and computed - kept <= 65, f"{kept} of {computed} rows kept, ten per second"
