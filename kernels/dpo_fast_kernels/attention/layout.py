"""Where prompts and completions lie in a packed row, as attention needs to know it.

A packed row holds groups one after another, `[x y1 y2 … yK | x' y1' … ]`, x the prompt and y its completions. It is
described twice, for the two ways to compute the same attention.

As **segments** of a variable-length attention call: queries `[x y1 | y2 | … | yK]`, keys `[x y1 | x y2 | … | x yK]`.
With the causal mask aligned bottom-right every completion sees its own prompt and its own past, and nothing else.

As **spans** of every token, for a kernel that reads keys where they lie. Key j is visible to query i if and only if

    own_start_i ≤ j ≤ i    or    prompt_start_i ≤ j < prompt_end_i

The prompt and its first completion are one causal run: own_start is where the group starts, and there is no second
range (prompt_end = prompt_start = the group's start). A later completion is a run of its own: own_start is where it
starts, and the second range is the prompt. Query i stands at position i − own_start + prompt_end − prompt_start of its
sequence. Seen from the key, query i sees key j if and only if j ≤ i < last_query_j.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast_kernels.gather.gather_rows import GatherPlan


@dataclass(frozen=True)
class PrefixLayout:
    """The segments and spans of a packed row of T tokens and S completions.

    What only the host reads is a tensor too, and stays on the host: torch.compile would make a new graph for every new
    Python number.

    Attributes:
        segments: int64 [S, 4], always on the CPU: of each completion where its queries start, how many they are, where
            the prompt before its keys starts, and how long that is. The first completion of a group has its prompt
            among its own queries, and 0 before them.
        cu_seqlens_q, cu_seqlens_k: int32 [S + 1], where the query and key segments begin and end.
        spans: int32 [5, T], of every token prompt_start, prompt_end, own_start; run_end, where its run ends; and
            last_query, where the queries end that see it: its run's end, or its group's for a prompt.
        keys: which token each gathered key comes from.
        groups: one tuple a group, (prompt length, length of completion 1, …, length of completion K). The definition
            in `reference` reads it; ops do not, and inside them it is empty.
    """

    segments: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    spans: Tensor
    keys: GatherPlan
    groups: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def build(cls, groups: Sequence[Sequence[int]]) -> PrefixLayout:
        """Builds the layout on the host from (prompt length, completion lengths …) of every group.

        Raises:
            ValueError: no groups, a group without completions, a negative length, or 2³¹ tokens and more.
        """
        groups = tuple(tuple(map(int, group)) for group in groups)
        if not groups or any(len(group) < 2 or min(group) < 0 for group in groups):
            raise ValueError(
                f"groups must hold (prompt length, completion lengths …) each, at least one of each, got {groups}"
            )
        if sum(map(sum, groups)) >= 2**31:
            raise ValueError(f"groups hold {sum(map(sum, groups))} tokens: a row has less than 2**31, use more rows")
        segments, runs = [], []  # a run: tokens that share their numbers, and these
        end = 0
        for prompt, first, *rest in groups:
            start, end = end, end + prompt + first
            group_end = end + sum(rest)
            segments.append((start, prompt + first, start, 0))
            runs += [(prompt, start, start, start, end, group_end), (first, start, start, start, end, end)]
            for length in rest:
                segments.append((end, length, start, prompt))
                runs.append((length, start, start + prompt, end, end + length, end + length))
                end += length
        keys = [
            torch.arange(row, row + count)
            for own, queries, prefix, shared in segments
            for row, count in ((prefix, shared), (own, queries))
        ]
        segments, runs = torch.tensor(segments), torch.tensor(runs)
        return cls(
            segments=segments,
            cu_seqlens_q=_cumulative(segments[:, 1]),
            cu_seqlens_k=_cumulative(segments[:, 1] + segments[:, 3]),
            spans=runs[:, 1:].int().repeat_interleave(runs[:, 0], dim=0).T.contiguous(),
            keys=GatherPlan.build(torch.cat(keys)),
            groups=groups,
        )

    def to(self, *args, **kwargs) -> PrefixLayout:
        return self._map(lambda value: value.to(*args, **kwargs))

    def pin_memory(self) -> PrefixLayout:
        return self._map(lambda value: value.pin_memory())

    def _map(self, move) -> PrefixLayout:
        return PrefixLayout(
            segments=self.segments,
            cu_seqlens_q=move(self.cu_seqlens_q),
            cu_seqlens_k=move(self.cu_seqlens_k),
            spans=move(self.spans),
            keys=move(self.keys),
            groups=self.groups,
        )


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
