"""Best-of-K accuracy and Kendall's τ of groups: by hand, by definition, and whatever the order or the ties."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.training.metrics import group_metrics

BEST, TAU = "rewards/best_of_k", "rewards/kendall_tau"


def metrics(groups: list[list[tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Of (reward, score) pairs, group by group."""
    rewards, scores = torch.tensor([pair for group in groups for pair in group]).reshape(-1, 2).unbind(1)
    index = torch.tensor([number for number, group in enumerate(groups) for _ in group], dtype=torch.int64)
    return {name: (a.item(), b.item()) for name, (a, b) in group_metrics(rewards, scores, index).items()}


def test_by_hand():
    right = [(3.0, 9.0), (1.0, 2.0), (2.0, 5.0)]
    wrong = [(1.0, 9.0), (3.0, 2.0), (2.0, 5.0)]
    values = metrics([right, wrong])
    assert values[BEST] == pytest.approx((1.0, 2.0))
    assert values[TAU] == pytest.approx((1.0 - 1.0, 2.0), abs=1e-6)


def test_a_tie_for_the_highest_reward_counts_in_part():
    assert metrics([[(2.0, 1.0), (2.0, 3.0), (0.0, 2.0)]])[BEST] == pytest.approx((0.5, 1.0))


def test_what_cannot_be_ranked_does_not_count():
    nan = math.nan
    alike, unscored, alone = [(1.0, 2.0), (2.0, 2.0)], [(1.0, nan), (2.0, nan)], [(1.0, 5.0)]
    values = metrics([alike, unscored, alone, [(2.0, 2.0), (1.0, 1.0)]])
    assert values[BEST] == pytest.approx((2.0, 2.0)), "of equal scores any is the best"
    assert values[TAU] == pytest.approx((1.0, 1.0))
    assert all(math.isfinite(value) for pair in values.values() for value in pair)


def tau_b(group: list[tuple[float, float]]) -> float | None:
    signs = [
        (math.copysign(a[0] != b[0], a[0] - b[0]), math.copysign(a[1] != b[1], a[1] - b[1]))
        for a, b in combinations(group, 2)
    ]
    rewards, scores = sum(abs(r) for r, _ in signs), sum(abs(s) for _, s in signs)
    if not scores:
        return None
    return sum(r * s for r, s in signs) / math.sqrt(rewards * scores) if rewards else 0.0


values = st.integers(-3, 3).map(float)


@given(st.lists(st.lists(st.tuples(values, values), min_size=2, max_size=6), min_size=1, max_size=5))
def test_equal_to_the_definitions(groups):
    found = metrics(groups)
    taus = [tau for tau in map(tau_b, groups) if tau is not None]
    assert found[TAU] == pytest.approx((sum(taus), len(taus)), abs=1e-5)
    hits = 0.0
    for group in groups:
        top = [score for reward, score in group if reward == max(reward for reward, _ in group)]
        hits += top.count(max(score for _, score in group)) / len(top)
    assert found[BEST] == pytest.approx((hits, len(groups)), abs=1e-5)
    mixed = [group[::-1] for group in groups[::-1]]
    assert metrics(mixed)[TAU] == pytest.approx(found[TAU], abs=1e-5)
