"""The columns of a dataset of preference groups. Each is declared here, once; every step of the preparation reads it.

A row holds one group, in columns named as the attributes of `PreferenceGroup`. `per` says what the values of a column
stand beside, one each, so that they stay in place when completions or comparisons are dropped or merged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of preference groups.

    Attributes:
        name: its name, an attribute of `PreferenceGroup` where packing uses it.
        type: type of a group's value.
        per: what there is one value of: a completion, a comparison, or the whole group.
        default: value of each completion or comparison in a dataset without the column; None for no value.
        optional: whether the column may be absent. It is in all rows of a dataset then, or in none.
        reference: whether it holds reference log-probs, which are of no use once a row was cut or merged.
        sources: columns of other formats that it is made from.
        merge: values of the same completion in merged rows → one value.
    """

    name: str
    type: Any
    per: Literal["group", "completion", "comparison"]
    default: float | int | None = None
    optional: bool = False
    reference: bool = False
    sources: frozenset[str] = frozenset()
    merge: Callable[[Sequence[Any]], Any] = lambda values: values[0]


COLUMNS = {
    column.name: column
    for column in (
        Column("prompt_ids", List(Value("int32")), "group"),
        Column("completion_ids", List(List(Value("int32"))), "completion"),
        Column("comparisons", List(List(Value("int32"))), "comparison"),
        Column("comparison_weights", List(Value("float64")), "comparison", default=1.0, merge=sum),
        Column("context_lengths", List(Value("int32")), "completion", default=0),
        Column("ref_logps", List(Value("float64")), "completion", optional=True, reference=True,
               sources=frozenset({"ref_chosen_logps"})),
        Column("ref_token_logps", List(List(Value("float32"))), "completion", optional=True, reference=True),
        Column("comparison_offsets", List(Value("float64")), "comparison", optional=True,
               sources=frozenset({"offset"})),
        Column("completion_scores", List(Value("float64")), "completion", optional=True,
               sources=frozenset({"scores", "ranks"}), merge=fmean),
    )
}  # fmt: skip
REFERENCE_FIELDS = tuple(column.name for column in COLUMNS.values() if column.reference)
KEY_COLUMNS = ("prompt_ids", "completion_ids", "context_lengths")  # what the keys of the reference store are made of
# What a row was and became when it was cut. Of the first ones the sum over all rows is told.
COUNTS = ("truncated", "lost_eos", "repeated_bos", "repeated_eos")
ACCOUNT = {name: Value("int32") for name in COUNTS} | {"reasons": List(Value("string"))}
WINDOW = 16_384  # rows of a dataset that are in memory together; Arrow's lists hold 2³¹ tokens


def group_features(columns: Collection[str]) -> Features:
    """Return the types of groups; of the optional columns, those among `columns`."""
    return Features({name: c.type for name, c in COLUMNS.items() if not c.optional or name in columns})


def tokenized_features(columns: Collection[str]) -> Features:
    """Return the types of groups that were just tokenised, from rows with these columns."""
    supplied = [name for name, column in COLUMNS.items() if column.sources & set(columns)]
    return Features(group_features(supplied) | {"lost_prompt": Value("string")})


def with_defaults(group: Row) -> Row:
    """Return `group` with the default of every column that it lacks."""
    counts = {"completion": len(group["completion_ids"]), "comparison": len(group["comparisons"])}
    missing = [c for c in COLUMNS.values() if c.default is not None and group.get(c.name) is None]
    return {**group, **{c.name: [c.default] * counts[c.per] for c in missing}}


def take(group: Row, per: Literal["completion", "comparison"], kept: Sequence[int]) -> Row:
    """Return `group` with some of its completions or comparisons, in every column that has a value for each."""
    aligned = [name for name in group if name in COLUMNS and COLUMNS[name].per == per]
    return {**group, **{name: [group[name][index] for index in kept] for name in aligned}}


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Return the names of the columns; a stream that does not know them shows its first row."""
    return dataset.column_names or list(next(iter(dataset), {}))


def token_tables(dataset: Dataset) -> Iterator[pa.Table]:
    """Yield the columns that keys and batches are made of, of all rows, some at a time."""
    columns = [column for column in KEY_COLUMNS if column in dataset.column_names]
    rows = dataset.select_columns(columns).with_format("arrow")
    for start in range(0, len(rows), WINDOW):
        yield rows[start : start + WINDOW]
