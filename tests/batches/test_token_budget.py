"""Packs respect the token bound, lose nothing, are few and nearly equal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.batches.token_budget import split_by_tokens


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(10, 80))
def test_packs_partition_the_items_under_the_bound(costs, bound):
    packs = split_by_tokens(range(len(costs)), costs, bound)
    assert sorted(i for pack in packs for i in pack) == list(range(len(costs)))
    assert all(pack == sorted(pack) for pack in packs)
    assert all(sum(costs[i] for i in pack) <= bound or len(pack) == 1 for pack in packs)
    fitting = [pack for pack in packs if costs[pack[0]] <= bound]
    total = sum(costs[i] for pack in fitting for i in pack)
    assert len(fitting) <= 2 * total / bound + 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 200))
def test_packs_differ_by_at_most_their_longest_item(costs, bound):
    loads = [sum(costs[i] for i in pack) for pack in split_by_tokens(range(len(costs)), costs, bound)]
    assert max(loads) - min(loads) <= max(costs)


def test_no_bound_is_one_pack_in_order():
    assert split_by_tokens("cab", [3, 1, 2], None) == [["c", "a", "b"]]
