"""Groups with the same prompt become one."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from dpo_fast.batches.groups import ComparisonChoice
from dpo_fast.data.columns import COLUMNS, REFERENCE_FIELDS, Row, group_features, with_defaults
from dpo_fast.data.truncation import (
    CODE,
    checked_group,
    choose_comparisons,
)

logger = logging.getLogger(__name__)

# Part of the cache key of merged rows: `datasets` hashes an importable class by its name, not by its code.
_CODE = hashlib.blake2b(Path(__file__).read_bytes() + CODE.encode()).hexdigest()


class _MergeRows:
    """The first row of a set of rows → their union: equal completions once, weights of equal comparisons added up.

    Comparisons that should have different margins are different. Other columns say in `columns` how they merge.
    """

    def __init__(self, rows: Dataset, members: list[list[int]], comparisons: ComparisonChoice):
        self.rows, self.members, self.comparisons, self.code = rows, members, comparisons, _CODE

    def __call__(self, first: Row, index: int) -> Row:
        completions: dict[tuple[int, ...], int] = {}
        comparisons: dict[tuple[int, int, float], int] = {}
        values: dict[str, dict[int, list]] = defaultdict(lambda: defaultdict(list))
        for member in self.members[index]:
            group = choose_comparisons(with_defaults(self.rows[member]), self.comparisons)
            keys = zip(group["context_lengths"], group["completion_ids"], strict=True)
            place = [completions.setdefault((context, *ids), len(completions)) for context, ids in keys]
            offsets = group.get("comparison_offsets") or [0.0] * len(group["comparisons"])
            keys = zip(group["comparisons"], offsets, strict=True)
            places = {
                "completion": place,
                "comparison": [
                    comparisons.setdefault((place[winner], place[loser], offset), len(comparisons))
                    for (winner, loser), offset in keys
                ],
            }
            for name in set(group) - {"prompt_ids", "completion_ids", "comparisons"}:
                for where, value in zip(places[COLUMNS[name].per], group[name], strict=True):
                    values[name][where].append(value)
        merged = {name: [COLUMNS[name].merge(found[k]) for k in sorted(found)] for name, found in values.items()}
        return {
            **{name: [] for name in group},
            **merged,
            "prompt_ids": first["prompt_ids"],
            "completion_ids": [ids for _, *ids in completions],
            "comparisons": [(winner, loser) for winner, loser, _ in comparisons],
        }


def merge_by_prompt(
    rows: Dataset, comparisons: ComparisonChoice, num_proc: int | None, checked: bool, name: str
) -> Dataset:
    """Groups with the same prompt as one, in the order of their first appearance.

    `checked` says whether `checked_group` need not look at them. Rows without comparisons stay apart, to be counted as
    dropped; rows without a shared prompt have nothing to share.
    """
    members: dict[Any, list[int]] = defaultdict(list)
    columns = [column for column in ("prompt_ids", "comparisons", "context_lengths") if column in rows.column_names]
    for index, row in enumerate(rows.select_columns(columns) if checked else rows):
        if not checked:
            checked_group(row, f"{name} dataset, row {index}")
        alone = not row["prompt_ids"] or not row["comparisons"] or any(row.get("context_lengths") or ())
        digest = hashlib.blake2b(np.asarray(row["prompt_ids"], np.int32).tobytes(), digest_size=16).digest()
        members[index if alone else digest].append(index)
    supplied = [name for name in REFERENCE_FIELDS if name in rows.column_names]
    if len(members) < len(rows) and supplied:
        logger.warning("%s dataset: its reference log-probs are not used, because rows were merged by prompt", name)
        rows = rows.remove_columns(supplied)
    return rows.select([group[0] for group in members.values()]).map(
        _MergeRows(rows, list(members.values()), comparisons),
        with_indices=True,
        remove_columns=rows.column_names,
        features=group_features(rows.column_names),
        num_proc=num_proc,
        desc=f"Merging prompts of {name} dataset",
    )
