"""FlashAttention-3 and -4 in the place of PyTorch's FlashAttention-2.

`torch.nn.attention.activate_flash_attention_impl("FA3")` puts other kernels behind the aten ops that `varlen` calls,
and behind scaled_dot_product_attention. This module says which, and what they refuse. Attention here asks for a
deterministic backward, windows and head sizes up to 256.

Read in `torch/nn/attention/_fa3.py` and `_fa4.py` of PyTorch 2.11 and 2.13, and in flash-attention of August 2026
(`hopper/flash_api.cpp`, `flash_attn/cute/interface.py`). Nothing of it has run on a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch.nn.attention import current_flash_attention_impl

VERSIONS = {"FA3": "FlashAttention-3", "FA4": "FlashAttention-4"}
_MODULES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute.interface"}  # that PyTorch takes them from


def active_flash_implementation(device: torch.device) -> str | None:
    """Return "FA3", "FA4" or another name that was activated, None for PyTorch's own FlashAttention-2."""
    return current_flash_attention_impl() if device.type == "cuda" else None


def installed_flash_implementations() -> list[str]:
    """Return which of FA3 and FA4 could be activated; a package around one is imported, the module itself is not."""
    return [name for name, module in _MODULES.items() if _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def flash_obstacle(
    implementation: str,
    capability: tuple[int, int] | None,  # of the GPU; None where there is none to ask
    head_dim: int,
    window: int | None,
) -> str | None:
    """Why an active implementation cannot compute forward and backward; None when it can, or is unknown here."""
    major = capability[0] if capability else None
    if implementation == "FA3":
        if major not in (9, None):
            return f"FlashAttention-3 needs compute capability 9.0, this GPU has {_dotted(capability)}"
        if head_dim > 192:  # which it computes as 256
            return f"FlashAttention-3 has no deterministic backward beyond head size 192, this is {head_dim}"
    if implementation == "FA4":
        if major not in (9, 10, None):
            return f"FlashAttention-4 needs compute capability 9.0 or 10.0, this GPU has {_dotted(capability)}"
        if head_dim > 128 and major == 10:
            return f"FlashAttention-4 takes head sizes up to 128 on this GPU, this is {head_dim}"
        if window is not None and _release() < (2, 13):
            return f"FlashAttention-4 has no windows in the backward of PyTorch {torch.__version__}, 2.13 has them"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _release() -> tuple[int, int]:
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)
