"""Batches of a stream of preference groups, with reference log-probs, assigned to ranks by cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from datasets import IterableDataset

from dpo_fast.data.prepare import ROWS_AHEAD, USABLE
from dpo_fast.data.values import reading_rows
from dpo_fast.errors import InputError
from dpo_fast.training.group_cost import assign_groups

if TYPE_CHECKING:
    from dpo_fast.reference.reference import Reference

Row = dict[str, Any]


class StreamBatches(torch.utils.data.IterableDataset):
    """What one rank takes of every batch of a stream: rows that cost as much as any other rank's.

    Every rank reads and assigns all rows, so all ranks agree; the reference runs on the rows of its own rank.

    Args:
        groups: stream of preference groups, as `prepare` returns it.
        batch_size: of all ranks together.
        cost: of a group, from the tokens of its prompt and of its completions.
        accelerator: says which rank this is.
        reference: runs on about 64 rows at a time; None where they have reference log-probs, or need none.
    """

    def __init__(
        self,
        groups: IterableDataset,
        batch_size: int,
        cost: Callable[[int, list[int]], int],
        accelerator: Accelerator,
        reference: Reference | None = None,
    ):
        self.groups, self.batch_size, self.cost, self.reference = groups, batch_size, cost, reference
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes

    def set_epoch(self, epoch: int) -> None:
        self.groups.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Row]]:
        """Yields batches of rows, each with its `position` in the batch of all ranks.

        Raises:
            InputError: there is none, or a row cannot be read; on all ranks, as all read all rows.
        """
        if self.reference is not None:
            self.reference.share_rows()  # another epoch may assign them otherwise
        rows = iter(self.groups)
        batches_ahead = max(1, ROWS_AHEAD * self.ranks // self.batch_size)
        found = False
        while batches := self._read(rows, batches_ahead):
            found = True
            parts = [self._part(batch) for batch in batches]
            own = [row for part in parts for row in part]
            own = iter(own if self.reference is None else self.reference.with_logps_of_rows(own))
            for part in parts:
                yield list(islice(own, len(part)))
        worker = torch.utils.data.get_worker_info()
        if not found and (worker is None or worker.num_workers == 1):  # other workers may have other rows
            raise InputError(f"dataset: the stream ended without a usable row; {USABLE}")

    def _read(self, rows: Iterator[Row], batches: int) -> list[list[Row]]:
        with reading_rows("stream"):
            return [batch for _ in range(batches) if (batch := list(islice(rows, self.batch_size)))]

    def _part(self, batch: list[Row]) -> list[Row]:
        costs = [self.cost(len(row["prompt_ids"]), [len(ids) for ids in row["completion_ids"]]) for row in batch]
        return [{**batch[i], "position": i} for i in assign_groups(costs, self.ranks)[self.rank]]
