"""Completions split into pieces where others that they are compared with end.

LD-DPO (arXiv 2409.06411) weighs the tokens of a completion that lie beyond the length of the one it is compared with.
With three completions of 5, 3 and 9 tokens, all compared, the pieces are [3, 2], [3] and [3, 2, 4]; in the comparison
of the last with the first, 2 of its pieces count in full.

P pieces, J of them at most in a completion, S completions, C comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """How the completions of a batch are split.

    Attributes:
        lengths: score rows of every piece, a list for each group.
        index: int64 [S, J], which pieces a completion consists of, filled up with P.
        full_pieces: int64 [C, 2], how many leading pieces of winner and loser lie within the shorter one's length.
    """

    lengths: list[list[int]]
    index: Tensor
    full_pieces: Tensor


def split_completions(
    lengths: Sequence[Sequence[int]],  # score rows of every completion of every group
    comparisons: Sequence[Sequence[tuple[int, int]]],  # of every group
) -> Pieces:
    """Split every completion at the lengths of all shorter ones that it is compared with."""
    ends = [_piece_ends(*group) for group in zip(lengths, comparisons, strict=True)]
    counts = np.array([len(of_completion) for group in ends for of_completion in group])
    first = np.cumsum(counts) - counts
    index = first[:, None] + np.arange(counts.max())
    index[np.arange(counts.max()) >= counts[:, None]] = counts.sum()
    full_pieces = [
        [group_ends[side].index(min(group_lengths[winner], group_lengths[loser])) + 1 for side in (winner, loser)]
        for group_ends, group_lengths, pairs in zip(ends, lengths, comparisons, strict=True)
        for winner, loser in pairs
    ]
    return Pieces(
        lengths=[[int(n) for of_completion in group for n in np.diff([0, *of_completion])] for group in ends],
        index=torch.from_numpy(index),
        full_pieces=torch.tensor(full_pieces, dtype=torch.int64).reshape(-1, 2),
    )


def _piece_ends(lengths: Sequence[int], comparisons: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Where the pieces of each completion of a group end, in score rows from its beginning."""
    ends = [{length} for length in lengths]
    for winner, loser in comparisons:
        shorter = min(lengths[winner], lengths[loser])
        ends[winner].add(shorter)
        ends[loser].add(shorter)
    return [sorted(of_completion) for of_completion in ends]


def by_completion(
    sums: Tensor,  # [P]
    index: Tensor,  # int64 [S, J]
) -> Tensor:  # [S, J]
    """Sorts values of pieces by completion; 0 where a completion has fewer pieces than another."""
    return torch.cat([sums, sums.new_zeros(1)])[index]
