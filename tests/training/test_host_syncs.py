"""A step never waits for the device: the host reads nothing back between two logs."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from preferences import make_trainer, pairs, ranked
from suite.training.probe import CountHostReads

LOGGED = 4  # every so many steps
SETTINGS = {
    "pairs": {},
    "groups, packs": {"dataset": ranked(16), "max_tokens_per_micro_batch": 60},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "mix": {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [1.0, 0.5, 0.1]},
    "weighted, LD-DPO": {"use_weighting": True, "ld_alpha": 0.5},
    "sorted over the step": {"loss_type": ["aot"], "max_tokens_per_micro_batch": 60},
    "moving beta": {"loss_type": ["beta_dpo"]},
    "checkpointing": {"gradient_checkpointing": True},
}


class HostReads(TrainerCallback):
    """How often the host reads a tensor from the end of one step to that of the next; the first step is not counted."""

    def __init__(self, counter):
        self.counter, self.steps = counter, []

    def on_step_end(self, *args, **kwargs):
        if self.counter.count is not None:
            self.steps.append(self.counter.count)
        self.counter.count = 0


def watched(trainer, counter) -> list[int]:
    """Reads of the steps of a training, the collator's own apart: it works on the host anyway."""
    collate, reads = trainer.data_collator, HostReads(counter)
    counter.count = 0

    def collated(rows):
        count = counter.count
        batch = collate(rows)
        counter.count = count
        return batch

    trainer.data_collator = collated
    trainer.add_callback(reads)
    with counter:
        trainer.train()
    return reads.steps[1:]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_host_reads_nothing_back_but_to_log(tmp_path, monkeypatch, setting):
    counter = CountHostReads()
    options = {"dataset": pairs(40), "max_steps": 10, "logging_steps": LOGGED, **SETTINGS[setting]}
    steps = watched(make_trainer(tmp_path, **options), counter)
    after_a_log = {LOGGED - 1, 2 * LOGGED - 1}  # its reads come after the end of the step that is logged
    assert [index for index, count in enumerate(steps) if count] == sorted(after_a_log), steps


@pytest.mark.gpu
def test_on_a_gpu_a_step_never_synchronises(tmp_path):
    class Strict(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if 1 <= state.global_step < 6 else "default")

        def on_log(self, *args, **kwargs):
            torch.cuda.set_sync_debug_mode("default")

    trainer = make_trainer(tmp_path, pairs(40), max_steps=8, logging_steps=8, use_cpu=False, bf16=True)
    trainer.add_callback(Strict())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
