"""A loss as a function of sequence log-probs, which an op can call without being handed Python.

    value = loss(ℓ_1 … ℓ_S, inputs)        c_s = ∂value/∂ℓ_s, by automatic differentiation on vectors of length S

An op of `torch.library` takes tensors and numbers only. A `SequenceLoss` therefore has a number, its handle, under
which the op finds it again while it is alive; a compiled step passes the handle along like any other number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dpo_fast_kernels.autograd import recording
from dpo_fast_kernels.head.logits import check_statistics

_handles = count()
_alive: WeakValueDictionary[int, SequenceLoss] = WeakValueDictionary()


class SequenceLoss:
    """A differentiable function of the S sequence log-probs of a batch and of tensors that do not train.

    Args:
        function: `(logps fp32 [S], *sums of statistics fp32 [S], *inputs) → scalar`, in differentiable torch
            operations. A completion's gradient must depend on the completions of its own group only.
        statistics: names of statistics of `linear_logps` whose sums over completions the function takes, as weights
            that carry no gradient.
    """

    def __init__(self, function: Callable[..., Tensor], statistics: Sequence[str] = ()):
        check_statistics(statistics)
        self.function, self.statistics = function, tuple(statistics)
        self.handle = next(_handles)
        _alive[self.handle] = self

    @staticmethod
    def of(handle: int) -> SequenceLoss:
        """Returns the loss with that handle, which its maker must have kept."""
        return _alive[handle]

    def __call__(self, logps: Tensor, *sums_and_inputs: Tensor) -> Tensor:
        return self.function(logps, *sums_and_inputs)

    def value_and_gradient(self, logps: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the value, a scalar, and ∂value/∂logps, [S]; works below autograd too.

        Raises:
            ValueError: the function does not return a scalar.
        """
        with recording():
            logps = logps.detach().requires_grad_()
            value = self.function(logps, *inputs)
            if value.shape != ():
                raise ValueError(f"loss must return a scalar, such as a sum over comparisons, got {tuple(value.shape)}")
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, logps, materialize_grads=True)
            else:  # a loss that looks at nothing, for want of comparisons
                gradient = torch.zeros_like(logps)
        return value.detach().to(logps.dtype, copy=True), gradient
