"""Groups with the same prompt become one."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from datasets import Dataset

from dpo_fast.batches.groups import ComparisonChoice
from dpo_fast.data.columns import OPTIONAL_FIELDS, REFERENCE_FIELDS, group_features
from dpo_fast.data.truncation import (
    CODE,
    choose_comparisons,
    group_from_row,
)

logger = logging.getLogger(__name__)

# Part of the cache key of merged rows: `datasets` hashes an importable class by its name, not by its code.
_CODE = hashlib.blake2b(Path(__file__).read_bytes() + CODE.encode()).hexdigest()


class _MergeRows:
    """The first row of a set of rows → their union: equal completions once, weights of equal comparisons added up.

    Comparisons that should have different margins are different. A completion's score is the mean of those it has.
    """

    def __init__(self, rows: Dataset, members: list[list[int]], comparisons: ComparisonChoice, name: str):
        self.rows, self.members, self.comparisons, self.name, self.code = rows, members, comparisons, name, _CODE

    def __call__(self, first: dict[str, Any], index: int) -> dict[str, Any]:
        completions: dict[tuple[int, ...], int] = {}
        references: dict[str, list] = {column: [] for column in REFERENCE_FIELDS}
        scores: dict[int, list[float]] = defaultdict(list)
        weights: dict[tuple[int, int, float], float] = defaultdict(float)
        for member in self.members[index]:
            group = group_from_row(self.rows[member], f"{self.name} dataset, row {member}")
            group = choose_comparisons(group, self.comparisons)
            place = []
            for k, (context, ids) in enumerate(zip(group.contexts, group.completion_ids, strict=True)):
                key = (context, *ids)
                for column, values in references.items():
                    if key not in completions and getattr(group, column) is not None:
                        values.append(getattr(group, column)[k])
                place.append(completions.setdefault(key, len(completions)))
                if group.completion_scores is not None:
                    scores[place[k]].append(group.completion_scores[k])
            offsets = group.comparison_offsets or [0.0] * len(group.comparisons)
            known = zip(group.comparisons, group.comparison_weights, offsets, strict=True)
            for (winner, loser), weight, offset in known:
                weights[place[winner], place[loser], offset] += weight
        merged = {
            "prompt_ids": first["prompt_ids"],
            "completion_ids": [ids for _, *ids in completions],
            "comparisons": [(winner, loser) for winner, loser, _ in weights],
            "comparison_weights": list(weights.values()),
            "context_lengths": [context for context, *_ in completions],
            **references,
            "comparison_offsets": [offset for *_, offset in weights],
            "completion_scores": [fmean(scores[k]) for k in sorted(scores)],
        }
        return {column: values for column, values in merged.items() if column not in OPTIONAL_FIELDS or column in first}


def merge_by_prompt(rows: Dataset, comparisons: ComparisonChoice, num_proc: int | None, name: str) -> Dataset:
    """Groups with the same prompt as one, in the order of their first appearance.

    Rows without comparisons stay apart, to be counted as dropped; rows without a shared prompt have nothing to share.
    """
    members: dict[Any, list[int]] = defaultdict(list)
    columns = [column for column in ("prompt_ids", "comparisons", "context_lengths") if column in rows.column_names]
    for index, row in enumerate(rows.select_columns(columns)):
        alone = not row["prompt_ids"] or not row["comparisons"] or any(row.get("context_lengths") or ())
        digest = hashlib.blake2b(np.asarray(row["prompt_ids"], np.int32).tobytes(), digest_size=16).digest()
        members[index if alone else digest].append(index)
    supplied = [field for field in REFERENCE_FIELDS if field in rows.column_names]
    if len(members) < len(rows) and supplied:
        logger.warning("%s dataset: its reference log-probs are not used, because rows were merged by prompt", name)
        rows = rows.remove_columns(supplied)
    return rows.select([group[0] for group in members.values()]).map(
        _MergeRows(rows, list(members.values()), comparisons, name),
        with_indices=True,
        remove_columns=rows.column_names,
        features=group_features(rows.column_names),
        num_proc=num_proc,
        desc=f"Merging prompts of {name} dataset",
    )
