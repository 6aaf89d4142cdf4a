"""Checksums of the files of a checkpoint, in one file beside them: what was damaged since is not resumed from.

    {"checksum": of what follows, "sealed": {"files": {name: [bytes, xxh3]}, "weights_only": …}}

The seal is written when all ranks have written their files, and trainer_state.json, which it covers too, after it. Each
rank reads a share of the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainerState

from dpo_fast.training.checkpoints import STATE_FILE

SEAL_FILE = "dpo_fast_checksums.json"
_NEW_STATE = f"{STATE_FILE}.new"
_SENTINEL = "checkpoint-is-incomplete.txt"  # of transformers' JITCheckpointCallback, there while it writes
_CHUNK = 2**22  # bytes

Checksums = dict[str, list[Any]]  # size in bytes and hash, by path in the checkpoint


@dataclass
class Seal:
    """The checksums of a checkpoint that is being written.

    Attributes:
        folder: the checkpoint.
        record: what the run is, for a file of its own.
        record_file: name of that file.
        weights_only: whether the checkpoint is without optimizer, schedule and generators.
    """

    folder: Path
    record: dict[str, Any]
    record_file: str
    weights_only: bool
    _known: Checksums = field(default_factory=dict)

    def read_share(self, accelerator: Accelerator) -> None:
        """Read all files, each rank a share of them; all ranks call it when all have written theirs."""
        for checksums in gather_object([checksums_of(self.folder, _share(_names(self.folder), accelerator))]):
            self._known |= checksums

    @contextmanager
    def before(self, state: TrainerState) -> Iterator[None]:
        """Let the file of `state` be written after the seal."""
        write = state.save_to_json

        def write_sealed(path: str) -> None:
            new = str(self.folder / _NEW_STATE)
            write(new)
            self._write()
            os.replace(new, path)

        state.save_to_json = write_sealed
        try:
            yield
        finally:
            del state.save_to_json

    def _write(self) -> None:
        _write(self.folder / self.record_file, _text(self.record))
        names = _names(self.folder)
        files = {name: self._known[name] for name in names if name in self._known and name != self.record_file}
        files |= checksums_of(self.folder, [name for name in names if name not in files])
        files[STATE_FILE] = checksums_of(self.folder, [_NEW_STATE])[_NEW_STATE]
        sealed = {"files": files, "weights_only": self.weights_only}
        _write(self.folder / SEAL_FILE, _sealed_text(sealed))


def damage(folder: Path, accelerator: Accelerator) -> str | None:
    """Return what a sealed checkpoint holds that is no good, of this rank's share of it."""
    try:
        text = (folder / SEAL_FILE).read_bytes().decode()
        sealed = json.loads(text)["sealed"]
        intact = text == _sealed_text(sealed)
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        return f"a damaged {SEAL_FILE}"
    if sealed["weights_only"]:
        return "weights alone, as save_only_model=True keeps them: optimizer and schedule cannot go on"
    names = _share(sorted(sealed["files"]), accelerator)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        return f"no complete {missing[0]}"
    found = checksums_of(folder, names)
    for name in names:
        if found[name] != sealed["files"][name]:
            shorter = found[name][0] < sealed["files"][name][0]
            return f"no complete {name}" if shorter else f"a damaged {name}: its checksum is another than when written"
    return None


def checksums_of(folder: Path, names: Iterable[str]) -> Checksums:
    """Return the checksums of some files of a folder."""
    names = list(names)
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(lambda name: _read(folder / name), names), strict=True))


def _read(file: Path) -> list[Any]:
    hashed, buffer, size = xxhash.xxh3_128(), memoryview(bytearray(min(_CHUNK, file.stat().st_size + 1))), 0
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            hashed.update(buffer[:count])
            size += count
    return [size, hashed.hexdigest()]


def _names(folder: Path) -> list[str]:
    """Every file but those that come last, or go."""
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return [name for name in files if name not in (SEAL_FILE, STATE_FILE, _NEW_STATE, _SENTINEL)]


def _share(names: list[str], accelerator: Accelerator) -> list[str]:
    return names[accelerator.process_index :: accelerator.num_processes]


def _sealed_text(sealed: dict[str, Any]) -> str:
    return _text({"checksum": xxhash.xxh3_128_hexdigest(_text(sealed).encode()), "sealed": sealed})


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _write(file: Path, text: str) -> None:
    file.write_bytes(text.encode())
