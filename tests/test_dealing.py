"""Ranks wait little for each other: every group of a step is dealt once, by cost, the same on every rank.

triple_lengths.json has the tokens of prompt, chosen and rejected of 300 real pairs, counted by SmolLM2's tokenizer.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.dealing import GroupCost, deal_groups, mean_to_max, pack_loads
from dpo_fast.sampler import split_by_tokens
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


def whole_steps(loads: list[list[int]]) -> list[list[int]]:
    """The loads of an engine whose ranks wait for each other once a step."""
    return [[sum(packs)] for packs in loads]


@pytest.mark.parametrize("cost", [SMOLLM2, LLAMA_8B], ids=["SmolLM2-135M", "Llama-3-8B"])
@pytest.mark.parametrize("max_tokens", [None, 8192])
def test_64_ranks_of_real_lengths_are_busy(cost, max_tokens):
    dealt, naive, by_pack = [], [], []
    for step in steps(64 * 8):
        costs = [cost(prompt, completions) for prompt, *completions in step]
        packs = deal_groups(costs, list(map(sum, step)), 64, max_tokens)
        loads = pack_loads(costs, packs)
        dealt.append(mean_to_max(whole_steps(loads)))
        by_pack.append(mean_to_max(loads))
        naive.append(mean_to_max([[sum(costs[8 * rank :][:8])] for rank in range(64)]))
    print(
        f"\nmean-to-max load of 64 ranks, worst of {len(dealt)} steps: dealt {min(dealt):.3f}, naive {min(naive):.3f}; "
        f"dealt, waiting after every pack under {max_tokens} tokens: {min(by_pack):.3f}"
    )
    assert min(dealt) >= 0.95
    assert max(naive) < 0.8, "lengths so even that nothing is shown"
    assert min(by_pack) > max(naive)


@given(COSTS, RANKS, st.none() | st.integers(10, 200), st.randoms(use_true_random=False))
def test_every_group_is_dealt_once_and_ranks_have_equally_many_packs(costs, ranks, max_tokens, generator):
    tokens = [generator.randint(1, 120) for _ in costs]
    dealt = deal_groups(costs, tokens, ranks, max_tokens)
    assert dealt == deal_groups(list(costs), list(tokens), ranks, max_tokens)
    assert sorted(i for packs in dealt for pack in packs for i in pack) == list(range(len(costs)))
    assert len(dealt) == ranks and len({len(packs) for packs in dealt}) == 1
    assert sum(any(packs) for packs in dealt) == min(ranks, len(costs))
    for packs, loads in zip(dealt, pack_loads(costs, dealt), strict=True):
        assert loads == sorted(loads, reverse=True)
        for pack in packs:
            assert pack == sorted(pack)
            assert max_tokens is None or len(pack) == 1 or sum(tokens[i] for i in pack) <= max_tokens
    if max_tokens is None:
        assert len(dealt[0]) == 1
    else:  # as many as the rank that needs most, and no more
        needed = (split_by_tokens(i, [tokens[j] for j in i], max_tokens) for i in ([*sum(p, [])] for p in dealt))
        assert len(dealt[0]) == max([1, *(len(packs) for packs in needed)])


@given(COSTS.filter(bool), RANKS)
def test_no_rank_exceeds_another_by_more_than_one_group(costs, ranks):
    dealt = deal_groups(costs, costs, ranks)
    for (load,), (pack,) in zip(pack_loads(costs, dealt), dealt, strict=True):
        least = min(total for (total,) in pack_loads(costs, dealt))
        assert load - least <= min((costs[i] for i in pack), default=0)


@given(st.lists(st.integers(1, 8), max_size=40), RANKS, st.randoms(use_true_random=False))
def test_the_order_of_groups_changes_who_takes_which_and_no_load(costs, ranks, generator):
    other = generator.sample(costs, len(costs))
    one, two = (pack_loads(x, deal_groups(x, x, ranks)) for x in (costs, other))
    assert one == two


def test_a_tie_goes_to_the_first_rank_and_the_first_group():
    assert deal_groups([5, 5, 5, 5], [1, 1, 1, 1], 2) == [[[0, 2]], [[1, 3]]]
    assert deal_groups([1, 9, 1, 1], [1, 1, 1, 1], 2) == [[[1]], [[0, 2, 3]]]


def test_ranks_with_fewer_packs_split_further_or_run_empty():
    """The first rank has the two long groups alone, the second one pack's worth: it makes two of it."""
    assert deal_groups([40, 30, 39, 31], [90, 80, 10, 10], 2, 100) == [[[0], [1]], [[2], [3]]]
    assert deal_groups([90, 1, 1], [60, 60, 60], 2, 100) == [[[0], []], [[1], [2]]]
    assert deal_groups([], [], 2, 100) == deal_groups([], [], 2) == [[[]], [[]]]


def test_cost_counts_products_and_visible_pairs():
    cost = GroupCost(parameters=1000, hidden_size=10, num_layers=3, vocab_size=7)
    prompt, completions = 4, [2, 3]

    def visible(lengths: list[int]) -> int:
        total = sum(lengths)
        return int(torch.ones(total, total).tril()[total - lengths[-1] :].sum())

    pairs = visible([4]) + visible([4, 2]) + visible([4, 3])
    assert cost(prompt, completions) == 2 * 1000 * 9 + 2 * 10 * 7 * 5 + 4 * 10 * 3 * pairs
    padded = 2 * visible([7])
    assert cost(prompt, completions, "padded") == 2 * 1000 * 14 + 2 * 10 * 7 * 5 + 4 * 10 * 3 * padded


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_sizes_of_a_model(family):
    model = tiny_model(family)
    cost = GroupCost.of_model(model)
    body = sum(p.numel() for name, p in model.model.named_parameters() if "embed_tokens" not in name)
    assert cost.parameters == body
    assert cost.hidden_size == model.config.hidden_size and cost.num_layers == model.config.num_hidden_layers
    assert cost.vocab_size == model.lm_head.weight.shape[0]


def test_mean_to_max():
    assert mean_to_max([[3], [3]]) == 1.0
    assert mean_to_max([[4], [2]]) == 0.75
    assert mean_to_max([[4, 0], [0, 4]]) == 0.5, "equal sums, but ranks wait after every pack"
    assert mean_to_max([[], []]) == 1.0


@pytest.mark.parametrize("argument, costs, tokens", [("tokens", [1, 2], [1]), ("costs", [1, 0], [1, 1])])
def test_bad_arguments_are_named(argument, costs, tokens):
    with pytest.raises(ValueError, match=f"^{argument} must"):
        deal_groups(costs, tokens, 2)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_costs_of_a_dataset_are_those_of_its_groups(layout):
    groups = [(prompt, completions) for prompt, *completions in TRIPLES[:20]] + [(7, [1, 2, 3, 4]), (0, [5, 5])]
    rows = [{"prompt_ids": [1] * prompt, "completion_ids": [[1] * n for n in lengths]} for prompt, lengths in groups]
    dataset = Dataset.from_list(rows)
    assert SMOLLM2.of_dataset(dataset, layout) == [SMOLLM2(*group, layout) for group in groups]
    chosen = [21, 3, 3]
    assert SMOLLM2.of_dataset(dataset.select(chosen), layout) == [SMOLLM2(*groups[k], layout) for k in chosen]
