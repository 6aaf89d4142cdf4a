"""A device's results on their way to the host.

A copy that is queued after the next batch waits for that batch. So the copy of a result is queued right behind its own
batch. It goes into pinned memory, and an event says when it is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")

BATCHES_QUEUED = 2  # behind the one whose result the host waits for: work for the device while the store takes time


class Readback:
    """The copy of a tensor to the host, fp32, queued behind what computes it.

    Args:
        values: any shape; what is not on a CUDA device is there at once.
    """

    def __init__(self, values: Tensor):
        self._values, self._event = values.detach().float(), None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=torch.float32, pin_memory=True)
            self._values = pinned.copy_(self._values, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(torch.cuda.current_stream(values.device))

    @property
    def is_there(self) -> bool:
        return self._event is None or self._event.query()

    def numbers(self) -> np.ndarray:
        """Wait for the copy, and for nothing that was queued after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.cpu().numpy()


def in_order(items: Iterator[tuple[Item, Readback]]) -> Iterator[tuple[Item, np.ndarray]]:
    """Yield items with their numbers; those that are not there yet only once enough others are queued behind them."""
    waiting: deque[tuple[Item, Readback]] = deque()
    for queued in items:
        waiting.append(queued)
        while waiting and (len(waiting) > BATCHES_QUEUED or waiting[0][1].is_there):
            item, readback = waiting.popleft()
            yield item, readback.numbers()
    for item, readback in waiting:
        yield item, readback.numbers()
