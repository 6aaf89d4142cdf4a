"""A store is named after the weights that are in memory, whatever became of the files that they were loaded from.

Each test does fifty times what would fool a name that is taken from files. Equal weights find one store, others do not.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_fast.errors import InputError
from dpo_fast.reference.reference import Reference
from families import tiny_model
from preferences import make_trainer, pairs

RUNS = 50
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 20}


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def bits(loaded: torch.nn.Module) -> tuple[bytes, ...]:
    return tuple(value.detach().view(torch.uint8).numpy().tobytes() for value in loaded.state_dict().values())


class Names:
    """The folders of stores, and what was in memory when they were named."""

    def __init__(self, root: Path):
        self._root, self._accelerator = root / "reference", Accelerator(cpu=True)
        self.by_weights: dict[tuple[bytes, ...], str] = {}

    def add(self, loaded: torch.nn.Module) -> None:
        folder = Reference(loaded, self._accelerator, layout="shared", root=self._root).store.folder
        assert self.by_weights.setdefault(bits(loaded), folder) == folder, "equal weights have one name"
        assert len({*self.by_weights.values()}) == len(self.by_weights), "other weights have another"


@pytest.fixture
def names(tmp_path):
    return Names(tmp_path)


def test_files_that_are_replaced_after_loading(names, tmp_path):
    model(0).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = [{**load_file(file), "model.norm.weight": torch.full((8,), 1.0 + seed)} for seed in range(2)]
    for run in range(RUNS):
        save_file(weights[run % 2], file, {"format": "pt"})
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
        save_file(weights[(run + 1) % 2], file, {"format": "pt"})
        names.add(loaded)
        names.add(LlamaForCausalLM.from_pretrained(tmp_path / "model"))
    assert len(names.by_weights) == 2


def test_files_that_are_replaced_and_keep_their_size_and_times(names, tmp_path):
    file = tmp_path / "model" / "model.safetensors"
    model(0).save_pretrained(tmp_path / "model")
    stat = file.stat()
    for run in range(RUNS):
        weights = load_file(file)
        weights["model.norm.weight"].view(torch.int32)[run % 8] ^= 1 << run % 20
        save_file(weights, file, {"format": "pt"})
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert file.stat().st_size == stat.st_size
        names.add(LlamaForCausalLM.from_pretrained(tmp_path / "model"))
    assert len(names.by_weights) == RUNS


def test_weights_in_a_folder_inside(names, tmp_path):
    """The files in the folder above never change."""
    model(100).save_pretrained(tmp_path / "model")
    for run in range(RUNS):
        model(run % 25).save_pretrained(tmp_path / "model" / "inner")
        names.add(LlamaForCausalLM.from_pretrained(tmp_path / "model", subfolder="inner"))
        names.add(LlamaForCausalLM.from_pretrained(tmp_path / "model"))
    assert len(names.by_weights) == 26


def test_a_layer_that_the_files_lack_is_random(names, tmp_path):
    model(0).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    for run in range(RUNS):
        torch.manual_seed(run % 25)
        names.add(LlamaForCausalLM.from_pretrained(tmp_path / "model"))
    assert len(names.by_weights) == 25


def test_weights_that_are_changed_after_loading(names, tmp_path):
    model(0).save_pretrained(tmp_path / "model")
    for run in range(RUNS):
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
        names.add(loaded)
        weights = [*loaded.parameters()]
        weights[run % len(weights)].data.view(torch.int32).view(-1)[run % 8] ^= 1 << run % 31
        names.add(loaded)
    assert len(names.by_weights) == 1 + RUNS


@pytest.mark.parametrize("shared", [False, True], ids=["private pages", "shared pages"])
def test_mapped_pages_that_are_written_to(names, tmp_path, shared):
    """The file of private pages never changes; that of shared ones changes without a new time for a while."""
    loaded = model(0)
    weight = loaded.model.embed_tokens.weight
    file = tmp_path / "weights"
    file.write_bytes(weight.detach().numpy().tobytes())
    mapped = torch.from_file(str(file), shared=shared, size=weight.numel(), dtype=weight.dtype)
    weight.data = mapped.view(weight.shape)
    names.add(loaded)
    for run in range(RUNS):
        mapped.view(torch.int32)[run] ^= 1 << run % 31
        names.add(loaded)
    assert len(names.by_weights) == 1 + RUNS


def test_a_run_computes_what_another_checkpoint_of_the_same_name_left_behind(tmp_path, monkeypatch):
    """Through the trainer, which loads by name: the second run has another layer, and serves nothing of the first's."""
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    first = make_trainer(tmp_path, pairs(6), model=str(folder))
    file = folder / "model.safetensors"
    stat, weights = file.stat(), load_file(file)
    weights["model.norm.weight"] *= 1.5
    save_file(weights, file, {"format": "pt"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = make_trainer(tmp_path, pairs(6), model=str(folder))
    assert second.reference.store.computed == 12 and second.reference.store.folder != first.reference.store.folder
    assert make_trainer(tmp_path, pairs(6), model=str(folder)).reference.store.computed == 0


def test_weights_that_change_under_an_open_store_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, pairs(4))
    groups = trainer.train_dataset.remove_columns("ref_logps")
    assert trainer.reference.with_logps(groups)["ref_logps"][:] == trainer.train_dataset["ref_logps"][:]
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0] += 1e-3
    with pytest.raises(InputError, match="model: its weights have changed since the reference store was opened"):
        trainer.reference.with_logps(groups)
