"""Which groups of a step go into which pack.

transformers' samplers decide which groups form a batch; here a batch is split into packs that fit the memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def split_by_tokens(items: Sequence[Item], costs: Sequence[int], max_tokens: int | None) -> list[list[Item]]:
    """Deals `items` into few packs of nearly equal cost, each within `max_tokens`.

    Longest first, each to the pack with the least so far: no pack ends up small, where products are slow and round
    differently. An item that exceeds `max_tokens` alone gets a pack of its own: nothing can make it smaller. Items keep
    their order inside a pack. `max_tokens=None` is one pack.
    """
    if max_tokens is None:
        return [list(items)]
    order = sorted(range(len(items)), key=lambda i: -costs[i])
    alone = [[i] for i in order if costs[i] > max_tokens]
    fitting = order[len(alone) :]
    count = -(-sum(costs[i] for i in fitting) // max_tokens)
    while (packs := _deal(fitting, costs, count, max_tokens)) is None:
        count += max(1, count // 50)
    return [[items[i] for i in sorted(pack)] for pack in (*alone, *packs)]


def _deal(order: Sequence[int], costs: Sequence[int], count: int, max_tokens: int) -> list[list[int]] | None:
    """Deals indices, longest first, to the least loaded of `count` packs; None when one would exceed `max_tokens`."""
    packs: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, pack) for pack in range(count)]
    for index in order:
        load, pack = heapq.heappop(loads)
        if load + costs[index] > max_tokens:
            return None
        packs[pack].append(index)
        heapq.heappush(loads, (load + costs[index], pack))
    return [pack for pack in packs if pack]
