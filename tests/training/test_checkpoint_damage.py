"""Damaged checkpoints: each flipped bit and each missing part is found, and the last good checkpoint is taken."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from dpo_fast.errors import TrainingDiverged
from dpo_fast.training.checkpoint_seal import SEAL_FILE
from dpo_fast.training.checkpoints import is_finite
from dpo_fast.training.resuming import RECORD_FILE
from preferences import make_trainer, pairs

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    make_trainer(folder, **SAVED).train()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A trainer beside a copy of the checkpoints."""
    shutil.copytree(saved / "out", tmp_path / "out")
    return make_trainer(tmp_path, **SAVED)


def found(trainer) -> str:
    return Path(trainer._checkpoint_for(True)).name


def is_found_out(trainer, folder: Path, caplog, *words: str) -> None:
    """The checkpoint before is taken, and the path itself refused, both with the reason."""
    caplog.clear()
    assert found(trainer) == "checkpoint-1"
    assert str(folder) in caplog.text and all(word in caplog.text for word in words), caplog.text
    with pytest.raises(ValueError, match="resume_from_checkpoint=.*checkpoint-2' holds .*; give") as refused:
        trainer._checkpoint_for(str(folder))
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)


def test_a_flipped_bit_in_any_file_is_found(run, tmp_path, caplog):
    last, chance = tmp_path / "out" / "checkpoint-2", random.Random(0)
    assert found(run) == "checkpoint-2"
    files = sorted(path for path in last.rglob("*") if path.is_file())
    names = {path.name for path in files}
    parts = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert names > parts | {SEAL_FILE, RECORD_FILE, "config.json", "training_args.bin", "tokenizer.json"}
    for file in files:
        whole = file.read_bytes()
        for place in {0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(4))}:
            broken = bytearray(whole)
            broken[place] ^= 1 << chance.randrange(8)
            file.write_bytes(broken)
            is_found_out(run, last, caplog, file.name)
        for end in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:end])
            is_found_out(run, last, caplog, file.name)
        file.unlink()
        is_found_out(run, last, caplog, file.name)
        file.write_bytes(whole)
    assert found(run) == "checkpoint-2"


def test_each_bit_of_the_checksums_counts(run, tmp_path, caplog):
    """Their file covers the others, and itself."""
    file = tmp_path / "out" / "checkpoint-2" / SEAL_FILE
    whole, chance = file.read_bytes(), random.Random(1)
    for place in chance.sample(range(len(whole)), 60):
        broken = bytearray(whole)
        broken[place] ^= 1 << chance.randrange(8)
        file.write_bytes(broken)
        is_found_out(run, file.parent, caplog, SEAL_FILE)


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        (["optimizer.pt"], "no optimizer"),
        (["scheduler.pt"], "no scheduler.pt"),
        (["rng_state.pth"], "no rng_state"),
        (["optimizer.pt", "scheduler.pt"], "no optimizer and no scheduler.pt"),
        (["optimizer.pt", "scheduler.pt", "rng_state.pth"], "weights alone"),
    ],
)
def test_what_an_older_checkpoint_lacks_is_found_without_checksums(run, tmp_path, caplog, lacking, words):
    last = tmp_path / "out" / "checkpoint-2"
    for name in [*lacking, SEAL_FILE, RECORD_FILE]:
        (last / name).unlink()
    is_found_out(run, last, caplog, words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_one_number_that_is_not_finite_is_seen(dtype):
    weight = torch.randn(7, 13).to(dtype)
    assert is_finite(weight) and is_finite(weight[:0]) and is_finite(torch.ones(3, dtype=torch.bool))
    for value in (float("nan"), *([float("inf"), float("-inf")] if dtype.itemsize > 1 else [])):
        broken = weight.clone()
        broken[6, 4] = value
        assert not is_finite(broken) and not is_finite(broken.T)


def test_weights_that_are_not_finite_make_no_good_checkpoint(run, tmp_path, caplog):
    last = tmp_path / "out" / "checkpoint-2"
    for name in (SEAL_FILE, RECORD_FILE):
        (last / name).unlink()
    weights = load_file(last / "model.safetensors")
    weights["model.norm.weight"][3] = float("inf")
    save_file(weights, last / "model.safetensors", metadata={"format": "pt"})
    is_found_out(run, last, caplog, "weights that are not finite in model.safetensors")


def test_a_run_that_diverges_goes_on_from_before(tmp_path):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    next(model.parameters()).view(-1)[5] = float("nan")

    trainer = make_trainer(tmp_path, **SAVED)
    trainer.add_callback(Diverge())
    with pytest.raises(TrainingDiverged, match="Last good checkpoint: .*checkpoint-1"):
        trainer.train()
    assert not (tmp_path / "out" / "checkpoint-2").exists()
    again = make_trainer(tmp_path, **SAVED)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == trainer.args.max_steps


def test_weights_alone_are_not_resumed(tmp_path, caplog):
    """Also where an earlier run left an optimizer in the same folder."""
    make_trainer(tmp_path, **SAVED).train()
    make_trainer(tmp_path, **{**SAVED, "save_steps": 2}, save_only_model=True).train()
    last = tmp_path / "out" / "checkpoint-2"
    assert (last / "optimizer.pt").exists()
    is_found_out(make_trainer(tmp_path, **SAVED), last, caplog, "weights alone", "save_only_model=True")


def test_the_best_checkpoint_stays_and_the_others_go(tmp_path):
    """Rotation and load_best_model_at_end see the folders that they know."""
    options = {"save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = make_trainer(tmp_path, eval_dataset=pairs(6, seed=1), **{**SAVED, **options})
    trainer.train()
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    best = Path(trainer.state.best_model_checkpoint)
    assert len(left) == 2 and "checkpoint-4" in left and best.name in left
    for name in left:
        assert trainer._checkpoint_for(str(tmp_path / "out" / name))
    weights = load_file(best / "model.safetensors")
    own = trainer.model.state_dict()
    assert all(torch.equal(weights[name], own[name]) for name in weights)


def test_files_that_others_add_later_do_no_harm(run, tmp_path):
    last = tmp_path / "out" / "checkpoint-2"
    (last / "eval_results.json").write_text("{}")
    os.utime(last / "model.safetensors", (1, 1))
    assert found(run) == "checkpoint-2"


def test_a_preempted_run_leaves_a_good_checkpoint(tmp_path):
    """transformers' callback of enable_jit_checkpoint puts a file into the folder while it is written."""
    from transformers.trainer_jit_checkpoint import CheckpointManager

    class Preempted(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                CheckpointManager(trainer).execute_jit_checkpoint()

    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.add_callback(Preempted())
    trainer.train()
    assert found(trainer) == "checkpoint-1"
