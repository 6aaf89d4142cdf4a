"""Where prompts and completions lie in a packed row, as attention needs to know it.

A packed row holds groups one after another, `[x y1 y2 … yK | x' y1' … ]`, x the prompt and y its completions. As
segments of a variable-length attention call the queries are `[x y1 | y2 | … | yK]` and the keys `[x y1 | x y2 | … | x
yK]`: with the causal mask aligned bottom-right every completion sees its own prompt and its own past, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dpo_fast_kernels.gather_rows import GatherPlan


@dataclass(frozen=True)
class PrefixLayout:
    """The segments of a packed row of T tokens and S completions.

    Attributes:
        groups: one tuple a group, (prompt length, length of completion 1, …, length of completion K); on the host.
        cu_seqlens_q, cu_seqlens_k: int32 [S + 1], where the query and key segments begin and end.
        max_seqlen_q, max_seqlen_k: the longest segment of each.
        keys: which token each gathered key comes from.
    """

    groups: tuple[tuple[int, ...], ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    keys: GatherPlan
    _masks: dict = field(default_factory=dict, repr=False, compare=False)

    def masks(self, *key) -> dict[tuple[int, int], Tensor]:
        """Attention masks by shape, kept with the batch: layers of one kind (dtype, device, window) share them."""
        return self._masks.setdefault(key, {})

    @classmethod
    def build(cls, groups: Sequence[tuple[int, ...]]) -> PrefixLayout:
        lengths_q, lengths_k, keys = [], [], []
        start = 0
        for prompt, *completions in groups:
            prompt_rows = np.arange(start, start + prompt)
            start += prompt
            for k, length in enumerate(completions):
                keys += [prompt_rows, np.arange(start, start + length)]
                lengths_q.append(length + prompt if k == 0 else length)
                lengths_k.append(length + prompt)
                start += length
        return cls(
            groups=tuple(tuple(group) for group in groups),
            cu_seqlens_q=_cumulative(lengths_q),
            cu_seqlens_k=_cumulative(lengths_k),
            max_seqlen_q=max(lengths_q),
            max_seqlen_k=max(lengths_k),
            keys=GatherPlan.build(np.concatenate(keys)),
        )

    def to(self, *args, **kwargs) -> PrefixLayout:
        return self._map(lambda value: value.to(*args, **kwargs))

    def pin_memory(self) -> PrefixLayout:
        return self._map(lambda value: value.pin_memory())

    def _map(self, move) -> PrefixLayout:
        return PrefixLayout(
            groups=self.groups,
            cu_seqlens_q=move(self.cu_seqlens_q),
            cu_seqlens_k=move(self.cu_seqlens_k),
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
            keys=move(self.keys),
        )


def _cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
