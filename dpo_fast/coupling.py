"""Losses that couple the comparisons of a whole optimizer step, such as those that sort them (`aot`).

The gradient of a completion then depends on every other, in other micro-batches and on other ranks too. It is still one
number c_s = ∂loss/∂ℓ_s a completion. So a first pass without gradient finds all ℓ of the step, the loss of them gives
all c, and the usual pass differentiates Σ_s c_s·ℓ_s pack by pack. The result does not depend on how a step is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from dpo_fast.groups import PackedBatch


@dataclass(frozen=True)
class Coefficients:
    """What stands in for a coupled loss in one pack.

    Attributes:
        gradient: ∂loss/∂ℓ, fp32 [S].
        share: scalar, the pack's share of the loss.
    """

    gradient: Tensor
    share: Tensor


def surrogate(
    logps: Tensor,  # fp32 [S]
    gradient: Tensor,  # fp32 [S]
    share: Tensor,  # scalar
) -> Tensor:
    """The function of ℓ whose value is `share` and whose gradient is `gradient`."""
    product = (logps * gradient).sum()
    return share + product - product.detach()


def step_loss(
    packs: Sequence[PackedBatch],
    logps: Sequence[Tensor],  # ℓ of each pack, fp32 [S]
    ref_logps: Sequence[Tensor],  # ℓ_ref of each pack, fp32 [S]
    totals: Tensor,  # fp32 [2], of the whole step
    loss: Callable[..., Tensor],
    accelerator: Accelerator | None = None,
) -> Tensor:
    """A loss (`losses.batch_loss`) of all comparisons in `packs`, and of all ranks if an accelerator is given.

    Returns a scalar, differentiable in `logps`.
    """
    counts = torch.tensor([0, *(len(part) for part in logps)]).cumsum(0).tolist()
    completions = [torch.cat(list(logps)), torch.cat(list(ref_logps)), torch.cat([p.completion_lengths for p in packs])]
    comparisons = torch.cat([p.comparisons + start for p, start in zip(packs, counts, strict=False)])
    weights = torch.cat([p.comparison_weights for p in packs])
    offsets = torch.cat([p.offsets for p in packs])
    if accelerator is not None and accelerator.num_processes > 1:
        mine = accelerator.process_index
        # float64 holds every index and count exactly.
        rows = _of_all_ranks(torch.stack([x.detach().double() for x in completions], dim=1), accelerator)
        columns = (*comparisons.unbind(1), weights, offsets)
        pairs = _of_all_ranks(torch.stack([x.double() for x in columns], dim=1), accelerator)
        starts = torch.tensor([0, *map(len, rows)]).cumsum(0).tolist()
        completions = [
            torch.cat([own if rank == mine else part[:, column].to(own.dtype) for rank, part in enumerate(rows)])
            for column, own in enumerate(completions)
        ]
        comparisons = torch.cat([part[:, :2].long() + start for part, start in zip(pairs, starts, strict=False)])
        weights, offsets = (torch.cat([part[:, column] for part in pairs]).float() for column in (2, 3))
    return loss(*completions, comparisons, weights, offsets, totals)


def step_coefficients(
    packs: Sequence[PackedBatch],
    logps: Sequence[Tensor],
    ref_logps: Sequence[Tensor],
    totals: Tensor,
    loss: Callable[..., Tensor],
    accelerator: Accelerator | None = None,
) -> list[Coefficients]:
    """The gradient of `step_loss` for every pack; shares add up to the loss over the packs of all ranks."""
    leaves = [part.detach().requires_grad_() for part in logps]
    with torch.enable_grad():
        value = step_loss(packs, leaves, ref_logps, totals, loss, accelerator)
        gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    ranks = 1 if accelerator is None else accelerator.num_processes
    share = value.detach() / (len(packs) * ranks)
    return [Coefficients(gradient, share) for gradient in gradients]


def _of_all_ranks(
    rows: Tensor,  # [n, columns], n its own on every rank
    accelerator: Accelerator,
) -> list[Tensor]:
    counts = accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    gathered = accelerator.gather(accelerator.pad_across_processes(rows, dim=0))
    return [part[:count] for part, count in zip(gathered.split(max(counts)), counts, strict=True)]
