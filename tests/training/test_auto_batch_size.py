"""`auto_find_batch_size`: after an attempt that ran out of memory, log and state are those of a fresh start."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback

from families import tiny_model
from preferences import make_trainer, pairs

SETTINGS = {
    "pairs": {},
    "packs": {"max_tokens_per_micro_batch": 60},
    "accumulated": {"gradient_accumulation_steps": 2},
    "moving beta": {"loss_type": ["beta_dpo"], "beta_dpo_alpha": 2.0},
    "recomputed": {"gradient_checkpointing": True},
    "a stream": {"dataset": pairs(40).to_iterable_dataset()},
}
CLOCKS = ("runtime", "per_second")


def figures(trainer) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.endswith(CLOCKS)} for row in trainer.state.log_history]


class NoMemory(TrainerCallback):
    """Runs out of memory where the first attempt has done so many forward passes."""

    def __init__(self, trainer, after: int):
        self.left, self._forward = after, trainer.compute_loss
        trainer.compute_loss = self.compute_loss

    def compute_loss(self, *args, **kwargs):
        result = self._forward(*args, **kwargs)
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("CUDA out of memory.")
        return result


QUICK = ("pairs", "a stream")


@pytest.mark.parametrize(
    ("setting", "after"),
    [
        *(pytest.param(name, 4, marks=[] if name in QUICK else pytest.mark.slow) for name in SETTINGS),
        ("accumulated", 1),
    ],
)
def test_nothing_of_the_failed_attempt_is_logged(tmp_path, setting, after):
    """Rate 0: transformers begins the second attempt with the weights of the first."""
    options = {
        "dataset": pairs(40),
        "ref_model": tiny_model("llama", seed=5),
        "learning_rate": 0.0,
        "logging_steps": 2,
        "max_steps": 6,
        "train_sampling_strategy": "sequential",
        "auto_find_batch_size": True,
        **SETTINGS[setting],
    }
    retried = make_trainer(tmp_path, **options, per_device_train_batch_size=4)
    failing = NoMemory(retried, after)
    retried.train()
    fresh = make_trainer(tmp_path, **options, per_device_train_batch_size=3)
    fresh.train()
    assert failing.left < 0 and retried.state.train_batch_size == 3
    expected = figures(fresh)
    assert len(expected) == 4 and expected[0]["rewards/margins"] != 0
    assert figures(retried) == expected
    for name in ("num_input_tokens_seen", "total_flos", "global_step"):
        assert getattr(retried.state, name) == getattr(fresh.state, name)


def test_a_second_training_is_logged_as_the_first(tmp_path):
    trainer = make_trainer(
        tmp_path, ref_model=tiny_model("llama", seed=5), learning_rate=0.0, logging_steps=2, loss_type=["beta_dpo"]
    )
    logs = []
    for _ in range(2):
        trainer.train()
        logs.append(figures(trainer))
    assert logs[0] == logs[1]
