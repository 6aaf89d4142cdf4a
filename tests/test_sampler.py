"""Packs respect the token bound, lose nothing and are as few as first-fit-decreasing makes them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.sampler import split_by_tokens


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(10, 80))
def test_packs_partition_the_items_under_the_bound(costs, bound):
    packs = split_by_tokens(range(len(costs)), costs, bound)
    assert sorted(i for pack in packs for i in pack) == list(range(len(costs)))
    assert all(sum(costs[i] for i in pack) <= bound or len(pack) == 1 for pack in packs)
    fitting = [cost for cost in costs if cost <= bound]
    assert sum(len(pack) > 1 or costs[pack[0]] <= bound for pack in packs) <= 2 * sum(fitting) / bound + 1


def test_no_bound_is_one_pack_in_order():
    assert split_by_tokens("cab", [3, 1, 2], None) == [["c", "a", "b"]]
