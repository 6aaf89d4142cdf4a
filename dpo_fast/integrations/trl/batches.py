"""TRL's padded rows → preference groups and packed batches.

TRL's collators return the rows `[chosen 1 … chosen B, rejected 1 … rejected B]`, padded on the right. The prompt that
both rows of a pair share is what they begin with alike, up to the first token that either is scored on; truncation from
the left may leave less of it than there was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_fast.batches.groups import Layout, PreferenceGroup
from dpo_fast.batches.packing import PackedBatch, pack

PACKED = "packed"  # where a batch holds its packed form
# What a batch of pairs consists of; with anything else in it (images, token types) the tokens are not all there is.
_ROWS = ("input_ids", "attention_mask", "completion_mask")
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


class CannotPackError(ValueError):
    """A batch is none of right-padded pairs; the message says why, to go on after 'because'."""


def pair_groups(batch: Mapping[str, Any]) -> list[PreferenceGroup]:
    """The pairs of a padded batch.

    Raises:
        CannotPackError: it holds more than text, or its rows are no right-padded prompts with completions.
    """
    foreign = sorted(set(batch) - {*_ROWS, *_REFERENCE, PACKED})
    if foreign or not set(_ROWS) <= set(batch):
        raise CannotPackError(f"its batches hold {foreign or sorted(batch)}, not just {', '.join(_ROWS)}")
    ids, mask, scored = (batch[name].cpu().numpy() for name in _ROWS)
    lengths = mask.sum(axis=1)
    starts = lengths - scored.sum(axis=1)  # where completions begin
    columns = np.arange(ids.shape[1])
    within = columns < lengths[:, None]
    if (mask.astype(bool) != within).any():
        raise CannotPackError("its rows are not padded on the right")
    if len(ids) % 2 or (scored.astype(bool) != (within & (columns >= starts[:, None]))).any():
        raise CannotPackError("its rows are not pairs of a prompt and one completion")
    if (lengths - np.maximum(starts, 1) < 1).any():  # nothing predicts the very first token of a row
        raise CannotPackError("some completion has no token that is scored")
    half = len(ids) // 2
    return [
        _pair(ids[row, : lengths[row]], ids[row + half, : lengths[row + half]], starts[row], starts[row + half])
        for row in range(half)
    ]


def _pair(chosen: np.ndarray, rejected: np.ndarray, chosen_start: int, rejected_start: int) -> PreferenceGroup:
    most = min(chosen_start, rejected_start)
    different = np.flatnonzero(chosen[:most] != rejected[:most])
    shared = int(different[0]) if len(different) else int(most)
    return PreferenceGroup(
        chosen[:shared],
        [chosen[shared:], rejected[shared:]],
        context_lengths=[int(chosen_start) - shared, int(rejected_start) - shared],
    )


@dataclass(frozen=True)
class Packing:
    """How padded pairs are packed; the arguments of `dpo_fast.batches.packing.pack`."""

    layout: Layout
    pad_token_id: int
    split_for_ld_dpo: bool = False

    def __call__(self, batch: Mapping[str, Any]) -> PackedBatch:
        """The packed form of a padded batch, on the host.

        Raises:
            CannotPackError: the batch is none of right-padded pairs.
        """
        return pack(pair_groups(batch), self.layout, self.pad_token_id, self.split_for_ld_dpo)


@dataclass
class PackingCollator:
    """A collator of TRL's with the packed form beside the padded rows, so that it is made before they leave the host.

    A batch that cannot be packed stays as it is.
    """

    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    packing: Packing

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        with suppress(CannotPackError):
            batch[PACKED] = self.packing(batch)
        return batch


def by_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Two vectors [B] → [S], in the order of a packed batch's completions."""
    return torch.stack([chosen, rejected], dim=1).reshape(-1)
