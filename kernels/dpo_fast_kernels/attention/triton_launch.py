"""What the launchers of shared-prefix attention share: the arguments of a kernel, and the choice of its blocks.

Importing this module imports Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from dpo_fast_kernels._triton import Config, pick_config
from dpo_fast_kernels.attention.triton_configs import CANDIDATES, Table


def unit_columns(*tensors: Tensor) -> list[Tensor]:
    """Returns the tensors, copied where the elements of a head are no neighbours: so the kernels read them."""
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]


def score_scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """Returns what q·k is multiplied by before the softcap's tanh, and what after it: scores in units of log 2."""
    log2_e = math.log2(math.e)
    return (scale / softcap, softcap * log2_e) if softcap else (1.0, scale * log2_e)


def launch(
    kernel: triton.JITFunction,
    grid: Callable[[Config], tuple[int, int]],
    table: Table,
    pointers: Sequence[Tensor],  # q and k come first
    strided: Sequence[Tensor],  # those whose strides of tokens and of heads the kernel takes
    scales: Sequence[float],
    window: int | None,
    softcap: float | None,
) -> None:
    """Runs a kernel that takes pointers, T, strides, scales, window and constants, each in the order given here."""
    q, k, *_ = pointers
    head_dim = triton.next_power_of_2(q.shape[2])

    def run(config: Config) -> None:
        kernel[grid](
            *pointers,
            q.shape[0],
            *(stride for x in strided for stride in x.stride()[:2]),
            *scales,
            window or 0,
            GROUP=q.shape[1] // k.shape[1],
            HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None,
            D=q.shape[2],
            BLOCK_D=max(16, head_dim),
            **config,
        )

    key = max(64, head_dim), q.element_size()
    kind = (q.dtype, *key, window is not None, softcap is not None)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        run(pick_config(kernel.__name__, kind, table[key], CANDIDATES, q.device, run))
