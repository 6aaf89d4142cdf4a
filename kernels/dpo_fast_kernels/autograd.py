"""Automatic differentiation inside an op.

The body of a `torch.library` op runs below autograd, and below whatever mode looks at the op from outside: there no
operation is recorded. What has to be differentiated inside an op is run as if it stood outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# As a thread has them that is in no op and no mode. PyTorch has no public name for this.
_INCLUDED = torch._C._dispatch_tls_local_include_set()
_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()


@contextmanager
def recording() -> Iterator[None]:
    """Records operations for `torch.autograd.grad`, inside an op as outside."""
    with torch._C._ForceDispatchKeyGuard(_INCLUDED, _EXCLUDED), torch.enable_grad():
        yield


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
