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

# Why a loss that couples groups is refused, and what is not.
COUPLED = (
    "the gradient of a completion depends on completions of other groups, whose log-probs are not known yet when it is "
    "needed; take linear_logps and the loss of its sequence_logps"
)

_handles = count()
_alive: WeakValueDictionary[int, SequenceLoss] = WeakValueDictionary()


class SequenceLoss:
    """A differentiable function of the S sequence log-probs of a batch and of tensors that do not train.

    Args:
        function: `(logps fp32 [S], *sums of statistics fp32 [S], *inputs) → scalar`, in differentiable torch
            operations. A completion's gradient must depend on the completions of its own group only. A function that
            says otherwise, by a true attribute `couples_groups`, is refused at once.
        statistics: names of statistics of `linear_logps` whose sums over completions the function takes, as weights
            that carry no gradient.

    Raises:
        ValueError: the function couples groups, or a statistic is not known.
    """

    def __init__(self, function: Callable[..., Tensor], statistics: Sequence[str] = ()):
        check_statistics(statistics)
        if getattr(function, "couples_groups", False):
            raise ValueError(f"loss: {function!r} couples groups; {COUPLED}")
        self.function, self.statistics = function, tuple(statistics)
        self._apart: Tensor | None = None  # whether gradients leave groups apart, once that is known
        self.handle = next(_handles)
        _alive[self.handle] = self

    def __reduce__(self):
        return SequenceLoss, (self.function, self.statistics)  # a copy has a handle of its own

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

    def leaves_groups_apart(
        self,
        logps: Tensor,  # [S]
        inputs: Sequence[Tensor],
        gradient: Tensor,  # [S], at `logps`
        cu_groups: Tensor,  # int64 [G + 1], on the host
    ) -> Tensor | None:
        """Returns whether no completion's gradient depends on other groups, a bool scalar; None while none can.

        The first batch of several groups shows it: half of them get other log-probs, and the gradients of the other
        half stay. The halves are those of the Thue-Morse sequence, which no period repeats. The others are ℓ times 0 to
        9 from a group's first completion to its last, then from its last to its first, which turns comparisons around.
        """
        groups = len(cu_groups) - 1
        if self._apart is None and groups > 1:
            sizes = cu_groups.diff()
            group = torch.repeat_interleave(torch.arange(groups), sizes)
            ramp = 9 * (torch.arange(len(group)) - cu_groups[group]) / (sizes[group] - 1).clamp(min=1)
            half = torch.tensor([number.bit_count() % 2 for number in range(groups)])[group].bool()
            stays = (~half).to(logps.device, non_blocking=True)
            apart = []
            for factor in (ramp, 9 - ramp):
                factor = factor.masked_fill(~half, 1.0).to(logps, non_blocking=True)
                _, found = self.value_and_gradient(logps * factor, inputs)
                apart.append((same_gradients(found, gradient) | ~stays).all())
            self._apart = torch.stack(apart).all()
        return None if self._apart is None else self._apart.to(logps.device, non_blocking=True)


def same_gradients(one: Tensor, other: Tensor) -> Tensor:
    """Returns where two gradients are the same but for rounding; an equal NaN is."""
    return torch.isclose(one, other, rtol=1e-3, atol=0.0, equal_nan=True)
