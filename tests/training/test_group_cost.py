"""Ranks wait little for each other: every group of a step is dealt once, by cost, the same on every rank.

triple_lengths.json has the tokens of prompt, chosen and rejected of 300 real pairs, counted by SmolLM2's tokenizer.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.training.group_cost import GroupCost, assign_groups, mean_to_max
from families import tiny_model

TRIPLES = json.loads((Path(__file__).parent / "triple_lengths.json").read_text())
SMOLLM2 = GroupCost(parameters=106_203_456, hidden_size=576, num_layers=30, vocab_size=49152)
LLAMA_8B = GroupCost(parameters=6_979_588_096, hidden_size=4096, num_layers=32, vocab_size=128256)

COSTS = st.lists(st.integers(1, 10**15), max_size=60)
RANKS = st.integers(1, 9)


def steps(groups: int, count: int = 8) -> list[list[list[int]]]:
    """Steps of so many groups: shuffled epochs one after another, as a sampler gives them."""
    generator, order = random.Random(0), []
    while len(order) < groups * count:
        order += generator.sample(TRIPLES, len(TRIPLES))
    return [order[groups * step :][:groups] for step in range(count)]


def loads(costs: list[int], parts: list[list[int]]) -> list[int]:
    return [sum(costs[i] for i in part) for part in parts]


@pytest.mark.parametrize("cost", [SMOLLM2, LLAMA_8B], ids=["SmolLM2-135M", "Llama-3-8B"])
def test_64_ranks_of_real_lengths_are_busy(cost):
    assigned, naive = [], []
    for step in steps(64 * 8):
        costs = [cost(prompt, completions) for prompt, *completions in step]
        assigned.append(mean_to_max(loads(costs, assign_groups(costs, 64))))
        naive.append(mean_to_max([sum(costs[8 * rank :][:8]) for rank in range(64)]))
    print(f"\nmean-to-max load of 64 ranks: by cost from {min(assigned):.3f}, naive to {max(naive):.3f}")
    assert min(assigned) >= 0.95
    assert max(naive) < 0.8, "lengths so even that nothing is shown"


@given(COSTS, RANKS)
def test_every_group_is_dealt_once_and_no_rank_exceeds_another_by_more_than_one(costs, ranks):
    assigned = assign_groups(costs, ranks)
    assert assigned == assign_groups(list(costs), ranks)
    assert len(assigned) == ranks and sum(map(bool, assigned)) == min(ranks, len(costs))
    assert sorted(i for part in assigned for i in part) == list(range(len(costs)))
    for load, part in zip(loads(costs, assigned), assigned, strict=True):
        assert part == sorted(part)
        assert load - min(loads(costs, assigned)) <= min((costs[i] for i in part), default=0)


@given(st.lists(st.integers(1, 8), max_size=40), RANKS, st.randoms(use_true_random=False))
def test_the_order_of_groups_changes_who_takes_which_and_no_load(costs, ranks, generator):
    other = generator.sample(costs, len(costs))
    assert loads(costs, assign_groups(costs, ranks)) == loads(other, assign_groups(other, ranks))


def test_a_tie_goes_to_the_first_rank_and_the_first_group():
    assert assign_groups([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert assign_groups([1, 9, 1, 1], 2) == [[1], [0, 2, 3]]
    assert assign_groups([], 2) == [[], []]


def test_cost_counts_products_and_visible_pairs():
    cost = GroupCost(parameters=1000, hidden_size=10, num_layers=3, vocab_size=7)
    prompt, completions = 4, [2, 3]

    def visible(lengths: list[int]) -> int:
        total = sum(lengths)
        return int(torch.ones(total, total).tril()[total - lengths[-1] :].sum())

    pairs = visible([4]) + visible([4, 2]) + visible([4, 3])
    assert cost(prompt, completions) == 2 * 1000 * 9 + 2 * 10 * 7 * 5 + 4 * 10 * 3 * pairs
    padded = 2 * visible([7])
    assert replace(cost, layout="padded")(prompt, completions) == 2 * 1000 * 14 + 2 * 10 * 7 * 5 + 4 * 10 * 3 * padded


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_sizes_of_a_model(family):
    model = tiny_model(family)
    cost = GroupCost.of_model(model)
    body = sum(p.numel() for name, p in model.model.named_parameters() if "embed_tokens" not in name)
    assert cost.parameters == body
    assert cost.hidden_size == model.config.hidden_size and cost.num_layers == model.config.num_hidden_layers
    assert cost.vocab_size == model.lm_head.weight.shape[0]


def test_mean_to_max():
    assert mean_to_max([3, 3]) == 1.0
    assert mean_to_max([4, 2]) == 0.75
    assert mean_to_max([0, 0]) == 1.0


def test_a_cost_of_nothing_is_refused():
    with pytest.raises(ValueError, match="^costs must be 1 or more, got 0"):
        assign_groups([1, 0], 2)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_costs_of_a_dataset_are_those_of_its_groups(layout):
    groups = [(prompt, completions) for prompt, *completions in TRIPLES[:20]] + [(7, [1, 2, 3, 4]), (0, [5, 5])]
    rows = [{"prompt_ids": [1] * prompt, "completion_ids": [[1] * n for n in lengths]} for prompt, lengths in groups]
    dataset = Dataset.from_list(rows)
    cost = replace(SMOLLM2, layout=layout)
    assert cost.of_dataset(dataset) == [cost(*group) for group in groups]
    chosen = [21, 3, 3]
    assert cost.of_dataset(dataset.select(chosen)) == [cost(*groups[k]) for k in chosen]
