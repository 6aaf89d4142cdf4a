"""A checkpoint is hashed once as long as its files are the same, and never is a changed one taken for it."""

from __future__ import annotations

import os
import time
from unittest.mock import Mock

import pytest

from dpo_fast.reference import fingerprint_memo
from dpo_fast.reference.fingerprint_memo import FingerprintMemo, fingerprint_of_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def later(monkeypatch):
    """The clock is a minute ahead: all files are old."""
    monkeypatch.setattr(fingerprint_memo.time, "time", lambda now=time.time: now() + 60)


@pytest.fixture
def compute():
    """Stands for hashing the weights: another fingerprint each time."""
    return Mock(side_effect=(f"{i:032x}" for i in range(9)))


@pytest.fixture
def memo(tmp_path):
    return FingerprintMemo(tmp_path / "cache" / "fingerprints.json")


def test_an_unchanged_checkpoint_is_hashed_once(checkpoint, later, compute, memo):
    load = {"dtype": "bfloat16", "quantization_config": None}
    first = fingerprint_of_checkpoint(checkpoint, load, compute, memo)
    again = FingerprintMemo(memo.path)
    (checkpoint / "tokenizer.json").write_text("{}")
    assert fingerprint_of_checkpoint(str(checkpoint), dict(reversed(load.items())), compute, again) == first
    assert compute.call_count == 1
    assert fingerprint_of_checkpoint(checkpoint, {**load, "dtype": "float32"}, compute, memo) != first
    assert fingerprint_of_checkpoint(checkpoint, load, compute, memo) == first
    assert sorted(path.name for path in memo.path.parent.iterdir()) == ["fingerprints.json"]


CHANGES = {
    "content": lambda file: file.write_bytes(b"changed"),
    "content, times restored": lambda file: (file.write_bytes(b"changed"), os.utime(file, (1e9, 1e9))),
    "another file": lambda file: file.with_name("model-2.safetensors").touch(),
    "configuration": lambda file: file.with_name("config.json").write_text("[]"),
    "name": lambda file: file.rename(file.with_name("other.safetensors")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_checkpoint_is_hashed_again(checkpoint, later, compute, memo, change):
    os.utime(checkpoint / "model.safetensors", (1e9, 1e9))
    fingerprint_of_checkpoint(checkpoint, {}, compute, memo)
    time.sleep(0.02)  # the tick of the file system
    CHANGES[change](checkpoint / "model.safetensors")
    fingerprint_of_checkpoint(checkpoint, {}, compute, memo)
    assert compute.call_count == 2


def test_what_was_written_a_moment_ago_is_not_remembered(checkpoint, compute, memo, monkeypatch):
    fingerprint_of_checkpoint(checkpoint, {}, compute, memo)
    assert not memo.path.exists()
    monkeypatch.setattr(fingerprint_memo.time, "time", lambda now=time.time: now() + 3)
    fingerprint_of_checkpoint(checkpoint, {}, compute, memo)
    fingerprint_of_checkpoint(checkpoint, {}, compute, memo)
    assert compute.call_count == 2


def test_what_changes_while_it_is_hashed_is_not_remembered(checkpoint, later, memo):
    fingerprint_of_checkpoint(checkpoint, {}, lambda: (checkpoint / "config.json").touch() or "0" * 32, memo)
    assert not memo.path.exists()


def test_a_folder_without_weights_has_no_identity(checkpoint, compute, memo):
    assert fingerprint_memo.checkpoint_identity(checkpoint) is not None
    (checkpoint / "model.safetensors").unlink()
    assert fingerprint_memo.checkpoint_identity(checkpoint) is fingerprint_memo.checkpoint_identity("nowhere") is None
    for _ in range(2):
        fingerprint_of_checkpoint("owner/name", {}, compute, memo)
    assert compute.call_count == 2 and not memo.path.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"key": 7, "other": "no fingerprint"}', b"null"])
def test_damaged_and_foreign_memories_are_ignored(memo, content):
    memo.path.parent.mkdir()
    memo.path.write_bytes(content)
    assert memo.get("key") is None and memo.get("other") is None
    memo.remember("key", "a" * 32)
    assert memo.get("key") == "a" * 32
