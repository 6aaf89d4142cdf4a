"""The folder of a reference store, on any filesystem that fsspec knows: its files, seen whole or not at all."""

from __future__ import annotations

import copy
import datetime
import errno
import hashlib
import json
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dpo_fast.errors import InputError

logger = logging.getLogger(__name__)

WRITING = ".writing-"
PRUNING = ".pruning-"  # a mark of whoever is removing the files of a folder
TEMPORARY = (WRITING, PRUNING)
DESCRIPTION = "reference.json"
DAMAGED = ".damaged"
DAY = 86_400.0
UNWRITABLE = (OSError, NotImplementedError)  # what a place that may only be read says


class File(NamedTuple):
    """What a listing says of a file; two of the same name that differ in it are two contents."""

    size: int
    modified: float | None  # seconds since 1970; None where the filesystem does not tell


class Folder:
    """One folder of any fsspec filesystem, whose files are seen whole or not at all.

    Attributes:
        url: where it lies, a plain path on the local filesystem.
        name: the last piece of it.
    """

    def __init__(self, url: str | os.PathLike[str]):
        self.fs, path = fsspec.core.url_to_fs(os.fspath(url))
        self._path = path.rstrip("/")
        self.name = self._path.rpartition("/")[2]
        self.local = isinstance(self.fs, LocalFileSystem)
        self.url = self._path if self.local else self.fs.unstrip_protocol(self._path)

    @property
    def parent(self) -> Folder:
        """Return the folder that it lies in."""
        above = copy.copy(self)
        above._path, above.url = (path.rpartition("/")[0] for path in (self._path, self.url))
        above.name = above._path.rpartition("/")[2]
        return above

    @property
    def real(self) -> Folder:
        """Return the folder that a link leads to; itself, where it is none."""
        return Folder(os.path.realpath(self._path)) if self.local and os.path.islink(self._path) else self

    @property
    def scratch(self) -> str | None:
        """Return where large temporary files may lie; None for the system's own place."""
        return self._path if self.local and os.access(self._path, os.W_OK) else None

    def path(self, name: str) -> str:
        return f"{self._path}/{name}"

    def make(self) -> None:
        """Make it, and those above, where it is not there."""
        self.fs.makedirs(self._path, exist_ok=True)

    def list(self, folders: bool = False) -> dict[str, File]:
        """Its files (or its folders), by name; none where there is no such folder."""
        if self.local:  # fsspec's listing raises when a file goes away while it lists
            return dict(_local_files(self._path, folders))
        self.fs.invalidate_cache(self._path)
        try:
            infos = self.fs.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        infos = [info for info in infos if (info["type"] == "directory") == folders]
        return {info["name"].rstrip("/").rpartition("/")[2]: _file(info) for info in infos}

    def stat(self, name: str) -> File:
        return _file(self.fs.info(self.path(name)))

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(self.path(name))

    def write(self, fill: Callable[[BinaryIO], str]) -> str:
        """Writes a file that `fill` fills and names, under a temporary name, then renames it. Returns the name."""
        temporary = WRITING + uuid.uuid4().hex
        try:
            with open(self.path(temporary), "xb") if self.local else tempfile.NamedTemporaryFile() as file:
                name = fill(file)
                file.flush()
                if self.local:
                    os.fsync(file.fileno())
                else:
                    self.fs.put_file(file.name, self.path(temporary))
            self._move(temporary, name)
        except BaseException:
            with suppress(*UNWRITABLE):
                self.remove(temporary)
            raise
        return name

    def touch(self, name: str) -> None:
        """Write a file without content, whose time counts."""
        if self.local:  # an eighth of the time that fsspec takes
            with open(self.path(name), "wb"):
                os.utime(self.path(name))
        else:
            self.fs.pipe_file(self.path(name), b"")

    def _move(self, name: str, new: str) -> None:
        if self.local:
            os.replace(self.path(name), self.path(new))
        else:
            self.fs.mv(self.path(name), self.path(new))

    def rename(self, name: str, new: str) -> None:
        """Renames a file; one that another process has taken away is no error."""
        with suppress(FileNotFoundError):
            self._move(name, new)

    def remove(self, name: str) -> None:
        """Removes a file; one that is not there is no error."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))


def _local_files(path: str, folders: bool) -> Iterator[tuple[str, File]]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                stat = os.stat(entry.path)
                if entry.is_dir() == folders:
                    yield entry.name, File(stat.st_size, stat.st_mtime)


def _file(info: dict[str, Any]) -> File:
    """Size and time of an fsspec entry: each filesystem has its own word and type for the time."""
    words = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
    modified = next((info[word] for word in words if info.get(word) is not None), None)
    if isinstance(modified, str):
        modified = datetime.datetime.fromisoformat(modified.replace("Z", "+00:00"))
    if isinstance(modified, datetime.datetime):
        modified = modified.timestamp()
    return File(info.get("size") or 0, modified)


def hexadecimal_hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def is_part(name: str) -> bool:
    return re.fullmatch(r"part-[0-9a-f]{32}\.parquet", name) is not None


def is_index(name: str) -> bool:
    return re.fullmatch(r"index-[0-9a-f]{32}\.arrow", name) is not None


def is_note(name: str) -> bool:
    """Whether a file says what an audit has covered."""
    return re.fullmatch(r"audited-[0-9a-f]{32}\.json", name) is not None


def is_ours(name: str) -> bool:
    files = name == DESCRIPTION or name.startswith(TEMPORARY) or is_note(name)
    return files or is_part(name) or is_index(name) or is_aside(name)


def is_aside(name: str) -> bool:
    return name.endswith(DAMAGED) and is_ours(name.removesuffix(DAMAGED))


def is_description(data: bytes) -> bool:
    """Whether a file is a store's description, as far as its form tells."""
    try:
        return data == json.dumps(json.loads(data), sort_keys=True, indent=2).encode()
    except ValueError:
        return False


def is_stale(name: str, file: File) -> bool:
    """Whether a file was never finished, its writer long gone."""
    return name.startswith(TEMPORARY) and file.modified is not None and time.time() - file.modified > DAY


def write_bytes(folder: Folder, name: str, data: bytes) -> str:
    def fill(file: BinaryIO) -> str:
        file.write(data)
        return name

    return folder.write(fill)


def discard(folder: Folder, name: str) -> None:
    """Remove a file that nobody needs; where files may only be read it stays."""
    with suppress(*UNWRITABLE):
        folder.remove(name)


def set_aside(
    folder: Folder, reasons: Mapping[str, str], what_follows: str = "their rows are recomputed"
) -> dict[str, str]:
    """Set files aside, for a reason each, with one warning for all; return those where this fails, and why.

    Through a link of another name nothing is set aside: there, files are what they ought to be.
    """
    linked = bool(reasons) and folder.real.name != folder.name
    kept = dict.fromkeys(reasons, f"a link to {folder.real.url}") if linked else {}
    for name in reasons.keys() - kept.keys():
        try:
            folder.rename(name, name + DAMAGED)
        except UNWRITABLE as error:
            kept[name] = str(error)
    if reasons:
        shown = [f"{name} {reason}" for name, reason in [*reasons.items()][:5]]
        more = [f"and {len(reasons) - 5} more"] if len(reasons) > 5 else []
        how = f"not used ({len(kept)} cannot be renamed: {min(kept.values())})" if kept else f"set aside as *{DAMAGED}"
        logger.warning("%s: %s, %s: %s", folder.url, how, what_follows, "; ".join([*shown, *more]))
    return kept


def cannot_write(error: BaseException) -> bool:
    """Whether it is the place that an error speaks of: full, or only to be read."""
    places = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
    return isinstance(error, PermissionError | NotImplementedError) or getattr(error, "errno", None) in places


def unwritable(folder: Folder, error: BaseException, lacking: int = 0) -> InputError:
    """Return what a user reads of a store's place, and of how many log-probs it ought to get."""
    lacks = f"lacks {lacking} reference log-probs and " if lacking else ""
    return InputError(
        f"reference_cache_dir: {folder.url} {lacks}cannot be written ({error}); free space there, or name a folder "
        "that can be written; what was written before is kept"
    )
