"""Preference losses: one small function each, with the paper's equation beside it.

A loss takes C comparisons (winner w, loser l) and returns one value per comparison, [C]. It sees sequence log-probs
only, so its gradient lives on vectors of the size of the batch and the same function serves every way of computing
log-probs. `@loss` enters a function in the catalogue under its name and says what it looks at.

    ℓ   log π(y|x), summed over the completion's tokens        ℓ_ref   the same under the reference
    r = ℓ − ℓ_ref        s = f'(e^r), the score that the f-divergence makes of it; r itself for the reverse KL
    Δ = s_w − s_l        n   completion tokens        ε   label_smoothing        σ   the logistic function
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.losses.catalogue import Comparisons, LossParameters, loss

_LARGEST = 80.0  # exponent; fp32 ends at e^88.7, and a batch adds up many


def divergence_score(ratio: Tensor, p: LossParameters, largest: float | Tensor | None = None) -> Tensor:
    """s = f'(e^r) of f-DPO (arXiv 2309.16240), shifted so that r = 0 scores 0.

    Reverse KL: r. Forward KL: 1 − e^{−r}. Jensen-Shannon: ln 2 + log σ(r). α: (e^{(α−1)r} − 1)/(α − 1).

    Args:
        largest: log |s| from which s is flat, so that the loss stays finite in fp32; None for where βs does.
    """
    largest = _largest(p) if largest is None else largest
    if p.f_divergence_type == "forward_kl":
        return 1 - _bounded_exp(-ratio, largest)
    if p.f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    power = p.f_alpha_divergence_coef - 1
    if p.f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
        return (_bounded_exp(power * ratio, largest + math.log(min(abs(power), 1.0))) - 1) / power
    return ratio


def _largest(p: LossParameters) -> float | Tensor:
    """Return log |s| from which βs would soon overflow; a β below 1 gives no more room."""
    log_beta = p.beta.detach().log().clamp(min=0) if isinstance(p.beta, Tensor) else max(0.0, math.log(p.beta))
    return _LARGEST - log_beta


def _bounded_exp(x: Tensor, largest: float | Tensor = _LARGEST) -> Tensor:
    """e^x, flat above `largest`."""
    return torch.exp(x.clamp(max=largest))


def _delta(c: Comparisons, p: LossParameters, largest: float | Tensor | None = None) -> Tensor:
    return divergence_score(c.winner_ratios, p, largest) - divergence_score(c.loser_ratios, p, largest)


def _logits(c: Comparisons, p: LossParameters, largest: float | Tensor | None = None) -> Tensor:
    """βΔ, less the margin that the comparison should have (ODPO, arXiv 2402.10571, eq. 8)."""
    logits = p.beta * _delta(c, p, largest)
    return logits if c.offsets is None else logits - c.offsets


def _mean_delta(c: Comparisons, p: LossParameters, largest: float | Tensor | None = None) -> Tensor:
    """s_w/n_w − s_l/n_l."""
    winners = divergence_score(c.winner_ratios, p, largest) / c.winner_lengths.clamp(min=1)
    return winners - divergence_score(c.loser_ratios, p, largest) / c.loser_lengths.clamp(min=1)


def _smoothed_logistic(logits: Tensor, p: LossParameters) -> Tensor:
    """−(1−ε) log σ(x) − ε log σ(−x), the cross entropy with a label that is flipped with probability ε."""
    return -(1 - p.label_smoothing) * F.logsigmoid(logits) - p.label_smoothing * F.logsigmoid(-logits)


@loss(label_smoothing=True, offsets=True)
def sigmoid(c: Comparisons, p: LossParameters) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): −log σ(βΔ); with ε > 0 conservative DPO: −(1−ε) log σ(βΔ) − ε log σ(−βΔ)."""
    return _smoothed_logistic(_logits(c, p), p)


@loss(label_smoothing=True, lengths=True)
def sigmoid_norm(c: Comparisons, p: LossParameters) -> Tensor:
    """Length-normalised DPO (Tülu 3, arXiv 2411.15124): −log σ(β(s_w/n_w − s_l/n_l)); ε as in `sigmoid`."""
    return _smoothed_logistic(p.beta * _mean_delta(c, p), p)


@loss(offsets=True)
def hinge(c: Comparisons, p: LossParameters) -> Tensor:
    """SLiC (arXiv 2305.10425) as RSO writes it (arXiv 2309.06657, eq. 11): max(0, 1 − βΔ)."""
    return torch.relu(1 - _logits(c, p))


@loss(lengths=True)
def ipo(c: Comparisons, p: LossParameters) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17), averaged over tokens: (s_w/n_w − s_l/n_l − 1/(2β))²."""
    return (_mean_delta(c, p, _LARGEST / 2) - 1 / (2 * p.beta)) ** 2


@loss(label_smoothing=True, offsets=True)
def exo_pair(c: Comparisons, p: LossParameters) -> Tensor:
    """EXO (arXiv 2402.00856, eq. 16): KL of (σ(βΔ), σ(−βΔ)) from (1−ε, ε); needs ε > 0."""
    logits = _logits(c, p)
    winner = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-p.label_smoothing))
    return winner + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(p.label_smoothing))


@loss(label_smoothing=True, offsets=True)
def robust(c: Comparisons, p: LossParameters) -> Tensor:
    """Robust DPO (arXiv 2403.00409): [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε), unbiased under flips."""
    logits = _logits(c, p, _largest(p) + math.log(1 - 2 * p.label_smoothing))
    clean, flipped = -(1 - p.label_smoothing) * F.logsigmoid(logits), p.label_smoothing * F.logsigmoid(-logits)
    return (clean + flipped) / (1 - 2 * p.label_smoothing)


@loss()
def nca_pair(c: Comparisons, p: LossParameters) -> Tensor:
    """NCA (arXiv 2402.05369) of pairs: −log σ(βs_w) − ½ log σ(−βs_w) − ½ log σ(−βs_l)."""
    winner, loser = p.beta * divergence_score(c.winner_ratios, p), p.beta * divergence_score(c.loser_ratios, p)
    return -F.logsigmoid(winner) - 0.5 * F.logsigmoid(-winner) - 0.5 * F.logsigmoid(-loser)


@loss()
def bco_pair(c: Comparisons, p: LossParameters) -> Tensor:
    """BCO on pairs, without its shift δ (arXiv 2404.04656): −log σ(βs_w) − log σ(−βs_l)."""
    winner, loser = p.beta * divergence_score(c.winner_ratios, p), p.beta * divergence_score(c.loser_ratios, p)
    return -F.logsigmoid(winner) - F.logsigmoid(-loser)


@loss()
def sppo_hard(c: Comparisons, p: LossParameters) -> Tensor:
    """SPPO with hard labels (arXiv 2405.00675, eq. 4.7 with P = 1 and 0): (s_w − 1/(2β))² + (s_l + 1/(2β))²."""
    target = 0.5 / p.beta
    winner, loser = (divergence_score(ratios, p, _LARGEST / 2) for ratios in (c.winner_ratios, c.loser_ratios))
    return (winner - target) ** 2 + (loser + target) ** 2


@loss()
def apo_zero(c: Comparisons, p: LossParameters) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7), for winners better than the model: 1 − σ(βs_w) + σ(βs_l)."""
    return (
        1
        - torch.sigmoid(p.beta * divergence_score(c.winner_ratios, p))
        + torch.sigmoid(p.beta * divergence_score(c.loser_ratios, p))
    )


@loss()
def apo_down(c: Comparisons, p: LossParameters) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8), for winners worse than the model: σ(βs_w) + 1 − σ(βΔ)."""
    return torch.sigmoid(p.beta * divergence_score(c.winner_ratios, p)) + 1 - torch.sigmoid(p.beta * _delta(c, p))


@loss(offsets=True)
def discopop(c: Comparisons, p: LossParameters) -> Tensor:
    """DiscoPOP (arXiv 2406.08414, eq. 5): −log σ(x)(1 − m) + e^{−x} m, with x = βΔ and m = σ(x/τ)."""
    logits = _logits(c, p, _largest(p) + math.log(min(p.discopop_tau, 1.0)))
    share = torch.sigmoid(logits / p.discopop_tau)
    return -F.logsigmoid(logits) * (1 - share) + _bounded_exp(-logits) * share


@loss(offsets=True)
def plackett_luce(c: Comparisons, p: LossParameters) -> Tensor:
    """DPO of a full ranking (arXiv 2305.18290, appendix A.3, eq. 20): −Σ_k log [e^{βs_k} / Σ_{j from k on} e^{βs_j}].

    A winner and all its losers are one factor, log(1 + Σ_l e^{−βΔ_l}), of which each of its comparisons gets an equal
    part. With one loser each it is `sigmoid`. The mean over a step is per comparison, as of every loss, and not per
    factor or ranking: K completions in full order have K − 1 factors and K(K − 1)/2 comparisons.
    """
    logits = _logits(c, p)
    if c.winners is None:
        return F.softplus(-logits)
    same = c.winners[:, None] == c.winners
    total = torch.where(same, -logits, -torch.inf).logsumexp(dim=1)
    return F.softplus(total) / same.sum(dim=1)


@loss(label_smoothing=True, step=True)
def beta_dpo(c: Comparisons, p: LossParameters) -> Tensor:
    """β-DPO (arXiv 2407.08639), its batch-level β: `sigmoid` with β′ = [1 + α(M − M₀)]β in place of β.

    M is the step's mean of βΔ, without gradient, and M₀ that of the steps before. β′ is kept above β/100, as a step far
    below M₀ would turn the preference around. It couples the whole step.
    """
    delta = _delta(c, p, _largest(p) - (_LARGEST + math.log(max(p.beta_dpo_alpha, 1.0))) / 2)  # it is squared
    margins = p.beta * delta.detach()
    weights = torch.ones_like(margins) if c.weights is None else c.weights.to(margins.dtype)
    excess = (margins * weights).sum() / weights.sum() - (0.0 if c.mean_margin is None else c.mean_margin)
    logits = p.beta * (1 + p.beta_dpo_alpha * excess).clamp(min=0.01) * delta
    return _smoothed_logistic(logits, p)


@loss(label_smoothing=True, step=True, sorting=True)
def aot(c: Comparisons, p: LossParameters) -> Tensor:
    """AOT (arXiv 2406.05882) of pairs: d = sort(ℓ_w − ℓ_l) − sort(ℓ_w^ref − ℓ_l^ref), −(1−ε) log σ(βd) − ε log σ(−βd).

    It asks that the policy's margins dominate the reference's as a distribution, and couples the whole step.
    """
    policy, reference = c.winner_logps - c.loser_logps, c.winner_ref_logps - c.loser_ref_logps
    return _smoothed_logistic(p.beta * (policy.sort().values - reference.sort().values), p)


@loss(label_smoothing=True, step=True, sorting=True)
def aot_unpaired(c: Comparisons, p: LossParameters) -> Tensor:
    """AOT (arXiv 2406.05882) of unpaired sides: d = sort(s_w) − sort(s_l), as in `aot`."""
    winners, losers = (
        divergence_score(c.winner_ratios, p).sort().values,
        divergence_score(c.loser_ratios, p).sort().values,
    )
    return _smoothed_logistic(p.beta * (winners - losers), p)


@loss(lengths=True)
def sft(c: Comparisons, p: LossParameters) -> Tensor:
    """Negative log-likelihood of the winners; over a step, the mean over their tokens: −ℓ_w / mean(n_w)."""
    return -c.winner_log_likelihoods / c.mean_winner_tokens


@loss(lengths=True, reference=False)
def nll(c: Comparisons, p: LossParameters) -> Tensor:
    """Mean negative log-likelihood of a winner's tokens, −ℓ_w/n_w: the term that RPO adds (arXiv 2404.19733, eq. 2)."""
    return -c.winner_log_likelihoods / c.winner_lengths.clamp(min=1)


@loss(label_smoothing=True, lengths=True, reference=False)
def simpo(c: Comparisons, p: LossParameters) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6), without a reference: −log σ(β(ℓ_w/n_w − ℓ_l/n_l) − γ); ε as in `sigmoid`."""
    winners, losers = c.winner_logps / c.winner_lengths.clamp(min=1), c.loser_logps / c.loser_lengths.clamp(min=1)
    return _smoothed_logistic(p.beta * (winners - losers) - p.simpo_gamma, p)


@loss(label_smoothing=True, lengths=True, reference=False)
def cpo(c: Comparisons, p: LossParameters) -> Tensor:
    """CPO (arXiv 2401.08417), without a reference: −log σ(β(ℓ_w − ℓ_l)) plus `nll`; ε as in `sigmoid`."""
    return _smoothed_logistic(p.beta * (c.winner_logps - c.loser_logps), p) + nll(c, p)


@loss(lengths=True, reference=False)
def orpo(c: Comparisons, p: LossParameters) -> Tensor:
    """ORPO (arXiv 2403.07691, eq. 6 and 7), without a reference: `nll` − β log σ(log odds_w − log odds_l).

    odds = P/(1 − P) with P = e^{ℓ/n}; β is the paper's λ.
    """

    def log_odds(logps: Tensor, lengths: Tensor) -> Tensor:
        mean = (logps / lengths.clamp(min=1)).clamp(max=-1e-6)  # P < 1
        return mean - torch.log(-torch.expm1(mean))

    odds_ratio = log_odds(c.winner_logps, c.winner_lengths) - log_odds(c.loser_logps, c.loser_lengths)
    return nll(c, p) - p.beta * F.logsigmoid(odds_ratio)
