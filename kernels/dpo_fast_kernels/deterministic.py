"""PyTorch's deterministic mode, for the length of one call.

The fused attention kernels of PyTorch sum the gradient of q with atomics, in an order that changes from run to run,
unless this mode is on. It is a global of the process, off by default, and would also fill every new tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Switches the mode on, without filling memory, and restores both settings."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    # Not torch.use_deterministic_algorithms, which imports Inductor and sets an option of its own there.
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
