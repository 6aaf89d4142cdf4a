"""Values of rows as Python's own types, whatever format a dataset has and whatever Arrow filled in."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset, Json, LargeList, List

_ATOMS = (str, int, float)


def element_type(feature: Any) -> Any:
    """Return the type of a list's elements; None where `feature` is no list."""
    if isinstance(feature, List | LargeList):
        return feature.feature
    return feature[0] if isinstance(feature, list) else None


def plain(value: Any, feature: Any = None) -> Any:
    """Return a value with lists for arrays and tensors, and without the keys that Arrow filled in with None.

    Arrow gives all structs of a column the same keys. Which None was written and which was filled in cannot be told
    apart, so both go. A column of type `Json` holds what was written, and keeps it.

    Args:
        value: of a column, or of a part of it.
        feature: its type; None for a stream that does not know it, whose rows may come from Arrow.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(feature, Json):
        return value
    if isinstance(value, dict):
        types = feature if isinstance(feature, dict) else {}
        return {key: plain(item, types.get(key)) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple) and not (value and isinstance(value[0], _ATOMS)):
        inner = element_type(feature)
        return [plain(item, inner) for item in value]
    return value


def is_transformed(dataset: Dataset | IterableDataset) -> bool:
    """Return whether a function of the user makes the rows, so that their columns need not be the dataset's."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def plain_rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return a dataset whose rows are Python values: its format is taken off, and its transform is done."""
    if is_transformed(dataset):
        dataset = dataset.map(_unchanged, batched=True, remove_columns=dataset.column_names)
    return dataset.with_format(None)


def _unchanged(batch: dict[str, list]) -> dict[str, list]:
    return dict(batch)
