"""Keys of a dataset, taken from its columns at once, are those of its completions one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.data import columns
from dpo_fast.data.columns import token_tables
from dpo_fast.reference.store.keys import CompletionKeys, completion_key, group_keys, key_array, prompt_keys

ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)


@st.composite
def groups(draw):
    completions = draw(st.lists(ids.filter(len), min_size=1, max_size=4))
    contexts = [draw(st.integers(0, len(completion) - 1)) for completion in completions]
    return {
        "prompt_ids": draw(ids),
        "completion_ids": completions,
        "context_lengths": draw(st.sampled_from([contexts, None])),
    }


def one_by_one(rows) -> np.ndarray:
    return key_array([key for row in rows for key in group_keys(PreferenceGroup.from_row(row))])


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(groups(), min_size=1, max_size=9), window=st.integers(1, 4))
def test_keys_of_columns_are_those_of_completions(rows, window):
    dataset = Dataset.from_list(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "WINDOW", window)
        found = CompletionKeys.of_tables(token_tables(dataset))
        prompts = [key for table in token_tables(dataset) for key in prompt_keys(table)]
    assert np.array_equal(found.values, one_by_one(rows))
    assert np.diff(found.bounds).tolist() == [len(row["completion_ids"]) for row in rows]
    assert prompts == [completion_key(row["prompt_ids"], ()) for row in rows]
    for start in range(0, len(rows), window):
        part = found.window(start, start + window)
        assert np.array_equal(part.values, one_by_one(rows[start : start + window]))
        assert part.bounds[0] == 0 and part.bounds[-1] == len(part.values)


def test_rows_that_were_chosen_and_columns_of_other_types():
    rows = [{"prompt_ids": [k], "completion_ids": [[k, 1], [2]], "more": str(k)} for k in range(9)]
    dataset = Dataset.from_list(rows).select([7, 2, 2])  # int64 ids, an index over the rows
    assert np.array_equal(
        CompletionKeys.of_tables(token_tables(dataset)).values, one_by_one([rows[7], rows[2], rows[2]])
    )
    assert CompletionKeys.of_tables(token_tables(dataset.select([]))).values.shape == (0, 2)


def test_where_the_completion_begins_counts():
    """The same tokens, cut elsewhere, are scored differently."""
    cuts = [completion_key([1, 2][:cut], [1, 2, 3][cut:], context) for cut in range(3) for context in range(2)]
    same = {(0, 1): 1, (1, 0): 1, (1, 1): 2, (2, 0): 2}  # context counts as prompt
    places = list(itertools.product(range(3), range(2)))
    for (one, key), (another, other) in itertools.combinations(zip(places, cuts, strict=True), 2):
        assert (key == other) == (one in same and same[one] == same.get(another))
