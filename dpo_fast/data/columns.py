"""The columns of a dataset of preference groups, between the steps that prepare it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value

from dpo_fast.batches.groups import PreferenceGroup

WINDOW = 16_384  # rows of a dataset that are in memory together; Arrow's lists hold 2³¹ tokens
COLUMNS = ("prompt_ids", "completion_ids", "context_lengths")
FIELDS = tuple(field.name for field in fields(PreferenceGroup))
REFERENCE_FIELDS = ("ref_logps", "ref_token_logps")
# In all rows of a dataset, or in none.
OPTIONAL_FIELDS = (*REFERENCE_FIELDS, "comparison_offsets", "completion_scores")
# What became of a row when it was cut.
ACCOUNT = {"truncated": Value("int32"), "lost_eos": Value("int32"), "reasons": List(Value("string"))}

_TYPES = {
    "prompt_ids": List(Value("int32")),
    "completion_ids": List(List(Value("int32"))),
    "comparisons": List(List(Value("int32"))),
    "comparison_weights": List(Value("float64")),
    "context_lengths": List(Value("int32")),
    "ref_logps": List(Value("float64")),
    "ref_token_logps": List(List(Value("float32"))),
    "comparison_offsets": List(Value("float64")),
    "completion_scores": List(Value("float64")),
}
_SOURCES = {
    "ref_logps": {"ref_chosen_logps"},
    "comparison_offsets": {"offset"},
    "completion_scores": {"scores", "ranks"},
}


def group_features(columns: Collection[str]) -> Features:
    """Types of groups; of the optional fields, those among `columns`."""
    return Features({field: _TYPES[field] for field in FIELDS if field not in OPTIONAL_FIELDS or field in columns})


def tokenized_features(columns: Collection[str]) -> Features:
    """Types of groups that were just tokenised, from rows with these columns."""
    supplied = [field for field, names in _SOURCES.items() if names & set(columns)]
    return Features(group_features(supplied) | {"lost_prompt": Value("string")})


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; a stream that does not know them shows its first row."""
    return dataset.column_names or list(next(iter(dataset), {}))


def token_tables(dataset: Dataset) -> Iterator[pa.Table]:
    """The columns that keys and batches are made of, of all rows, some at a time."""
    columns = [column for column in COLUMNS if column in dataset.column_names]
    rows = dataset.select_columns(columns).with_format("arrow")
    for start in range(0, len(rows), WINDOW):
        yield rows[start : start + WINDOW]
