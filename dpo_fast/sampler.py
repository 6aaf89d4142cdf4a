"""Which groups of a step go into which pack.

transformers' samplers decide which groups form a batch; here a batch is split into packs that fit the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def split_by_tokens(items: Sequence[Item], costs: Sequence[int], max_tokens: int | None) -> list[list[Item]]:
    """Deals `items` into as few packs as a first-fit-decreasing deal finds, each within `max_tokens`.

    An item that exceeds `max_tokens` alone gets a pack of its own: nothing can make it smaller. Items keep their
    order inside a pack. `max_tokens=None` is one pack.
    """
    if max_tokens is None:
        return [list(items)]
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(items)), key=lambda i: -costs[i]):
        fitting = (p for p, free in enumerate(room) if costs[index] <= free)
        place = next(fitting, None)
        if place is None:
            packs.append([index])
            room.append(max_tokens - costs[index])
        else:
            packs[place].append(index)
            room[place] -= costs[index]
    return [[items[i] for i in sorted(pack)] for pack in packs]
