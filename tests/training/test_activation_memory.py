"""Where gradient_checkpointing is unset, activations are recomputed only if those of the largest pack do not fit; what
they take is known before the first step, and results do not depend on it."""

from __future__ import annotations

import logging

import pytest
import torch

from dpo_fast import machine
from dpo_fast.batches.packing import empty_pack
from dpo_fast.machine import free_memory
from dpo_fast.training import activation_memory
from dpo_fast.training.activation_memory import activations_fit, largest_pack, saved_bytes
from families import tiny_model
from preferences import logged, make_trainer, pairs, trained

GIB = 2**30


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory is free, and what the head takes to nothing, as tiny models have tiny heads."""

    def set_free(count: int) -> None:
        monkeypatch.setattr(activation_memory, "_HEAD_BYTES", 0)
        monkeypatch.setattr(activation_memory, "free_memory", lambda device: count)

    return set_free


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_what_a_long_pack_keeps_is_told_by_short_ones(tmp_path, layout, bf16, lora, free, caplog):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = make_trainer(tmp_path, layout=layout, bf16=bf16, peft_config=adapter)
    model, long = trainer.model.train(), empty_pack(layout, length=700)
    free(GIB)
    packs = tuple(empty_pack(layout, groups=groups, length=32) for groups in (1, 4))
    with caplog.at_level(logging.INFO, "dpo_fast"):
        assert activations_fit(model, packs, 1400, trainer.accelerator.autocast())
    estimate = caplog.records[-1].args[1] * GIB
    with trainer.accelerator.autocast():
        assert estimate == pytest.approx(saved_bytes(model, long), rel=0.05)


def test_recomputing_keeps_a_fraction_of_it(tmp_path):
    trainer = make_trainer(tmp_path, gradient_checkpointing=False)
    model, packed = trainer.model.train(), empty_pack("shared", length=300)
    kept = saved_bytes(model, packed)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert saved_bytes(model, packed) < kept / 3


@pytest.mark.parametrize("gib, recompute", [(1.0, False), (0.001, True)])
def test_it_is_decided_when_training_begins_and_changes_no_result(tmp_path, free, gib, recompute):
    free(int(gib * GIB))
    expected = make_trainer(tmp_path / "given", gradient_checkpointing=recompute)
    trainer = make_trainer(tmp_path / "open", gradient_checkpointing=None)
    assert trainer.args.recompute_where_needed and not expected.args.recompute_where_needed
    weights = trained(trainer)
    assert trainer.args.gradient_checkpointing is recompute
    assert trainer.model.is_gradient_checkpointing is recompute
    for name, value in trained(expected).items():
        assert torch.equal(value, weights[name])
    assert logged(trainer, "loss") == logged(expected, "loss")
    assert logged(trainer, "num_tokens") == logged(expected, "num_tokens")


def test_random_numbers_of_the_run_stay_as_they_are(tmp_path, free):
    """A model with dropout draws some while it is measured."""
    free(GIB)
    losses = []
    for given in (None, False):
        model = tiny_model("gpt2")
        for block in model.transformer.h:
            block.attn.attn_dropout.p, block.mlp.dropout.p = 0.0, 0.5
        options = {"disable_dropout": False, "gradient_checkpointing": given}
        trainer = make_trainer(tmp_path / str(given), model=model, **options)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1] and losses[0][0] != pytest.approx(0.6931472, abs=1e-6)


def test_the_largest_pack_is_the_longest_groups_of_a_batch():
    tokens = [5, 40, 12, 30, 8]
    assert largest_pack(iter(tokens), 2, "shared") == 70
    assert largest_pack(iter(tokens), 2, "padded") == 80
    assert largest_pack(iter(tokens), 9, "shared") == sum(tokens)
    assert largest_pack(iter(tokens), 2, "shared", max_tokens=50) == 50
    assert largest_pack(iter(tokens), 2, "shared", max_tokens=10) == 40  # a group alone may exceed the bound


def test_a_container_has_what_its_limit_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    device = torch.device("cpu")
    whole = free_memory(device)
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("1300\n")
    assert free_memory(device) == 1000 < whole
    (tmp_path / "memory.max").write_text("max\n")  # no limit
    assert free_memory(device) > 1000


def test_streams_and_what_is_given_are_not_measured(tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("measured")

    monkeypatch.setattr("dpo_fast.trainer.activations_fit", fail)
    for given in (True, False):
        trainer = make_trainer(tmp_path / str(given), gradient_checkpointing=given, max_steps=1)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing is given
    streamed = make_trainer(tmp_path / "stream", pairs().to_iterable_dataset(), gradient_checkpointing=None)
    streamed.train()
    assert streamed.model.is_gradient_checkpointing
