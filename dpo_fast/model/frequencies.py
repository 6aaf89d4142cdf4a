"""Rotary frequencies that depend on the length of what a model is given: longrope and dynamic NTK.

A sequence's frequencies are those that it has alone. So beyond the length from which on they change, completions of
different lengths cannot share a prompt's keys, and the rows of a padded batch get their frequencies one by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.model.replacing import runs_instead


def _changing(module: nn.Module) -> dict[str, float]:
    """Return up to which length frequencies of a rotary embedding stay, by the prefix of its buffers' names."""
    kinds = getattr(module, "rope_type", None)
    limits = {}
    for layers, kind in (kinds if isinstance(kinds, Mapping) else {"": kinds}).items():
        prefix = f"{layers}_" if layers else ""
        if isinstance(kind, str) and "dynamic" in kind:
            limits[prefix] = module.original_max_seq_len
        elif kind == "longrope":
            parameters = module.config.rope_parameters
            limits[prefix] = (parameters[layers] if layers else parameters)["original_max_position_embeddings"]
    return limits


def frequency_limit(model: nn.Module) -> float:
    """Return the tokens of a sequence up to which no frequency depends on its length; infinite for most models."""
    return min((limit for module in model.modules() for limit in _changing(module).values()), default=math.inf)


@contextmanager
def own_frequencies(model: nn.Module) -> Iterator[None]:
    """Within it every row of a padded batch has the frequencies of its own length."""
    with ExitStack() as replaced:
        for module in filter(_changing, model.modules()):
            replaced.enter_context(runs_instead(module, functools.partial(_row_by_row, module.forward)))
        yield
    forget_lengths(model)


def _row_by_row(forward: Callable, module: nn.Module, x: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple:
    rows = []
    for positions in position_ids:
        forget_lengths(module)
        rows.append(forward(x[:1], positions[None], **kwargs))
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def forget_lengths(model: nn.Module) -> None:
    """Take rotary embeddings back to before their first call: they keep the frequencies of the longest sequence."""
    for module in model.modules():
        for prefix in _changing(module):
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").clone())
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
