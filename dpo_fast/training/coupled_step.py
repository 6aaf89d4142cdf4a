"""Losses that couple the comparisons of a whole optimizer step, such as those that sort them (`aot`).

The gradient of a completion then depends on every other, in other micro-batches and on other ranks too. It is still one
number c_s = ∂loss/∂ℓ_s a completion. So a first pass without gradient finds all ℓ of the step, the loss of them gives
all c, and the usual pass differentiates Σ_s c_s·ℓ_s pack by pack. The result does not depend on how a step is cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from dpo_fast.batches.packing import PackedBatch
from dpo_fast.losses import Comparisons
from dpo_fast.losses.objective import Objective
from dpo_fast.training.rank_sharding import rows_of_all_ranks

_MOST_COMPLETIONS = 2**32  # of a rank in a step: tells the completions of ranks apart


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
