"""What lies between the LM head's product and the log-probs, and what is read off one row of logits.

logits = softcap·tanh(scale·z/softcap)/temperature      z = x·Wᵀ + b; without a softcap: scale·z/temperature
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """How the product of the LM head becomes logits: `softcap·tanh(scale·z/softcap)/temperature`.

    Attributes:
        scale: factor on the product, finite and not 0.
        softcap: bound that a tanh puts on the scaled product, positive; None for no bound.
        temperature: divisor of the logits, positive.

    Raises:
        ValueError: a value is out of range.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self):
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale must be finite and not 0, got {self.scale}")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap must be positive and finite, or None for no cap, got {self.softcap}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    @property
    def inner(self) -> float:
        """Factor of z inside the tanh; 1 without a softcap."""
        return 1.0 if self.softcap is None else self.scale / self.softcap

    @property
    def outer(self) -> float:
        """Factor of the tanh, or of z where there is no softcap."""
        return (self.scale if self.softcap is None else self.softcap) / self.temperature

    @property
    def slope(self) -> float:
        """∂logits/∂z at z = 0, which is everywhere without a softcap."""
        return self.scale / self.temperature

    def __call__(self, z: Tensor) -> Tensor:
        """Returns the logits of z, differentiable."""
        return z * self.outer if self.softcap is None else torch.tanh(z * self.inner) * self.outer


STATISTICS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


class RowLogps(NamedTuple):
    """What N rows of logits say about their targets. Only the log-probs carry a gradient.

    Attributes:
        logps: fp32 [N], log-prob of the target.
        sequence_logps: fp32 [S], sums of `logps` over completions; None unless `cu_scores` was given.
        entropy: fp32 [N], entropy of the row's distribution in nat; None unless asked for, as all that follows.
        mean_logit: fp32 [N], mean of the row's logits over the vocabulary.
        is_top1: bool [N], whether no logit is larger than the target's.
        log_sum_sq_probs: fp32 [N], log Σ_v p_v², the log of the chance that two draws agree (WPO, arXiv 2406.11827).
    """

    logps: Tensor
    sequence_logps: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


def empty_statistics(names: Collection[str], logps: Tensor) -> dict[str, Tensor]:
    """Returns memory for the statistics `names`, a tensor like `logps` [N] each; `is_top1` is 0 or 1 in it."""
    return {name: torch.empty_like(logps) for name in STATISTICS if name in names}


def check_statistics(names: Collection[str]) -> None:
    """Raises a ValueError when a name is not a statistic."""
    if isinstance(names, str) or not set(names) <= set(STATISTICS):
        raise ValueError(f"statistics must be a collection of names from {', '.join(STATISTICS)}, got {names!r}")
