"""A stream of rows → a stream of preference groups, and of those with reference log-probs.

Rows are tokenised, cut and scored as training asks for them, so a stream has no account of what was dropped, and what
depends on all rows at once is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
from datasets import Features, IterableDataset
from transformers import PreTrainedTokenizerBase

from dpo_fast.columns import ACCOUNT, REFERENCE_FIELDS, column_names, group_features, tokenized_features
from dpo_fast.formats import PREPARED, detect_format
from dpo_fast.groups import ComparisonChoice
from dpo_fast.reference.keys import COLUMNS
from dpo_fast.tokenization import TokenizeRows
from dpo_fast.truncation import TruncateRows

ROWS_AHEAD = 64  # that are tokenised together, and scored together by the reference


def prepare_stream(
    dataset: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    comparisons: ComparisonChoice = "all_pairs",
    vocab_size: int | None = None,
    name: str = "train",
) -> IterableDataset:
    """Does to a stream what `data.prepare_dataset` does to a dataset, row by row; the arguments are the same.

    Raises:
        ValueError: the columns make no known format. While the stream is read, also a row that is not as described, or
            one that was cut although it brings reference log-probs.
    """
    columns = column_names(dataset)
    if not columns:
        raise ValueError(f"dataset: the {name} stream has no rows; it must have at least one")
    source = detect_format(columns)
    rows = dataset.select_columns([column for column in columns if column in source.columns])
    if source is not PREPARED:
        rows = rows.map(
            TokenizeRows(tokenizer, source, name),
            batched=True,
            batch_size=ROWS_AHEAD,
            with_indices=True,
            remove_columns=[column for column in columns if column in source.columns],
            features=tokenized_features(columns),
        )
        rows = rows.remove_columns("lost_prompt")
    step = TruncateRows(
        max_length=max_length,
        truncation_mode=truncation_mode,
        comparisons="all_pairs" if source is PREPARED else comparisons,
        vocab_size=vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        name=name,
    )
    features = group_features(rows.column_names or columns)
    rows = rows.map(step, batched=True, batch_size=ROWS_AHEAD, with_indices=True, features=Features(features | ACCOUNT))
    return rows.filter(_is_usable).remove_columns(list(ACCOUNT))


def _is_usable(row: dict[str, Any]) -> bool:
    supplied = [field for field in REFERENCE_FIELDS if row.get(field) is not None]
    if row["comparisons"] and row["truncated"] and supplied:
        raise ValueError(
            "ref_chosen_logps: a row of the stream was cut to max_length, and its reference log-probs are those of the "
            "whole; raise max_length, or leave the columns out to have them computed"
        )
    return bool(row["comparisons"])


def add_reference_to_stream(
    dataset: IterableDataset,
    column: str,
    reference: Callable[[pa.Table], pa.ListArray],
) -> IterableDataset:
    """Adds a column that `reference` makes of 64 groups at a time, when they are asked for."""

    def add(batch: dict[str, list]) -> dict[str, list]:
        rows = pa.table({name: values for name, values in batch.items() if name in COLUMNS})
        return {column: reference(rows).to_pylist()}

    return dataset.map(add, batched=True, batch_size=ROWS_AHEAD)
