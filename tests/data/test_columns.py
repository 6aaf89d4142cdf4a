"""A column is declared once: one line in `columns`, and it goes through the whole preparation in its place."""

from __future__ import annotations

import dataclasses

import pytest
from datasets import Dataset, List, Value

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.data import formats
from dpo_fast.data.columns import COLUMNS, Column, group_features, take, with_defaults
from dpo_fast.data.prepare import prepare_dataset
from families import tiny_tokenizer

NEW = (
    Column("difficulties", List(Value("float64")), "comparison", optional=True),
    Column("ages", List(Value("float64")), "completion", optional=True, merge=max),
)
ROW = {
    "prompt_ids": [3, 4],
    "completion_ids": [[5], [6], [], [5]],  # the third is empty, the fourth is the first again
    "comparisons": [[0, 1], [1, 2], [0, 3], [1, 3]],
    "difficulties": [0.1, 1.2, 0.3, 1.3],
    "ages": [10.0, 11.0, 12.0, 13.0],
}


@pytest.fixture(params=NEW, ids=[column.name for column in NEW])
def column(request, monkeypatch):
    """A new column: the line in `COLUMNS`, and the format of prepared groups made of it as on import."""
    new = request.param
    monkeypatch.setitem(COLUMNS, new.name, new)
    prepared = dataclasses.replace(formats.PREPARED, optional=(*formats.PREPARED.optional, new.name))
    monkeypatch.setattr(formats, "PREPARED", prepared)
    monkeypatch.setattr(formats, "FORMATS", (prepared, *formats.FORMATS[1:]))
    monkeypatch.setattr("dpo_fast.data.prepare.PREPARED", prepared)
    return new


def prepared(rows, **options):
    groups, _ = prepare_dataset(Dataset.from_list(rows), tiny_tokenizer(), max_length=None, **options)
    return groups


def test_a_new_column_stays_in_place(column):
    row = {name: ROW[name] for name in ("prompt_ids", "completion_ids", "comparisons", column.name)}
    (group,) = prepared([row])
    assert group["comparisons"] == [[0, 1], [1, 2]], "one comparison has an empty side, one has equal sides"
    assert group[column.name] == {"difficulties": [0.1, 1.3], "ages": [10.0, 11.0, 13.0]}[column.name]


def test_a_new_column_is_merged_as_it_says(column):
    row = {name: ROW[name] for name in ("prompt_ids", "completion_ids", "comparisons", column.name)}
    (group,) = prepared([row, row], group_by_prompt=True)
    assert group["completion_ids"] == [[5], [6]] and group["comparisons"] == [[0, 1], [1, 0]]
    assert group[column.name] == {"difficulties": [0.1, 1.3], "ages": [13.0, 11.0]}[column.name]


def test_a_new_column_is_checked(column):
    row = {name: ROW[name] for name in ("prompt_ids", "completion_ids", "comparisons")}
    with pytest.raises(ValueError, match=f"row 0: column '{column.name}' holds 1 for 4 {column.per}s"):
        prepared([{**row, column.name: [1.0]}])
    with pytest.raises(ValueError, match=f"row 0: column '{column.name}': expected finite numbers"):
        prepared([{**row, column.name: [float("nan")] * 4}])
    with pytest.raises(ValueError, match=f"row 1: column '{column.name}' is missing"):
        prepared([{**row, column.name: [1.0] * 4}, {**row, column.name: None}])


def test_packing_knows_no_column_that_is_not_declared():
    assert {field.name for field in dataclasses.fields(PreferenceGroup)} <= set(COLUMNS)


def test_what_a_dataset_leaves_out_has_its_default():
    group = with_defaults({"prompt_ids": [1], "completion_ids": [[2], [3], [4]], "comparisons": [(0, 1), (0, 2)]})
    assert group["comparison_weights"] == [1.0, 1.0] and group["context_lengths"] == [0, 0, 0]
    assert (
        "ref_logps" not in group
        and "ref_logps" not in group_features(())
        and "ref_logps" in group_features(["ref_logps"])
    )


def test_taking_completions_leaves_comparisons_alone():
    group = take(with_defaults({**ROW, "comparison_offsets": [1.0, 2.0, 3.0, 4.0]}), "completion", [1, 3])
    assert group["completion_ids"] == [[6], [5]] and group["context_lengths"] == [0, 0]
    assert group["comparison_offsets"] == [1.0, 2.0, 3.0, 4.0] and group["prompt_ids"] == [3, 4]
