"""Rows are the same whatever format the dataset has, and hold the nulls that were written where Arrow kept them."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, IterableDataset, IterableDatasetDict, Json, List, Value

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.data.prepare import prepare
from dpo_fast.data.values import plain
from tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()


def say(role, content, **more):
    return {"role": role, "content": content, **more}


TEXT = [{"prompt": f"{k}+2?", "chosen": f" {k + 2}", "rejected": " no", "weight": 1.0 + k} for k in range(5)]
KINDS = {
    "text": TEXT,
    "messages": [
        {"prompt": [say("user", row["prompt"])], "chosen": [say("assistant", row["chosen"])]}
        | {"rejected": [say("assistant", row["rejected"])]}
        for row in TEXT
    ],
    "ranked": [{"prompt": "Q", "completions": ["a", "b", f"c{k}"], "scores": [1.0, 2.0, 3.0 + k]} for k in range(5)],
    "compared": [{"prompt": "Q", "completions": ["a", f"b{k}"], "comparisons": [[1, 0]]} for k in range(5)],
    "tokens": [
        {"prompt_ids": [1, k], "chosen_ids": [k, 2], "rejected_ids": [3], "offset": 0.5}
        | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
        for k in range(5)
    ],
}


def prepared(dataset):
    groups, _ = prepare(dataset, TOKENIZER, max_length=48)
    return groups


KINDS["prepared"] = prepared(Dataset.from_list(KINDS["tokens"])).to_list()


@pytest.mark.parametrize("style", ["torch", "numpy", "pandas", "arrow"])
@pytest.mark.parametrize("rows", KINDS.values(), ids=KINDS)
def test_a_format_changes_nothing(rows, style):
    dataset = Dataset.from_list(rows)
    expected = prepared(dataset).to_list()
    assert prepared(dataset.with_format(style)).to_list() == expected
    stream = dataset.to_iterable_dataset()
    for other in (stream, stream.with_format(style), dataset.with_format(style).to_iterable_dataset()):
        found = list(prepared(other))
        assert json.dumps(found) == json.dumps(expected), "lists and numbers, not arrays"


@pytest.mark.parametrize("of", [np.array, torch.tensor])
@pytest.mark.parametrize("name", ["tokens", "ranked", "prepared"])
def test_a_stream_may_yield_arrays_and_tensors(name, of):
    def arrays(value):
        numbers = isinstance(value, int | float) or (value and isinstance(value[0], int | float))
        return of(value) if numbers else value if isinstance(value, str) else [arrays(item) for item in value]

    rows = [{column: arrays(value) for column, value in row.items()} for row in KINDS[name]]
    found = prepared(IterableDataset.from_generator(lambda: iter(rows)))
    assert json.dumps(list(found)) == json.dumps(prepared(Dataset.from_list(KINDS[name])).to_list())


def test_a_transform_is_done():
    """As TRL does, whose guide advises one."""
    dataset = Dataset.from_list([{"a": row["prompt"], "b": row["chosen"], "c": row["rejected"]} for row in TEXT])
    renamed = dataset.with_transform(lambda batch: {"prompt": batch["a"], "chosen": batch["b"], "rejected": batch["c"]})
    expected = prepared(Dataset.from_list(TEXT).remove_columns("weight")).to_list()
    assert prepared(renamed).to_list() == expected
    remove_none_values = pytest.importorskip("trl.trainer.utils").remove_none_values
    messages = Dataset.from_list(KINDS["messages"])
    assert prepared(messages.with_transform(remove_none_values)).to_list() == prepared(messages).to_list()


def test_splits_are_no_dataset():
    stream = Dataset.from_list(TEXT).to_iterable_dataset()
    with pytest.raises(ValueError, match="got IterableDatasetDict with the splits train; choose one"):
        prepared(IterableDatasetDict(train=stream))


# Nulls

CALL = {"type": "function", "function": {"name": "find", "arguments": {"name": "x", "before": None}}}
OTHER = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"properties": {"name": {"default": None}}}}}
OTHER_TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "int"}}}}}


def row_of(call, tool, kwargs):
    return {
        "prompt": [say("user", "Go"), say("assistant", "", tool_calls=[call])],
        "chosen": [say("assistant", "yes")],
        "rejected": [say("assistant", "no")],
        "tools": tool,
        "chat_template_kwargs": kwargs,
    }


ROWS = [row_of(CALL, [TOOL], {"style": "terse"}), row_of(OTHER, [OTHER_TOOL], {"thinking": True})]
JSON = Features(
    {
        "prompt": List(Json()),
        **{side: List({"role": Value("string"), "content": Value("string")}) for side in ("chosen", "rejected")},
        "tools": List(Json()),
        "chat_template_kwargs": Json(),
    }
)
AS_JSON = [{**row, "tools": json.dumps(row["tools"])} for row in ROWS]
WRITTEN = '"arguments": {"name": "x", "before": null}', '"properties": {"name": {"default": null}}'
DROPPED = '"arguments": {"name": "x"}', '"properties": {"name": {}}'


def prompts(dataset):
    return [TOKENIZER.decode(row["prompt_ids"]) for row in prepare(dataset, TOKENIZER, max_length=None)[0]]


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Dataset.from_list(ROWS, features=JSON), WRITTEN),
        (lambda: Dataset.from_list(ROWS, on_mixed_types="use_json"), WRITTEN),
        (lambda: Dataset.from_list(AS_JSON), (DROPPED[0], WRITTEN[1])),
        (lambda: Dataset.from_list(ROWS), DROPPED),
    ],
    ids=["json", "found to be json", "tools as text", "structs"],
)
def test_nulls_stay_where_they_were_written_for_sure(make, expected, stream):
    dataset = make().to_iterable_dataset() if stream else make()
    first, second = prompts(dataset)
    assert all(part in first for part in expected), first
    assert '"arguments": {"a": 1}' in second and "null" not in second, "what Arrow fills in"
    assert "<style>terse</style>" in first and "<style>" not in second


def test_a_stream_of_unknown_types_may_come_from_arrow():
    rows = Dataset.from_list(ROWS).to_list()
    first, second = prompts(IterableDataset.from_generator(lambda: iter(rows)))
    assert DROPPED[0] in first and "null" not in second
    assert plain({"a": None, "b": [{"c": None}]}) == {"b": [{}]}
    assert plain({"a": None}, Json()) == {"a": None}


def test_nulls_of_json_columns_are_trls():
    """TRL keeps all nulls; those of a column of type Json are the user's."""
    trl = pytest.importorskip("trl")
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    dataset = Dataset.from_list(copy.deepcopy(ROWS), features=JSON)
    theirs = trl.DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=TOKENIZER), dataset, TOKENIZER, args, "train")
    for row, group in zip(theirs, prepared_whole(dataset), strict=True):
        assert group.prompt_ids == row["prompt_ids"]
        assert group.completion_ids == [row["chosen_ids"], row["rejected_ids"]]


def prepared_whole(dataset):
    return [PreferenceGroup.from_row(row) for row in prepare(dataset, TOKENIZER, max_length=None)[0]]
