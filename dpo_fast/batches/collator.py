"""Rows of a tokenised dataset → the packs of a batch, on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

from dpo_fast.batches.groups import Layout, PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.batches.token_budget import split_by_tokens
from dpo_fast.errors import InputError


@dataclass
class DPOCollator:
    """Rows of a tokenised dataset → the packs of a batch.

    Returns a dict of `packs`, a list of `PackedBatch` under `max_tokens` each; `totals`, the sum of theirs, fp32 [2];
    and `positions`, for every comparison the place of its row in the batch of all ranks: what the row says, or else its
    place in `rows`. `split_for_ld_dpo` is that of `pack`, and `cut` its earlier name.
    """

    layout: Layout = "shared"
    max_tokens: int | None = None
    pad_token_id: int = 0
    split_for_ld_dpo: bool = False
    cut: InitVar[bool] = False

    def __post_init__(self, cut: bool) -> None:
        self.split_for_ld_dpo |= cut

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        for row in rows:
            if "prompt_ids" not in row or "completion_ids" not in row:
                raise InputError(
                    f"rows have the columns {sorted(row)}; give tokenised preference groups, as "
                    "dpo_fast.prepare_dataset returns them"
                )
        groups = [PreferenceGroup.from_row(row) for row in rows]
        costs = [group.num_tokens(self.layout) for group in groups]
        parts = split_by_tokens(range(len(groups)), costs, self.max_tokens)
        packs = [
            pack([groups[i] for i in part], self.layout, self.pad_token_id, self.split_for_ld_dpo) for part in parts
        ]
        positions = [rows[i].get("position", i) for part in parts for i in part for _ in groups[i].comparisons]
        return {"packs": packs, "totals": sum(packed.totals for packed in packs), "positions": positions}
