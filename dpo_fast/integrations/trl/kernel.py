"""TRL's chunked log-probs, served by `linear_logps`: for KTO, GRPO, RLOO, SFT and whatever of DPO runs TRL's own path.

TRL computes logits of every tile twice, in the forward and in the backward; here they are made once where memory
allows. Results and gradients are the same within rounding. Two things differ: logits are fp32, and a target that ties
with the largest logit counts as top-1 wherever it stands.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction as STOCK_KERNEL

from dpo_fast_kernels import LogitTransform, linear_logps

# What TRL calls the statistics of linear_logps, in the order that it returns them in.
_STATISTICS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}


class LinearLogProbs:
    """Stands in for TRL's `ChunkedLogProbFunction`."""

    @staticmethod
    def apply(
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # int64 [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Collection[str] = tuple(_STATISTICS),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Returns log-probs, entropies, log Σp², mean logits and is-top-1 [N]; None for what `outputs` leaves out.

        Log-probs and entropies are differentiable. TRL's own function runs where a head in another dtype than `hidden`
        would have to be copied, and where parameters are gathered around every use (ZeRO-3).
        """
        options = temperature, chunk_size, final_logit_softcapping, logit_scale
        mixed = weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type)
        if mixed or hasattr(weight, "ds_id") or logit_scale == 0:
            return STOCK_KERNEL.apply(hidden, weight, bias, targets, *options, tuple(outputs))
        rows = linear_logps(
            hidden,
            weight,
            targets,
            bias,
            transform=LogitTransform(logit_scale, final_logit_softcapping, temperature),
            statistics=[ours for theirs, ours in _STATISTICS.items() if theirs in outputs],
        )
        entropy = rows.entropy
        if entropy is not None and torch.is_grad_enabled():
            entropy = _Entropy.apply(entropy, hidden, weight, bias, targets, options)
        return rows.logps, entropy, rows.log_sum_sq_probs, rows.mean_logit, rows.is_top1


class _Entropy(torch.autograd.Function):
    """Gives entropies a gradient, by TRL's own function, where a loss asks for one: rarely."""

    @staticmethod
    def forward(ctx, entropy, hidden, weight, bias, targets, options):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.options = options
        ctx.autocast = torch.is_autocast_enabled(hidden.device.type), torch.get_autocast_dtype(hidden.device.type)
        return entropy.view_as(entropy)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, bias, targets = ctx.saved_tensors
        enabled, dtype = ctx.autocast
        needed = ctx.needs_input_grad[1:4]
        leaves = [
            tensor if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip((hidden, weight, bias), needed, strict=True)
        ]
        with torch.enable_grad(), torch.autocast(hidden.device.type, dtype, enabled=enabled):
            entropy = STOCK_KERNEL.apply(*leaves, targets, *ctx.options, ("entropy",))[1]
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        found = iter(torch.autograd.grad(entropy, wanted, gradient))
        return None, *(next(found) if need else None for need in needed), None, None
