"""Fingerprints of checkpoints, remembered by the identity of their files, so that unchanged ones are not read again."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import transformers

from dpo_fast.reference.fingerprint import STORE_VERSION, digest_of


class FingerprintMemo:
    """Fingerprints by identity, in a JSON file; what is damaged or foreign there counts as absent."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def _read(self) -> dict[str, str]:
        try:
            entries = json.loads(self.path.read_bytes()).items()
        except (OSError, ValueError, AttributeError):
            return {}
        return {key: value for key, value in entries if isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value)}

    def get(self, identity: str) -> str | None:
        return self._read().get(identity)

    def remember(self, identity: str, fingerprint: str) -> None:
        """Writes the file anew and renames it into place. Of two processes at once one may be forgotten."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, prefix=".writing-", delete=False) as file:
            json.dump({**self._read(), identity: fingerprint}, file, indent=1)
        os.replace(file.name, self.path)


_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
_DESCRIPTION_FILES = ("*.index.json", "config.json", "adapter_config.json")
SECONDS_TO_SETTLE = 2.0  # the coarsest clock of file times in use


def _file_states(folder: str | os.PathLike[str]) -> list[tuple[str, os.stat_result]]:
    """Resolved path and state of the files that weights are loaded from; empty without any that holds weights."""
    files = [path for pattern in _WEIGHT_FILES for path in Path(folder).glob(pattern)]
    if files:
        files += [path for pattern in _DESCRIPTION_FILES for path in Path(folder).glob(pattern)]
    return sorted((str(path.resolve()), path.stat()) for path in files if path.is_file())


def _identity(states: Iterable[tuple[str, os.stat_result]]) -> str:
    return digest_of([[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for path, s in states])


def checkpoint_identity(path: str | os.PathLike[str]) -> str | None:
    """Identity of the weight files in a folder by path, size, times and inode, unread; None when it holds none.

    Times are those of content and of state: the latter also changes where a copy preserves the former.
    """
    states = _file_states(path)
    return _identity(states) if states else None


def fingerprint_of_checkpoint(
    model_path: str | os.PathLike[str],
    load: Mapping[str, object],
    compute: Callable[[], str],
    memo: FingerprintMemo,
) -> str:
    """The fingerprint of a model loaded from a folder: remembered if its files are unchanged, else computed.

    A file can change again within a tick of the clock that stamps it: what was written a moment ago is not remembered.

    Args:
        model_path: the folder; anything else, such as a name on the Hub, is always computed.
        load: what else the weights in memory depend on: dtype, quantisation, adapters and so on.
        compute: loads and hashes the weights.
        memo: where fingerprints are remembered.
    """
    now, states = time.time(), _file_states(model_path)
    if not states:
        return compute()
    identity = _identity(states)
    key = digest_of([STORE_VERSION, transformers.__version__, identity, load])
    if (known := memo.get(key)) is not None:
        return known
    fingerprint = compute()
    newest = max(max(state.st_mtime, state.st_ctime) for _, state in states)
    if now - newest > SECONDS_TO_SETTLE and checkpoint_identity(model_path) == identity:
        memo.remember(key, fingerprint)
    return fingerprint
