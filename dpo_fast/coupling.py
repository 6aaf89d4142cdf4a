"""What the packs of an optimizer step have to know of each other, across micro-batches and ranks.

Ranks have different packs, yet must run in step: engines gather parameters and reduce gradients once a pack. So before
a step every rank gets as many packs as the one with most has, by empty ones (`level`), whose gradients are 0.

Some losses couple the comparisons of a whole step, such as those that sort them (`aot`). The gradient of a completion
then depends on every other, in other micro-batches and on other ranks too. It is still one number c_s = ∂loss/∂ℓ_s a
completion. So a first pass without gradient finds all ℓ of the step, the loss of them gives all c, and the usual pass
differentiates Σ_s c_s·ℓ_s pack by pack. The result does not depend on how a step is cut.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from dpo_fast.groups import Layout, PackedBatch, PreferenceGroup, pack
from dpo_fast.losses import Comparisons
from dpo_fast.metrics import MetricAccumulator
from dpo_fast.objective import Objective

_MOST_COMPLETIONS = 2**32  # of a rank in a step: tells the completions of ranks apart


class _RankBatches(BatchSampler):
    """What one rank takes of every batch of the whole run: every n-th group, and nothing where the last has too few."""

    def __init__(self, batches: BatchSampler, rank: int, ranks: int):
        self.batches, self.rank, self.ranks = batches, rank, ranks
        self.sampler, self.drop_last = batches.sampler, batches.drop_last

    def __iter__(self) -> Iterator[list[int]]:
        return (batch[self.rank :: self.ranks] for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def share_among_ranks(loader: DataLoader, accelerator: Accelerator) -> None:
    """Makes a prepared loader of whole batches, those of all ranks together, give each rank a part of every batch.

    accelerate's own shards repeat groups until the last batch is full; a stream keeps them.
    """
    loader.base_dataloader.collate_fn = functools.partial(_collate_on_rank, loader.collate_fn)
    shard = loader.batch_sampler
    if isinstance(shard, BatchSamplerShard):  # then hands on what it gets, as transformers has it do
        shard.batch_sampler = _RankBatches(shard.batch_sampler, accelerator.process_index, accelerator.num_processes)
        shard.sampler = shard.batch_sampler.sampler  # which gets the epoch, after a resume too
        shard.num_processes, shard.process_index, shard.batch_size = 1, 0, None


def _collate_on_rank(collate: Callable, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `collate` makes of `rows`, if there are any, with the totals also as numbers that stay on the host."""
    batch = collate(rows) if rows else {"packs": [], "totals": torch.zeros(2)}
    return {**batch, "host_totals": batch["totals"].tolist()}


def empty_pack(layout: Layout, pad_token_id: int = 0, cut: bool = False) -> PackedBatch:
    """A pack that runs through the whole model and adds nothing: a token after a token, in no comparison."""
    group = PreferenceGroup([pad_token_id], [[pad_token_id]], (), (), ref_logps=[0.0], ref_token_logps=[[0.0]])
    return dataclasses.replace(pack([group], layout, pad_token_id, cut), num_tokens=0)


def level(batches: list[dict[str, Any]], most: int, empty: PackedBatch, ranks: dist.ProcessGroup) -> tuple[Tensor, int]:
    """Gives every rank as many batches, and as many packs in each, as the rank with most has; the others' are empty.

    Args:
        batches: of a loader that `share_among_ranks` was called with; filled up in place.
        most: how many batches a rank can have at most.
        empty: the pack to fill up with.
        ranks: a group that works on the host, so that nothing waits for the device.

    Returns:
        The sum of all batches' `totals`, fp32 [2], and how many groups they have.
    """
    totals = [sum(values) for values in zip([0.0, 0.0], *(batch["host_totals"] for batch in batches), strict=True)]
    counts = [len(batch["packs"]) for batch in batches] + [0] * (most - len(batches))
    own = torch.tensor([*totals, num_groups(batches), *counts], dtype=torch.float64)
    everyone = [torch.empty_like(own) for _ in range(ranks.size())]
    dist.all_gather(everyone, own, group=ranks)
    everyone = torch.stack(everyone)
    for index, count in enumerate(everyone[:, 3:].amax(dim=0).int().tolist()):
        if count and index == len(batches):
            batches.append({"packs": []})
        if count:
            batches[index]["packs"] += [empty] * (count - len(batches[index]["packs"]))
    sums = everyone[:, :3].sum(dim=0)
    return sums[:2].float(), int(sums[2])


def num_groups(batches: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(packed.score_layout.cu_groups) - 1 for batch in batches for packed in batch["packs"])


class RankMetrics(MetricAccumulator):
    """Metrics over all ranks: a batch's numerators and denominators add up over them before they are divided."""

    _NAMES = (
        *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins", "best_of_k", "kendall_tau")),
        *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
        *("entropy", "mean_token_accuracy", "aux_loss"),
    )

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._nothing = torch.zeros((), device=device)
        self._closed: list[Tensor] = []

    def end_batch(self) -> None:
        parts = [self._batch.get(name, (self._nothing, self._nothing)) for name in self._NAMES]
        self._closed.append(torch.stack([value.float() for part in parts for value in part]))
        self._batch = {}

    def reduce(self, gather=lambda values: values[None]) -> dict[str, float]:
        if not self._closed:
            return {}
        sums = gather(torch.stack(self._closed)).sum(dim=0).unflatten(1, (-1, 2))  # [batches, names, 2]
        self._closed = []
        known = sums[..., 1] > 0  # a batch may have nothing that a metric looks at
        means = torch.where(known, sums[..., 0] / sums[..., 1], 0.0).sum(dim=0) / known.sum(dim=0)
        values = torch.stack([means, known.any(dim=0)], dim=1).tolist()
        return {name: value for name, (value, has_any) in zip(self._NAMES, values, strict=True) if has_any}


@dataclass(frozen=True)
class Coefficients:
    """What stands in for a coupled loss in one pack.

    Attributes:
        gradient: ∂loss/∂ℓ, fp32 [P], of every piece.
        share: scalar, the pack's share of the loss.
    """

    gradient: Tensor
    share: Tensor


def surrogate(
    logps: Tensor,  # fp32 [P]
    gradient: Tensor,  # fp32 [P]
    share: Tensor,  # scalar
) -> Tensor:
    """The function of ℓ whose value is `share` and whose gradient is `gradient`."""
    product = (logps * gradient).sum()
    return share + product - product.detach()


def step_loss(
    packs: Sequence[PackedBatch],
    logps: Sequence[Tensor],  # of each pack's pieces, fp32 [P]
    totals: Tensor,  # fp32 [2], of the whole step
    objective: Objective,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """The loss of all comparisons in `packs`, and of all ranks if an accelerator is given.

    Returns a scalar, differentiable in `logps`.
    """
    compared, first = [], 0
    for packed, part in zip(packs, logps, strict=True):
        own = objective.compare(part, *objective.inputs(packed, totals))
        compared.append(dataclasses.replace(own, winners=own.winners + first))
        first += len(packed.completion_lengths)
    whole = _joined(compared)
    if accelerator is not None and accelerator.num_processes > 1:
        whole = _of_all_ranks(whole, accelerator)
    return objective.mean(whole, totals)


def _joined(parts: Sequence[Comparisons]) -> Comparisons:
    """One after the other; scalars are the same in all."""
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in _columns(parts[0])}
    return dataclasses.replace(parts[0], **columns)


def _columns(comparisons: Comparisons) -> list[str]:
    """The fields that have one entry a comparison."""
    values = ((field.name, getattr(comparisons, field.name)) for field in dataclasses.fields(comparisons))
    return [name for name, value in values if value is not None and value.ndim == 1]


def rows_of_all_ranks(rows: Tensor, accelerator: Accelerator) -> list[Tensor]:
    """The rows of every rank, which has as many as it has."""
    counts = accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    gathered = accelerator.gather(accelerator.pad_across_processes(rows, dim=0))
    return [part[:count] for part, count in zip(gathered.split(max(counts)), counts, strict=True)]


def _of_all_ranks(own: Comparisons, accelerator: Accelerator) -> Comparisons:
    """The comparisons of all ranks, in their order; this rank's stay differentiable."""
    columns = _columns(own)
    # float64 holds every index and count exactly.
    rows = torch.stack([getattr(own, name).detach().double() for name in columns], dim=1)
    parts = []
    for rank, part in enumerate(rows_of_all_ranks(rows, accelerator)):
        values = {name: part[:, i].to(getattr(own, name).dtype) for i, name in enumerate(columns)}
        part = own if rank == accelerator.process_index else dataclasses.replace(own, **values)
        parts.append(dataclasses.replace(part, winners=part.winners + rank * _MOST_COMPLETIONS))
    return _joined(parts)


def step_coefficients(
    packs: Sequence[PackedBatch],
    logps: Sequence[Tensor],
    totals: Tensor,
    objective: Objective,
    accelerator: Accelerator | None = None,
) -> list[Coefficients]:
    """The gradient of `step_loss` for every pack; shares add up to the loss over the packs of all ranks."""
    leaves = [part.detach().requires_grad_() for part in logps]
    with torch.enable_grad():
        value = step_loss(packs, leaves, totals, objective, accelerator)
        gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    ranks = 1 if accelerator is None else accelerator.num_processes
    share = value.detach() / (len(packs) * ranks)
    return [Coefficients(gradient, share) for gradient in gradients]
