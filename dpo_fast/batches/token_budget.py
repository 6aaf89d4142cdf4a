"""Which groups of a step go into which pack.

transformers' samplers decide which groups form a batch; here a batch is split into packs that fit the memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def longest_first(costs: Sequence[int]) -> list[int]:
    """Returns the indices of `costs` from the largest to the smallest, equal ones as they stand."""
    return sorted(range(len(costs)), key=lambda i: -costs[i])


def assign_greedily(
    order: Sequence[int], costs: Sequence[int], count: int, max_load: int | None = None
) -> list[list[int]] | None:
    """Give the indices `order` one by one to the least loaded of `count` parts, the first of these.

    Return the parts, or None when one would exceed `max_load`. Longest first, no part exceeds another by more than its
    last index costs, and the largest load is within a third of the least possible (Graham 1969).
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, part) for part in range(count)]
    for index in order:
        load, part = heapq.heappop(loads)
        if max_load is not None and load + costs[index] > max_load:
            return None
        parts[part].append(index)
        heapq.heappush(loads, (load + costs[index], part))
    return parts


def split_by_tokens(items: Sequence[Item], costs: Sequence[int], max_tokens: int | None) -> list[list[Item]]:
    """Divide `items` into few packs of nearly equal cost, each within `max_tokens`.

    Longest first, each to the pack with the least so far: no pack ends up small, where products are slow and round
    differently. An item that exceeds `max_tokens` alone gets a pack of its own: nothing can make it smaller. Items keep
    their order inside a pack. `max_tokens=None` is one pack.
    """
    if max_tokens is None:
        return [list(items)]
    order = longest_first(costs)
    alone = [[i] for i in order if costs[i] > max_tokens]
    fitting = order[len(alone) :]
    count = max(1, -(-sum(costs[i] for i in fitting) // max_tokens))
    while (packs := assign_greedily(fitting, costs, count, max_tokens)) is None:
        count += max(1, count // 50)
    return [[items[i] for i in sorted(pack)] for pack in (*alone, *filter(None, packs))]
