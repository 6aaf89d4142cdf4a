"""Which groups a run trains on in which batch and step: what transformers' sampler says, asked without a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import Trainer

from dpo_fast.config import DPOConfig


def epoch_batches(groups: int, config: DPOConfig) -> list[list[int]]:
    """The first epoch of a run with `config` on so many groups: their indices, a list for each micro-batch."""
    trainer = Trainer(nn.Linear(1, 1), config, lambda indices: {"groups": indices}, range(groups))
    return [batch["groups"] for batch in trainer.get_train_dataloader()]


def first_steps(batches: Sequence[Sequence[int]], groups_per_step: int, count: int) -> list[list[int]]:
    """The groups of the first `count` steps of equal size; a dataset too small for them starts over."""
    order = [index for batch in batches for index in batch]
    needed = groups_per_step * count
    order = (order * -(-needed // len(order)))[:needed]
    return [order[start : start + groups_per_step] for start in range(0, needed, groups_per_step)]
