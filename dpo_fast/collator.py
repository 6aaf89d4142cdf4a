"""Rows of a tokenised dataset → the packs of a batch, on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_fast.groups import Layout, PackedBatch, PreferenceGroup, pack
from dpo_fast.sampler import split_by_tokens


@dataclass
class DPOCollator:
    """Rows of a tokenised dataset → the packs of a batch.

    Returns a dict of `packs`, a list of `PackedBatch` under `max_tokens` each, and `totals`, fp32 [2]: the sum of
    comparison weights, and of weight × scored winner tokens, over the batch. `cut` is that of `pack`.
    """

    layout: Layout = "shared"
    max_tokens: int | None = None
    pad_token_id: int = 0
    cut: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        groups = [PreferenceGroup.from_row(row) for row in rows]
        costs = [group.num_tokens(self.layout) for group in groups]
        parts = split_by_tokens(groups, costs, self.max_tokens)
        packs = [pack(part, self.layout, self.pad_token_id, self.cut) for part in parts]
        return {"packs": packs, "totals": sum(_totals(packed) for packed in packs)}


def _totals(packed: PackedBatch) -> Tensor:
    weights = packed.comparison_weights
    winner_tokens = packed.completion_sums(packed.cu_scores.diff())[packed.comparisons[:, 0]]
    return torch.stack([weights.sum(), (weights * winner_tokens).sum()])
