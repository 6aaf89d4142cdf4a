"""Do the activations of the largest pack fit into memory? Where they do, no layer needs to run twice.

    needed = tokens · (bytes that a token keeps until the backward) + gradients + two moments of each + the head's tiles

What a token keeps depends on architecture, precision, adapter, attention and compilation in ways that no formula
follows, so it is measured: two small packs run forward, and what autograd saves of them is counted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from heapq import nlargest

import torch
from torch import Tensor, nn

from dpo_fast.batches.groups import Layout
from dpo_fast.batches.packing import PackedBatch
from dpo_fast.machine import free_memory
from dpo_fast_kernels import SequenceLoss

logger = logging.getLogger(__name__)

_SHARE = 0.8  # of the free memory; the rest is for gradients of activations, fragments and other processes
_HEAD_BYTES = 2 * 2**30  # of the head's tiles, at most


def saved_bytes(model: nn.Module, packed: PackedBatch) -> int:
    """Bytes that autograd keeps of a pack, of its forward and a loss, until the backward; parameters do not count."""
    kept = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(packed=packed, loss=SequenceLoss(torch.sum)).preference_loss
    assert loss.requires_grad  # holds on to what was counted
    return sum(kept.values())


def largest_pack(tokens: Iterable[int], groups: int, layout: Layout, max_tokens: int | None = None) -> int:
    """Tokens of the largest pack that a batch of `groups` groups can have.

    Args:
        tokens: of every group of the dataset.
        groups: of a batch.
        layout: in the padded one all rows are as long as the longest.
        max_tokens: bound of a pack, which a single group may exceed.
    """
    longest = nlargest(groups, tokens)
    batch = sum(longest) if layout == "shared" else longest[0] * groups
    return batch if max_tokens is None else min(batch, max(max_tokens, longest[0]))


def activations_fit(
    model: nn.Module, packs: tuple[PackedBatch, PackedBatch], tokens: int, autocast: AbstractContextManager
) -> bool:
    """Whether a training step of the largest pack fits into what is free on the device of `model`.

    Args:
        model: takes packed batches and is ready for training.
        packs: a small one and a larger one, which run forward.
        tokens: of the largest pack.
        autocast: of the training step.
    """
    device = next(model.parameters()).device
    with autocast, torch.random.fork_rng():
        small, large = (saved_bytes(model, packed.to(device)) for packed in packs)
    positions = [packed.input_ids.numel() for packed in packs]
    activations = tokens * (large - small) / (positions[1] - positions[0])
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed, free = activations + 3 * gradients + _HEAD_BYTES, free_memory(device)
    fit = needed <= _SHARE * free
    logger.info(
        "activations of %d tokens take %.1f GiB, the whole step %.1f, and %.1f are free: %s",
        *(tokens, activations / 2**30, needed / 2**30, free / 2**30),
        "they are kept" if fit else "they are computed again in the backward (gradient_checkpointing)",
    )
    return fit
