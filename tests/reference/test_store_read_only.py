"""A store that may only be read serves what it has and says in a line what it cannot do; a full disk loses nothing."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from datasets import concatenate_datasets
from fsspec.implementations.memory import MemoryFileSystem

from dpo_fast import cli
from dpo_fast.errors import InputError
from dpo_fast.reference.reference import Reference
from dpo_fast.reference.store import store as store_module
from dpo_fast.reference.store.files import DESCRIPTION as FILE
from dpo_fast.reference.store.files import Folder, is_index, is_part
from dpo_fast.reference.store.maintenance import info, verify
from dpo_fast.reference.store.store import ReferenceStore
from preferences import make_trainer, pairs
from stores import DESCRIPTION, assert_serves, filled, names, rows


@contextmanager
def refusing(root: str, error: Exception | None = None) -> Iterator[None]:
    """Nothing can be written anywhere."""

    def refuse(self, *arguments, **options):
        raise error or OSError(errno.EROFS, "Read-only file system")

    def make(self):
        if not self.list() and not self.list(folders=True):
            refuse(self)

    with pytest.MonkeyPatch.context() as patch:
        if "://" in root:
            for name in ("put_file", "pipe_file", "mv", "rm_file", "rmdir"):
                patch.setattr(MemoryFileSystem, name, refuse)
        else:
            for name in ("write", "touch", "rename", "remove"):
                patch.setattr(Folder, name, refuse)
        patch.setattr(Folder, "make", make)
        yield


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path) -> str:
    return str(tmp_path / "root") if request.param == "local" else f"memory://read-only-{uuid.uuid4().hex}"


def remove(store: ReferenceStore, which: Callable[[str], bool]) -> None:
    folder = Folder(store.folder)
    for name in filter(which, folder.list()):
        folder.remove(name)


@pytest.mark.parametrize("error", [None, PermissionError(errno.EACCES, "Permission denied"), NotImplementedError()])
@pytest.mark.parametrize("lacking", ["nothing", "index", "description", "both"])
def test_a_complete_store_serves(root, caplog, lacking, error):
    store = filled(root, 60, 20)
    if lacking in ("index", "both"):
        remove(store, is_index)
    if lacking in ("description", "both"):
        remove(store, lambda name: name == FILE)
    before = names(store)
    with refusing(root, error):
        with ReferenceStore(root, DESCRIPTION) as store:
            assert_serves(store, 60)
            store.expect_additions(rows(*range(60))[0])
            store.refresh()
            store.save()
            store.add(*rows(*range(60)))
        assert_serves(store, 60)
        assert [one.rows for one in info(root)] == [60]
    assert names(store) == before
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == (lacking in ("index", "both")), "at most one, and of what costs time"


def test_many_rows_that_no_index_covers_stay_in_memory(root, monkeypatch):
    monkeypatch.setattr(store_module, "ROWS_IN_MEMORY", 10)
    store = filled(root, 60, 20)
    remove(store, is_index)
    with refusing(root), ReferenceStore(root, DESCRIPTION) as store:
        assert_serves(store, 60)


def test_what_it_lacks_is_said_before_it_is_computed(root):
    filled(root, 40, 20)
    with refusing(root), ReferenceStore(root, DESCRIPTION) as store:
        with pytest.raises(InputError, match="reference_cache_dir: .* lacks 5 reference log-probs and") as error:
            store.expect_additions(rows(*range(45), 44)[0])
        assert "\n" not in str(error.value) and "Read-only" in str(error.value)
    with refusing(root), pytest.raises(InputError, match="reference_cache_dir: .* cannot be written"):
        ReferenceStore(root, {"another": "model"})


def test_what_is_damaged_is_not_served_and_told(root, caplog):
    store = filled(root, 60, 20)
    folder = Folder(store.folder)
    damaged, foreign = [name for name in folder.list() if is_part(name)][0], filled(root, 20, 20, {"weights": "x"})
    folder.fs.pipe_file(folder.path(damaged), folder.read(damaged)[:-1])
    (part,) = filter(is_part, Folder(foreign.folder).list())
    folder.fs.pipe_file(folder.path(part), Folder(foreign.folder).read(part))
    before = names(store)
    with refusing(root):
        store = ReferenceStore(root, DESCRIPTION)
        for _ in range(2):
            assert store.num_rows == 40 and store.lookup(rows(*range(60))[0])[0].sum() == 40
            store.token_logps(rows(*range(60))[0][store.lookup(rows(*range(60))[0])[0]])
            store.refresh()
        assert caplog.text.count("does not match its checksum") == 1, "told once"
        report = verify(store.folder)
    assert set(report.damaged) == {damaged, part} and report.rows == 40
    for name, reason in ((damaged, "does not match its checksum"), (part, "belongs to another store")):
        assert reason in report.reasons[name] and "cannot be set aside: " in report.reasons[name]
    assert names(store) == before


def test_damage_that_shows_late_is_not_served(root):
    """Where the file's size and time are as before."""
    store = filled(root, 20, 20)
    folder = Folder(store.folder)
    (part,) = filter(is_part, folder.list())
    data = bytearray(folder.read(part))
    data[100] ^= 1
    stat = folder.stat(part)
    if folder.local:
        Path(folder.path(part)).write_bytes(data)
        os.utime(folder.path(part), (stat.modified, stat.modified))
    else:
        created = folder.fs.store[folder.path(part)].created
        folder.fs.pipe_file(folder.path(part), bytes(data))
        folder.fs.store[folder.path(part)].created = created
    with refusing(root):
        store = ReferenceStore(root, DESCRIPTION)
        for _ in range(2):
            with pytest.raises(ValueError, match="keys: 3 of 3 have no token log-probs"):
                store.token_logps(rows(0, 1, 2)[0])
        assert not store.lookup(rows(0)[0])[0].any(), "known as lost from then on"
        assert store.lost_rows()


def test_parts_of_before_cannot_be_adopted_and_serve_still(tmp_path, caplog):
    shutil.copytree(Path(__file__).parents[1] / "compatibility" / "store", tmp_path / "root")
    with refusing(str(tmp_path / "root")):
        store = ReferenceStore(tmp_path / "root", DESCRIPTION)
        count, old = store.num_rows, store.unnamed_parts
        assert count == 6 and len(old) == 1
        store.adopt(old)
        assert (store.num_rows, store.unnamed_parts) == (count, old) and "stay as they are" in caplog.text
        store.reject(old, "holds what the reference does not say")
        assert (store.num_rows, store.unnamed_parts) == (0, [])
        store.refresh()
        assert store.num_rows == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_costs_one_line_and_no_row(root, number):
    store = ReferenceStore(root, DESCRIPTION)
    store.add(*rows(*range(20)))
    store.flush()
    store.refresh()
    store.add(*rows(*range(20, 30)))
    with refusing(root, OSError(number, os.strerror(number))):
        store.flush()
        store._write.exception()
        words = rf"reference_cache_dir: .* cannot be written \(.*{os.strerror(number)}"
        with pytest.raises(InputError, match=words) as error:
            store.add(*rows(30))
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match="free space there"):
            store.close()
        assert ReferenceStore(root, DESCRIPTION).num_rows == 20, "what was written is there"
    store.add(*rows(30))
    store.close()
    assert_serves(ReferenceStore(root, DESCRIPTION), 31)


def test_a_disk_that_fills_while_a_file_is_written_leaves_no_litter(tmp_path, monkeypatch):
    store = filled(tmp_path, 20)
    before = names(store)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        store.add(*rows(20))
        with pytest.raises(InputError, match="No space left on device"):
            store.close()
    assert names(store) == before
    store.close()
    assert_serves(ReferenceStore(tmp_path, DESCRIPTION), 21)


def test_an_index_that_finds_no_space_is_done_without(tmp_path, monkeypatch, caplog):
    filled(tmp_path, 20)
    original = Folder.write
    monkeypatch.setattr(Folder, "write", lambda self, fill: no_index(self, fill, original))
    with ReferenceStore(tmp_path, DESCRIPTION) as store:
        store.add(*rows(*range(20, 40)))
    assert_serves(store, 40)
    assert caplog.text.count("no index written") == 1
    monkeypatch.undo()
    assert_serves(ReferenceStore(tmp_path, DESCRIPTION), 40)


def no_index(folder, fill, write):
    if "write_index" in fill.__qualname__:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(folder, fill)


def test_a_run_on_a_store_that_may_only_be_read(tmp_path, monkeypatch):
    """Complete: it trains. Not complete: it says so before a forward pass."""
    make_trainer(tmp_path, pairs(20))
    expected = make_trainer(tmp_path, pairs(20)).train_dataset["ref_logps"]
    scored: list[int] = []
    original = Reference.score
    monkeypatch.setattr(Reference, "score", lambda self, packed: scored.append(1) or original(self, packed))
    with refusing(str(tmp_path)):
        assert make_trainer(tmp_path, pairs(20)).train_dataset["ref_logps"] == expected
        scored.clear()
        with pytest.raises(InputError, match="reference_cache_dir: .* lacks 10 reference log-probs"):
            make_trainer(tmp_path, concatenate_datasets([pairs(20), pairs(5, seed=77), pairs(5, seed=77)]))
    assert not scored


def test_the_command_reports_what_it_cannot_set_aside(tmp_path, capsys):
    store = filled(tmp_path, 20)
    (part,) = Path(store.folder).glob("part-*")
    part.write_bytes(part.read_bytes()[:-1])
    with refusing(str(tmp_path)):
        assert cli.main(["cache", "--verify", "--reference_cache_dir", str(tmp_path)]) == 1
        out = capsys.readouterr().out
        assert f"damaged: {part.name} (does not match its checksum, and cannot be set aside: " in out
    with ReferenceStore(tmp_path, DESCRIPTION):
        assert cli.main(["cache", "--prune", "0", "--reference_cache_dir", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert f"in use, left alone: {store.folder}" in out and "removed 0 files" in out
    with refusing(str(tmp_path), PermissionError(errno.EACCES, "Permission denied")):
        assert cli.main(["cache", "--prune", "0", "--reference_cache_dir", str(tmp_path)]) == 2
        assert "Permission denied" in capsys.readouterr().err.split("\n")[-2]


def test_another_user_may_read_a_store():
    """With the system's own permissions, which do not hold root back: the reader becomes another user."""
    root = Path(tempfile.mkdtemp(prefix="dpo_fast-read_only-"))
    try:
        store = filled(root, 60, 20)
        before = names(store)
        for path in [*root.rglob("*"), root]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                with ReferenceStore(root, DESCRIPTION) as reader:
                    assert_serves(reader, 60)
                    try:
                        reader.expect_additions(rows(61)[0])
                    except InputError as error:
                        status = 0 if "lacks 1 reference" in str(error) and not verify(store.folder).damaged else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert names(store) == before and [path.name for path in root.iterdir()] == [Path(store.folder).name]
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(root)
