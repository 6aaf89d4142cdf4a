"""NEFTune: noise on the embeddings of a training sequence, uniform in ±α/√(L·H) (arXiv 2310.05914).

L is the sequence's own length, whatever it is padded to, H the size of an embedding. A prompt that several completions
share would have one noise for all of them, and no one length, so the layout is the padded one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def noisy_embeddings(model: PreTrainedModel, alpha: float | None) -> Iterator[None]:
    """Within it packed batches of `model` have NEFTune's noise in training mode; None for none."""
    if alpha is None:
        yield
        return
    state = model.dpo_fast

    def add_noise(module: nn.Module, _: Any, embeddings: Tensor) -> Tensor:  # [S, L, H]
        if not module.training or state.row_lengths is None:
            return embeddings
        size = alpha / (state.row_lengths * embeddings.shape[-1]).sqrt()
        return embeddings + torch.empty_like(embeddings).uniform_(-1, 1) * size[:, None, None].to(embeddings.dtype)

    state.is_noisy = True
    handle = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        state.is_noisy = False
        handle.remove()
