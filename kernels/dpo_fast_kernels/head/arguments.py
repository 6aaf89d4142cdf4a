"""What every op of the LM head asks of its arguments, and which code does its row work.

Shapes, dtypes and devices are checked before an op is called, and by its fake kernel's caller when a step is compiled.
Values are checked by the op itself, on a CPU only: on a GPU that would wait for the device, and a target outside the
vocabulary or a NaN in hidden comes out as NaN.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dpo_fast_kernels.head import rows_torch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "triton", "fused")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Returns the dtype `torch.nn.functional.linear` would multiply in."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def pick_backend(backend: str, dtype: torch.dtype, device: torch.device) -> str:
    """Resolves `auto`, and refuses a named backend that cannot run: "torch", "triton" or "fused"."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "torch" if dtype == torch.float64 or device.type != "cuda" or _triton_is_missing() else "triton"
    if backend == "torch":
        return backend
    if dtype == torch.float64:
        raise ValueError(f"hidden must not be float64 with backend={backend!r}, whose kernels count in fp32")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend={backend!r} needs CUDA tensors, got device {device}; use backend='auto' or 'torch', "
            "or set TRITON_INTERPRET=1 before the first import of triton to debug on a CPU"
        )
    return backend


def row_operations(backend: str) -> ModuleType:
    """The module that works on rows of logits: `rows_torch` or, for "triton" and "fused", `rows_triton`."""
    if backend == "torch":
        return rows_torch
    from dpo_fast_kernels.head import rows_triton

    return rows_triton


@cache
def _triton_is_missing() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        logger.warning("Triton is not installed: the LM head runs in plain PyTorch on this GPU, with more passes.")
        return True
    return False


def check_head(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    budget_bytes: int,
) -> None:
    """Raises a ValueError that names the argument whose shape, dtype or device does not fit."""
    if budget_bytes < 0:
        raise ValueError(f"budget_bytes must be 0 or more, got {budget_bytes}")
    if hidden.ndim != 2:
        raise ValueError(f"hidden must have shape [N, H], got {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape [V, {hidden.shape[1]}] as hidden has, got {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must have shape [{hidden.shape[0]}] as hidden has, got {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}] as weight has, got {tuple(bias.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {tensor.device}")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    autocast = torch.is_autocast_enabled(hidden.device.type)
    if weight.dtype != hidden.dtype and (not autocast or torch.float64 in (weight.dtype, hidden.dtype)):
        raise ValueError(f"weight must have hidden's dtype {hidden.dtype} outside autocast, got {weight.dtype}")


def check_cu_scores(cu_scores: Tensor, device: torch.device) -> None:
    """Raises a ValueError when the shape, dtype or device of `cu_scores` does not fit."""
    if cu_scores.ndim != 1 or cu_scores.shape[0] == 0 or cu_scores.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_scores must be int32 or int64 of shape [S + 1], got {cu_scores.dtype} {tuple(cu_scores.shape)}"
        )
    if cu_scores.device != device:
        raise ValueError(f"cu_scores must be on the rows' device {device}, got {cu_scores.device}")


def check_values(hidden: Tensor, targets: Tensor, cu_scores: Tensor | None, vocabulary: int) -> None:
    """Raises a ValueError for values that make no sense, where looking at them costs no synchronisation: on a CPU."""
    if hidden.device.type != "cpu":
        return
    check_target_values(targets, vocabulary)
    if cu_scores is not None:
        check_cu_scores_values(cu_scores, hidden.shape[0])


def check_target_values(targets: Tensor, vocabulary: int) -> None:
    if targets.numel() and not 0 <= targets.min() <= targets.max() < vocabulary:
        raise ValueError(f"targets must lie in [0, {vocabulary}), got {int(targets.min())} to {int(targets.max())}")


def check_cu_scores_values(cu_scores: Tensor, rows: int) -> None:
    if int(cu_scores[0]) != 0 or int(cu_scores[-1]) != rows:
        raise ValueError(f"cu_scores must go from 0 to N = {rows}, got {int(cu_scores[0])} to {int(cu_scores[-1])}")
    lengths = cu_scores.diff()
    if lengths.numel() and int(lengths.min()) < 1:
        index = int(lengths.argmin())
        raise ValueError(
            f"cu_scores: completion {index} has {int(lengths[index])} score rows; leave completions without any out"
        )
