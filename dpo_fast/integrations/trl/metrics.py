"""Metrics of TRL's trainer that stay on the device until they are logged.

TRL keeps a list of floats for each metric, one a batch, and logs their means. Reading a float makes the host wait for
the device, a dozen times a batch. Here every batch adds tensors, and `resolve` makes the floats of all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

Mode = Literal["train", "eval"]


class PendingMetrics:
    """What batches have brought since the last `resolve`."""

    def __init__(self) -> None:
        self._names: dict[Mode, list[str]] = {"train": [], "eval": []}
        self._shares: dict[Mode, list[Tensor]] = {"train": [], "eval": []}  # [metrics, 2], numerators, denominators
        self._tokens: Tensor | None = None

    def add(self, mode: Mode, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Adds (numerator, denominator) of every metric of a batch; the ranks' add up."""
        self._names[mode] += metrics
        shares = [torch.stack(share).float() for share in metrics.values()]
        self._shares[mode].append(torch.stack(shares))

    def add_tokens(self, count: Tensor) -> None:
        self._tokens = count if self._tokens is None else self._tokens + count

    def resolve(self, mode: Mode, accelerator: Accelerator) -> list[tuple[str, float]]:
        """The values of every batch, in order; all ranks call it together."""
        if not self._names[mode]:
            return []
        shares = torch.cat(self._shares[mode])
        if accelerator.num_processes > 1:
            shares = accelerator.reduce(shares, "sum")
        numerators, denominators = shares.unbind(1)
        values = (numerators / denominators.clamp(min=torch.finfo(torch.float32).tiny)).tolist()
        resolved = list(zip(self._names[mode], values, strict=True))
        self._names[mode], self._shares[mode] = [], []
        return resolved

    def resolve_tokens(self, accelerator: Accelerator) -> int:
        """Tokens of all ranks; all of them call it together."""
        if self._tokens is None:
            return 0
        count = accelerator.reduce(self._tokens, "sum") if accelerator.num_processes > 1 else self._tokens
        self._tokens = None
        return int(count)
