"""Where groups and completions lie among the score rows, and how whole groups are dealt into tiles.

The score rows of a batch stand completion after completion, group after group. An op that turns a group's log-probs
into its gradient at once needs all of the group's rows at hand, so tiles are cut between groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreLayout:
    """The N score rows of S completions in G groups.

    Attributes:
        cu_scores: int64 [S + 1], where the rows of each completion begin and end; on the rows' device.
        host_cu_scores: the same, on the host, which cuts tiles without asking the device.
        cu_groups: int64 [G + 1], where the completions of each group begin and end; on the host.
    """

    cu_scores: Tensor
    host_cu_scores: Tensor
    cu_groups: Tensor

    @classmethod
    def build(cls, groups: Sequence[Sequence[int]]) -> ScoreLayout:
        """Builds the layout from the number of score rows of every completion of every group.

        Raises:
            ValueError: a group has no completion, or a completion no rows.
        """
        for index, lengths in enumerate(groups):
            if not lengths or min(lengths) < 1:
                raise ValueError(
                    f"groups: group {index} has completions of {list(lengths)} score rows; "
                    "every group needs a completion and every completion a row"
                )
        host = torch.tensor([0, *accumulate(length for lengths in groups for length in lengths)])
        return cls(host, host, torch.tensor([0, *accumulate(map(len, groups))]))

    @property
    def num_rows(self) -> int:
        return int(self.host_cu_scores[-1])

    def to(self, *args, **kwargs) -> ScoreLayout:
        return ScoreLayout(self.cu_scores.to(*args, **kwargs), self.host_cu_scores, self.cu_groups)

    def pin_memory(self) -> ScoreLayout:
        return ScoreLayout(self.cu_scores.pin_memory(), self.host_cu_scores, self.cu_groups)


@dataclass(frozen=True)
class GroupTile:
    """Consecutive whole groups that are worked on together.

    Attributes:
        rows: their score rows.
        completions: their completions.
        split: whether this is a single group that is too large for a tile.
    """

    rows: slice
    completions: slice
    split: bool = False


def group_tiles(
    cu_scores: Tensor,  # int64 [S + 1], on the host
    cu_groups: Tensor,  # int64 [G + 1], on the host
    tile_rows: int,
    most_rows: int,
) -> Iterator[GroupTile]:
    """Yields tiles of whole groups, of at most `tile_rows` rows; a larger group has a tile of its own.

    A group of more than `most_rows` rows comes marked as split.
    """
    completions = cu_groups.tolist()
    rows = cu_scores[cu_groups].tolist()
    first = 0
    for group in range(len(rows) - 1):
        last = group + 1
        if last == len(rows) - 1 or rows[last + 1] - rows[first] > tile_rows:
            tile = slice(rows[first], rows[last])
            split = last - first == 1 and tile.stop - tile.start > most_rows
            yield GroupTile(tile, slice(completions[first], completions[last]), split)
            first = last
