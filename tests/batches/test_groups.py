"""Packing keeps every token, gives every completion its own positions, and scores exactly its completion tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.batches.collator import DPOCollator
from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast_kernels import GatherPlan, gather_rows

token_ids = st.lists(st.integers(3, 90), min_size=1, max_size=9)


@st.composite
def preference_groups(draw) -> PreferenceGroup:
    prompt = draw(st.lists(st.integers(3, 90), max_size=7))
    completions = draw(st.lists(token_ids, min_size=2, max_size=4))
    if not prompt:  # nothing predicts the first token of a sequence: leave one to score
        completions = [[3, *ids] for ids in completions]
    contexts = [draw(st.integers(0, len(ids) - 1)) for ids in completions]
    comparisons = [(k, 0) for k in range(1, len(completions))]
    return PreferenceGroup(prompt, completions, comparisons, [1.0] * len(comparisons), contexts)


def sequences(groups):
    """(prompt + completion, index of the first scored token) of every completion, by definition."""
    for group in groups:
        for ids, context in zip(group.completion_ids, group.contexts, strict=True):
            yield [*group.prompt_ids, *ids], max(len(group.prompt_ids) + context, 1)


@given(st.lists(preference_groups(), min_size=1, max_size=4), st.sampled_from(["shared", "padded"]))
def test_score_rows_and_targets_are_the_completion_tokens(groups, layout):
    packed = pack(groups, layout)
    ids, positions = packed.input_ids.reshape(-1), packed.position_ids.reshape(-1)
    bounds = packed.cu_scores.tolist()
    for (sequence, first), start, end in zip(sequences(groups), bounds[:-1], bounds[1:], strict=True):
        rows = packed.score_rows.index[start:end]
        assert packed.targets[start:end].tolist() == sequence[first:]
        assert ids[rows].tolist() == sequence[first - 1 : -1], "the row before a token predicts it"
        assert positions[rows].tolist() == list(range(first - 1, len(sequence) - 1))
    assert packed.completion_lengths.tolist() == [
        len(ids) - context for g in groups for ids, context in zip(g.completion_ids, g.contexts, strict=True)
    ]


@given(st.lists(preference_groups(), min_size=1, max_size=4))
def test_shared_layout_holds_one_prompt_a_group_and_keys_rebuild_every_sequence(groups):
    packed = pack(groups, "shared")
    assert packed.num_tokens == packed.input_ids.shape[1] == sum(group.num_tokens() for group in groups)
    keys = packed.input_ids[0][packed.prefix.keys.index]
    bounds = packed.prefix.cu_seqlens_k.tolist()
    rebuilt = [keys[start:end].tolist() for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    assert rebuilt == [sequence for sequence, _ in sequences(groups)]
    assert packed.prefix.cu_seqlens_q[-1] == packed.num_tokens


@given(st.lists(preference_groups(), min_size=2, max_size=4))
def test_comparisons_point_at_completions_of_their_own_group(groups):
    packed = pack(groups)
    start, expected = 0, []
    for group in groups:
        expected += [[winner + start, loser + start] for winner, loser in group.comparisons]
        start += len(group.completion_ids)
    assert packed.comparisons.tolist() == expected


def test_reference_log_probs_on_some_groups_only_are_refused():
    group = PreferenceGroup([1], [[2], [3]])
    with pytest.raises(ValueError, match="ref_logps"):
        pack([group, PreferenceGroup([1], [[2], [3]], ref_logps=[0.0, 0.0])])
    with pytest.raises(ValueError, match="groups is empty"):
        pack([])


@given(st.lists(st.integers(0, 6), max_size=30), st.integers(1, 3))
def test_gather_rows_equals_indexing_and_sums_the_gradient_of_repeats(index, columns):
    x = torch.randn(7, columns, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(index), columns, dtype=torch.float64)
    y = gather_rows(x, GatherPlan.build(np.asarray(index, np.int64)))
    assert torch.equal(y, x[index])
    (y * weights).sum().backward()
    expected = torch.zeros_like(x)
    for row, weight in zip(index, weights, strict=True):
        expected[row] += weight
    assert torch.allclose(x.grad, expected, atol=1e-14)


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (PreferenceGroup([1], [[2], [3]], [(0, 2)]), r"comparisons \[\(0, 2\)\] of group 1 must be indices of its 2"),
        (PreferenceGroup([1], [[2], [3]], [(-1, 0)]), "of group 1 must be indices"),
        (PreferenceGroup([1], [[2], [3]], [(1, 1)]), "of group 1 compare one with itself"),
        (PreferenceGroup([1], [[2], [3], [4]], [(0, 1), (0, 2)]), "group 1 has 1 comparison_weights for 2 comparisons"),
    ],
)
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_comparison_outside_its_group_is_refused(group, words, layout):
    """It would compare completions of two prompts."""
    with pytest.raises(ValueError, match=words):
        pack([PreferenceGroup([1], [[2], [3]]), group], layout)


def test_raw_rows_and_unknown_layouts_are_refused():
    with pytest.raises(ValueError, match=r"rows have the columns \['chosen', 'prompt', 'rejected'\]; give tokenised"):
        DPOCollator()([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ValueError, match="layout='packed' is not known"):
        pack([PreferenceGroup([1], [[2], [3]])], "packed")
