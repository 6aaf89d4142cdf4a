"""What commands are run in: no launcher around, a cache of its own, and a folder with a model and rows."""

from __future__ import annotations

import pytest

from dpo_fast.commands.launch import LAUNCHED_MARKS
from families import tiny_model, tiny_tokenizer
from preferences import pairs


@pytest.fixture
def no_launcher(tmp_path, tmp_path_factory, monkeypatch):
    """No process or file of a launcher; an empty working directory, and an empty cache elsewhere."""
    for mark in LAUNCHED_MARKS:
        monkeypatch.delenv(mark, raising=False)
    nowhere = str(tmp_path / "none.yaml")
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", nowhere)
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(no_launcher, tmp_path, monkeypatch):
    """A model, its tokenizer and 30 rows on disk, in the working directory, and the cache beside them."""
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path / "cache"))
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    pairs(30).to_json("rows.jsonl")
    return tmp_path
