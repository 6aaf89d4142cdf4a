"""Preference losses: one small function each, with the paper's equation beside it.

A loss takes C comparisons (winner w, loser l) and returns one value a comparison, [C]. It sees sequence log-probs
only, so its gradient lives on vectors of the size of the batch and the same function serves every way of computing
log-probs.

    ℓ   log π(y|x), summed over the completion's tokens        ℓ_ref   the same under the reference
    r = ℓ − ℓ_ref        Δ = r_w − r_l        n   completion tokens        ε   label_smoothing
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Comparisons:
    """What a loss may depend on, one entry a comparison.

    Attributes:
        winner_logps, loser_logps: ℓ, fp32 [C], in nats.
        winner_ref_logps, loser_ref_logps: ℓ_ref, fp32 [C].
        winner_lengths, loser_lengths: n, [C].
        mean_winner_tokens: scalar, scored winner tokens per comparison over the whole optimizer step; it makes token
            means independent of how the step is cut into micro-batches.
    """

    winner_logps: Tensor
    loser_logps: Tensor
    winner_ref_logps: Tensor
    loser_ref_logps: Tensor
    winner_lengths: Tensor
    loser_lengths: Tensor
    mean_winner_tokens: Tensor

    @property
    def winner_ratios(self) -> Tensor:
        return self.winner_logps - self.winner_ref_logps

    @property
    def loser_ratios(self) -> Tensor:
        return self.loser_logps - self.loser_ref_logps

    @property
    def delta(self) -> Tensor:
        return self.winner_ratios - self.loser_ratios


@dataclass(frozen=True)
class LossParameters:
    """β, the strength of the pull to the reference, and ε, the probability that a preference label is flipped."""

    beta: float = 0.1
    label_smoothing: float = 0.0


Loss = Callable[[Comparisons, LossParameters], Tensor]


def sigmoid(c: Comparisons, p: LossParameters) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): −log σ(βΔ); with ε > 0 conservative DPO: −(1−ε) log σ(βΔ) − ε log σ(−βΔ)."""
    logits = p.beta * c.delta
    return -(1 - p.label_smoothing) * F.logsigmoid(logits) - p.label_smoothing * F.logsigmoid(-logits)


def hinge(c: Comparisons, p: LossParameters) -> Tensor:
    """SLiC (arXiv 2305.10425) as RSO writes it (arXiv 2309.06657, eq. 11): max(0, 1 − βΔ)."""
    return torch.relu(1 - p.beta * c.delta)


def ipo(c: Comparisons, p: LossParameters) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17), averaged over tokens: (r_w/n_w − r_l/n_l − 1/(2β))²."""
    margin = c.winner_ratios / c.winner_lengths.clamp(min=1) - c.loser_ratios / c.loser_lengths.clamp(min=1)
    return (margin - 1 / (2 * p.beta)) ** 2


def sft(c: Comparisons, p: LossParameters) -> Tensor:
    """Negative log-likelihood of the winners; over a step, the mean over their tokens: −ℓ_w / mean(n_w)."""
    return -c.winner_logps / c.mean_winner_tokens


LOSSES: dict[str, Loss] = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo, "sft": sft}


def preference_loss(
    comparisons: Comparisons,
    types: Sequence[str],
    weights: Sequence[float],
    parameters: LossParameters,
) -> Tensor:
    """Weighted sum of the losses named in `types`, one value a comparison: [C]."""
    return sum(weight * LOSSES[name](comparisons, parameters) for name, weight in zip(types, weights, strict=True))


def batch_loss(
    logps: Tensor,  # ℓ, fp32 [S]
    ref_logps: Tensor,  # ℓ_ref, fp32 [S]
    lengths: Tensor,  # n, int64 [S]
    comparisons: Tensor,  # int64 [C, 2], (winner, loser)
    comparison_weights: Tensor,  # fp32 [C]
    totals: Tensor,  # fp32 [2], sums over the optimizer step of the weights, and of them times the winner's tokens
    *,
    types: Sequence[str],
    weights: Sequence[float],
    parameters: LossParameters,
) -> Tensor:
    """A batch's share of the optimizer step's loss, the weighted mean over its comparisons: a scalar."""
    winners, losers = comparisons.unbind(1)
    losses = preference_loss(
        Comparisons(
            winner_logps=logps[winners],
            loser_logps=logps[losers],
            winner_ref_logps=ref_logps[winners],
            loser_ref_logps=ref_logps[losers],
            winner_lengths=lengths[winners],
            loser_lengths=lengths[losers],
            mean_winner_tokens=totals[1] / totals[0],
        ),
        types,
        weights,
        parameters,
    )
    return (losses * comparison_weights).sum() / totals[0]
