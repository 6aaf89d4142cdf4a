"""Notes in a store's folder of what audits have found right: `audited-<checksum>.json`.

A note says, for one environment, of how many rows of each part a full sample was drawn; null is a part that was written
there, which counts as a whole. A run that reads more of a part's rows than the notes say samples in full again.
"""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from dpo_fast.reference.fingerprint import digest_of
from dpo_fast.reference.store.files import UNWRITABLE, Folder, hexadecimal_hash, is_note, write_bytes

# Packages that compute log-probs.
_PACKAGES = ("torch", "triton", "transformers", "dpo-fast", "flash-attn", "liger-kernel", "kernels", "numpy")


def environment() -> dict[str, object]:
    """Return what may change log-probs and is not part of what a store is named after."""
    cuda = torch.cuda.is_available()
    return {
        **{name: _version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name()
        if cuda
        else [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "cuda": [torch.version.cuda, torch.version.hip],
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "precision": torch.get_float32_matmul_precision(),
        "reduced": [
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        ],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@functools.cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class AuditNotes:
    """What earlier audits of a store have covered in this environment.

    Args:
        folder: of the store; where it may only be read, nothing is noted.
    """

    def __init__(self, folder: str):
        self._folder, self._environment = Folder(folder), digest_of(environment())
        self._rows: dict[str, int | None] = {}
        self._names: set[str] = set()
        for name in filter(is_note, self._folder.list()):
            with suppress(*UNWRITABLE, ValueError):  # removed meanwhile, or damaged
                self._read(name, self._folder.read(name))
        self._before = dict(self._rows)

    def _read(self, name: str, data: bytes) -> None:
        note = json.loads(data)
        if name == _name(data) and note["environment"] == self._environment:
            self._names.add(name)
            self._rows = _most(self._rows, note["parts"])

    def cover(self, part: str, rows: int) -> bool:
        """Whether an earlier run drew a full sample of at least so many rows of a part."""
        known = self._before.get(part, 0)
        return known is None or known >= rows

    def add(self, parts: Mapping[str, int | None]) -> None:
        """Note how many rows of parts were found right; replaces the notes that say less."""
        rows = _most(self._rows, parts)
        if rows == self._rows:
            return
        self._rows = rows
        data = json.dumps({"environment": self._environment, "parts": self._rows}, sort_keys=True).encode()
        with suppress(*UNWRITABLE):
            name = write_bytes(self._folder, _name(data), data)
            for old in self._names - {name}:
                self._folder.remove(old)
            self._names = {name}


def _name(data: bytes) -> str:
    return f"audited-{hexadecimal_hash(data)}.json"


def _most(one: Mapping[str, int | None], other: Mapping[str, int | None]) -> dict[str, int | None]:
    """For each part the larger number; None is the largest."""
    rows = {**one, **other}
    for name in one.keys() & other.keys():
        rows[name] = None if None in (one[name], other[name]) else max(one[name], other[name])
    return rows
