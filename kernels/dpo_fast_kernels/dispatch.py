"""Automatic differentiation inside an op.

The body of a `torch.library` op runs below autograd, and below whatever mode looks at the op from outside: there no
operation is recorded. What has to be differentiated inside an op is run as if it stood outside.
"""

from __future__ import annotations

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
