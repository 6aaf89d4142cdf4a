"""The folder of a reference store, on any filesystem that fsspec knows: its files, seen whole or not at all."""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

logger = logging.getLogger(__name__)

WRITING = ".writing-"
DESCRIPTION = "reference.json"
DAMAGED = ".damaged"
DAY = 86_400.0


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

    def path(self, name: str) -> str:
        return f"{self._path}/{name}"

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
            self.remove(temporary)
            raise
        return name

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


def is_ours(name: str) -> bool:
    return name.startswith(WRITING) or name == DESCRIPTION or is_part(name) or is_index(name) or is_aside(name)


def is_aside(name: str) -> bool:
    return name.endswith(DAMAGED) and is_ours(name.removesuffix(DAMAGED))


def is_stale(name: str, file: File) -> bool:
    """Whether a file was never finished, its writer long gone."""
    return name.startswith(WRITING) and file.modified is not None and time.time() - file.modified > DAY


def write_bytes(folder: Folder, name: str, data: bytes) -> str:
    def fill(file: BinaryIO) -> str:
        file.write(data)
        return name

    return folder.write(fill)


def set_aside(folder: Folder, name: str, reason: str, what_follows: str = "its rows are recomputed") -> None:
    folder.rename(name, name + DAMAGED)
    logger.warning("%s %s: set aside as %s, %s", folder.path(name), reason, name + DAMAGED, what_follows)
