"""Leases: what tells those who prune that somebody uses a store.

A lease is a file `<store>.in-use-<id>` beside the store's folder, whose time a thread keeps recent. It goes when the
store is closed. One that a process has left behind counts for some hours, so that a run that was interrupted finds its
store again. Where the lease cannot be written the store is used without one.

Whoever removes files of a store marks its folder first, then looks for leases. Whoever opens a store takes the lease
first, then looks for marks, and waits until they are gone. So at least one of two sees the other.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from contextlib import suppress

from dpo_fast.reference.store.files import PRUNING, UNWRITABLE, File, Folder

logger = logging.getLogger(__name__)

IN_USE = ".in-use-"
EXPIRES = 6 * 3600.0  # seconds
BEAT = 300.0
PATIENCE = 60.0  # with somebody who prunes and shows no sign of life; the mark is renewed three times as often

_held: dict[str, tuple[Folder, str]] = {}  # path → the file of a lease of this process
_thread: threading.Thread | None = None


class Lease:
    """The lease of one user of a store, not taken yet."""

    def __init__(self, folder: Folder):
        folder = folder.real
        self._parent, self._prefix = folder.parent, f"{folder.name}{IN_USE}{uuid.uuid4().hex}"

    @property
    def _name(self) -> str:
        return f"{self._prefix}-{os.getpid()}"  # after a fork there are two users

    def take(self) -> None:
        """Take it, unless it is held."""
        global _thread
        path = self._parent.path(self._name)
        if path in _held:
            return
        try:
            self._parent.touch(self._name)
        except UNWRITABLE as error:
            logger.debug("%s cannot be written (%s): a prune will not see that the store is in use", path, error)
            return
        _held[path] = (self._parent, self._name)
        if _thread is None:
            _thread = threading.Thread(target=_keep_recent, name="dpo_fast-leases", daemon=True)
            _thread.start()

    def release(self) -> None:
        """Give it back, if it is held."""
        if held := _held.pop(self._parent.path(self._name), None):
            with suppress(*UNWRITABLE):
                held[0].remove(held[1])


def _keep_recent() -> None:
    while True:
        time.sleep(BEAT)
        for path, (folder, name) in list(_held.items()):
            with suppress(Exception):  # of a filesystem that is away for a while
                folder.touch(name)
                if path not in _held:  # released meanwhile
                    folder.remove(name)
                remove_expired(folder)


def _forget() -> None:
    global _thread
    _thread = None
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def in_use(folder: Folder) -> bool:
    """Whether somebody uses a store, or did in the last hours without closing it."""
    folder = folder.real
    files = folder.parent.list()
    return any(name.startswith(folder.name + IN_USE) and not _expired(file.modified) for name, file in files.items())


def _expired(modified: float | None) -> bool:
    return modified is not None and time.time() - modified > EXPIRES


def remove_expired(root: Folder) -> None:
    """Remove leases that processes have left behind long ago."""
    for name, file in root.list().items():
        if IN_USE in name and _expired(file.modified):
            root.remove(name)


def wait_for_prune(folder: Folder) -> None:
    """Wait until nobody removes files of a folder whose lease was taken."""
    marks: dict[str, File] = {}
    since = time.monotonic()
    while now := {name: file for name, file in folder.list().items() if name.startswith(PRUNING)}:
        if all(_expired(file.modified) for file in now.values()):  # of prunes that were killed
            return
        if now != marks:
            marks, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            return
        time.sleep(0.02)


def remove_unless_in_use(folder: Folder, names: list[str]) -> list[str]:
    """Remove files of a store that nobody uses; return those that were removed."""
    removed: list[str] = []
    mark, marked = PRUNING + uuid.uuid4().hex, -PATIENCE
    try:
        for name in names:
            if time.monotonic() - marked > PATIENCE / 3:
                marked = time.monotonic()
                folder.touch(mark)
                if in_use(folder):
                    break
            folder.remove(name)
            removed.append(name)
    except FileNotFoundError:  # somebody else has removed the folder
        pass
    finally:
        folder.remove(mark)
    return removed
