"""Every op in plain PyTorch: what every other implementation is held to.

    logp_n = logits_n[t_n] − logΣ_v exp(logits_n[v])        ∂logp_n/∂logits_n = onehot(t_n) − softmax(logits_n)
    D_n = ∂logp_n/∂y_n = ∂logp_n/∂logits_n ⊙ (1 − tanh²)    y = slope·z, the logits if there were no softcap

Written for reading, at any size that fits in memory; logits are at least fp32, and float64 stays float64.
N rows, H hidden, V vocabulary; z = hidden·Wᵀ + bias before `LogitTransform`, logits after it.

    out_i = Σ_j softmax_j(softcap·tanh(scale·q_i·k_j / softcap)) v_j,   j visible to i: its prompt, its own past
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_fast_kernels.attention.layout import PrefixLayout
from dpo_fast_kernels.head.logits import LogitTransform, RowLogps


def row_logps_reference(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    transform: LogitTransform = LogitTransform(),  # noqa: B008 (frozen)
    statistics: bool = False,
) -> RowLogps:
    """Returns the target's log-prob in every row, and with `statistics` the rest of `RowLogps`."""
    logits = transform(z.to(_accumulator(z.dtype)))
    log_probs = logits.log_softmax(-1)
    logps = log_probs.gather(1, targets[:, None])[:, 0]
    if not statistics:
        return RowLogps(logps)
    logits, log_probs = logits.detach(), log_probs.detach()
    probs = log_probs.exp()
    return RowLogps(
        logps,
        entropy=-torch.where(probs > 0, probs * log_probs, 0).sum(-1),
        mean_logit=logits.mean(-1),
        is_top1=logits.gather(1, targets[:, None])[:, 0] >= logits.amax(-1),
        log_sum_sq_probs=(2 * log_probs).logsumexp(-1),
    )


def row_gradient_reference(
    z: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    transform: LogitTransform = LogitTransform(),  # noqa: B008 (frozen)
    coefficient: Tensor | None = None,  # [N], 1 when left out
) -> Tensor:  # [N, V]
    """Returns `coefficient_n · D_n`; a row whose coefficient is 0 is 0 whatever its logits."""
    z = z.to(_accumulator(z.dtype))
    logits = transform(z)
    gradient = -logits.softmax(-1)
    logps = logits.log_softmax(-1).gather(1, targets[:, None])
    gradient = gradient.scatter(1, targets[:, None], -torch.expm1(logps))
    if transform.softcap is not None:
        gradient = gradient * (1 - torch.tanh(z * transform.inner) ** 2)
    if coefficient is None:
        return gradient
    return torch.where(coefficient[:, None] == 0, 0, gradient * coefficient[:, None])


def linear_logps_reference(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None = None,  # [V]
    transform: LogitTransform = LogitTransform(),  # noqa: B008 (frozen)
    statistics: bool = False,
) -> RowLogps:
    """Returns `row_logps_reference` of the head's product; gradients by autograd."""
    dtype = _accumulator(hidden.dtype)
    z = hidden.to(dtype) @ weight.to(dtype).t()
    return row_logps_reference(z if bias is None else z + bias.to(dtype), targets, transform, statistics)


def prefix_attention_reference(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hkv, D]
    v: Tensor,  # [T, Hkv, Dv]
    layout: PrefixLayout,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # [T, Hq, Dv]
    """Returns attention over the whole packed row under the [T, T] mask that `layout` describes."""
    group, completion, position = _places(layout, q.device)
    prompt = completion < 0
    visible = (group[:, None] == group) & ((completion[:, None] == completion) | prompt)
    distance = position[:, None] - position
    visible &= (distance >= 0) & (distance < (window or position.numel() + 1))
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=_accumulator(q.dtype)).to(v.dtype)
    return torch.einsum("hij,jhd->ihd", weights, v)


def _places(layout: PrefixLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns group, completion (−1 in the prompt) and position of every token, int64 [T] each."""
    places = []
    for group, (prompt, *completions) in enumerate(layout.groups):
        places += [(group, -1, position) for position in range(prompt)]
        for index, length in enumerate(completions):
            places += [(group, index, prompt + position) for position in range(length)]
    return torch.tensor(places, device=device).unbind(1)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
