"""Several processes run the steps of one: the same groups, in step with each other.

A batch is that of all ranks together, in the order of one process with the same seed, and each rank takes a part of it.
Ranks then have different packs, yet engines gather parameters and reduce gradients once a pack. So before a step every
rank gets as many packs as the one with most has, by empty ones (`equalize_pack_counts`), whose gradients are 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from datasets import Dataset
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from dpo_fast.batches.packing import PackedBatch
from dpo_fast.training.group_cost import assign_groups, mean_to_max


class _RankBatches(BatchSampler):
    """What one rank takes of every batch of the whole run: groups that cost as much as any other rank's."""

    def __init__(self, batches: BatchSampler, costs: Sequence[int], rank: int, ranks: int):
        self.batches, self.costs, self.rank, self.ranks = batches, costs, rank, ranks
        self.sampler, self.drop_last = batches.sampler, batches.drop_last

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            costs = [self.costs[index] for index in batch]
            yield [batch[index] for index in assign_groups(costs, self.ranks)[self.rank]]

    def __len__(self) -> int:
        return len(self.batches)


def number_rows(dataset: Dataset, batch_size: int) -> Dataset:
    """Numbers the rows of every batch, so that what ranks find out about them can be put into order."""
    return dataset.add_column("position", np.arange(len(dataset)) % batch_size)


def shard_batches(
    loader: DataLoader, costs_of: Callable[[Dataset], Sequence[int]], accelerator: Accelerator
) -> DataLoader:
    """Makes a prepared loader of whole batches, those of all ranks together, give each rank a part of every batch.

    accelerate's own shards repeat groups until the last batch is full; they are told to hand on what they get.

    Args:
        loader: as accelerate prepared it, of a dataset, or of `StreamBatches`, which are a rank's already.
        costs_of: the costs of every group of a dataset.
        accelerator: says which rank this is; with one process the loader stays as it is.
    """
    if accelerator.num_processes == 1:
        return loader
    loader.base_dataloader.collate_fn = functools.partial(_collate_on_rank, loader.collate_fn)
    if isinstance(loader.dataset, IterableDatasetShard):
        shard = loader.dataset
        shard.num_processes, shard.process_index, shard.batch_size = 1, 0, 1
    elif isinstance(shard := loader.batch_sampler, BatchSamplerShard):
        costs, rank, ranks = costs_of(loader.dataset), accelerator.process_index, accelerator.num_processes
        batches = _RankBatches(shard.batch_sampler, costs, rank, ranks)
        shard.batch_sampler, shard.sampler = batches, batches.sampler  # which gets the epoch, after a resume too
        shard.num_processes, shard.process_index, shard.batch_size = 1, 0, None
        shard.even_batches = False  # else it looks for a size after the last batch
    return loader


def _collate_on_rank(collate: Callable, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `collate` makes of `rows`, if there are any, with the totals also as numbers that stay on the host."""
    batch = collate(rows) if rows else {"packs": [], "totals": torch.zeros(2), "positions": []}
    return {**batch, "host_totals": batch["totals"].tolist()}


def equalize_pack_counts(
    batches: list[dict[str, Any]], most: int, empty: PackedBatch, ranks: dist.ProcessGroup | None, flag: bool = False
) -> tuple[Tensor, int, float, bool]:
    """Gives every rank as many batches, and as many packs in each, as the rank with most has; the others' are empty.

    Args:
        batches: of a loader that `shard_batches` was called with; filled up in place.
        most: how many batches a rank can have at most.
        empty: the pack to fill up with.
        ranks: a group that works on the host, so that nothing waits for the device; None for one process.
        flag: what ranks tell each other besides.

    Returns:
        The sum of all batches' `totals`, fp32 [2], how many groups they have, the balance of ranks (the mean number of
        tokens of a rank over the largest), and whether any rank has the flag.
    """
    if ranks is None:
        return sum(batch["totals"] for batch in batches), num_groups(batches), 1.0, flag
    totals = [sum(values) for values in zip([0.0, 0.0], *(batch["host_totals"] for batch in batches), strict=True)]
    counts = [len(batch["packs"]) for batch in batches] + [0] * (most - len(batches))
    tokens = sum(packed.num_tokens for batch in batches for packed in batch["packs"])
    own = torch.tensor([*totals, num_groups(batches), tokens, flag, *counts], dtype=torch.float64)
    everyone = [torch.empty_like(own) for _ in range(ranks.size())]
    dist.all_gather(everyone, own, group=ranks)
    everyone = torch.stack(everyone)
    for index, count in enumerate(everyone[:, 5:].amax(dim=0).int().tolist()):
        if count and index == len(batches):
            batches.append({"packs": []})
        if count:
            batches[index]["packs"] += [empty] * (count - len(batches[index]["packs"]))
    sums = everyone[:, :3].sum(dim=0)
    return sums[:2].float(), int(sums[2]), mean_to_max(everyone[:, 3].tolist()), bool(everyone[:, 4].any())


def num_groups(batches: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(packed.score_layout.cu_groups) - 1 for batch in batches for packed in batch["packs"])


def rows_of_all_ranks(rows: Tensor, accelerator: Accelerator) -> list[Tensor]:
    """The rows of every rank, which has as many as it has."""
    counts = accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    gathered = accelerator.gather(accelerator.pad_across_processes(rows, dim=0))
    return [part[:count] for part, count in zip(gathered.split(max(counts)), counts, strict=True)]


def rows_in_order(rows: Tensor, positions: Sequence[int] | None, accelerator: Accelerator) -> Tensor:
    """The rows of all ranks in the order of one process; rank by rank where a collator does not say their positions."""
    places = rows.new_tensor([0] * len(rows) if positions is None else positions)
    rows = torch.cat(rows_of_all_ranks(torch.cat([rows, places[:, None]], dim=1), accelerator))
    return rows[rows[:, -1].argsort(stable=True), :-1]
