"""Preference losses: one small function each, with the paper's equation beside it.

A loss takes C comparisons (winner w, loser l) and returns one value a comparison, [C]. It sees sequence log-probs
only, so its gradient lives on vectors of the size of the batch and the same function serves every way of computing
log-probs.

    ℓ   log π(y|x), summed over the completion's tokens        ℓ_ref   the same under the reference
    r = ℓ − ℓ_ref        s = f'(e^r), the score that the f-divergence makes of it; r itself for the reverse KL
    Δ = s_w − s_l        n   completion tokens        ε   label_smoothing        σ   the logistic function
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

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
        offsets: the margin that each comparison should have at least, fp32 [C]; None for none.
        winners: which completion wins, int64 [C]; None where every comparison has a winner of its own.
        whole_winner_logps: ℓ_w with all tokens alike, fp32 [C], where winner_logps weighs some less (LD-DPO).
        weights: how much each comparison counts in the mean over the step, fp32 [C]; None for all alike.
        mean_margin: running mean of βΔ over the steps before, a scalar; None before the first.
    """

    winner_logps: Tensor
    loser_logps: Tensor
    winner_ref_logps: Tensor
    loser_ref_logps: Tensor
    winner_lengths: Tensor
    loser_lengths: Tensor
    mean_winner_tokens: Tensor
    offsets: Tensor | None = None
    winners: Tensor | None = None
    whole_winner_logps: Tensor | None = None
    weights: Tensor | None = None
    mean_margin: Tensor | None = None

    @property
    def winner_log_likelihoods(self) -> Tensor:
        return self.winner_logps if self.whole_winner_logps is None else self.whole_winner_logps

    @property
    def winner_ratios(self) -> Tensor:
        return self.winner_logps - self.winner_ref_logps

    @property
    def loser_ratios(self) -> Tensor:
        return self.loser_logps - self.loser_ref_logps


FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@dataclass(frozen=True)
class LossParameters:
    """What losses may be tuned by.

    Attributes:
        beta: β, the strength of the pull to the reference.
        label_smoothing: ε, the probability that a preference label is flipped.
        f_divergence_type: which divergence from the reference is bounded.
        f_alpha_divergence_coef: α of the α-divergence; 1 is the reverse KL.
        discopop_tau: τ of `discopop`.
        simpo_gamma: γ of `simpo`, the margin that winners are to have.
        beta_dpo_alpha: α of `beta_dpo`, how far β follows the margins; 0 is `sigmoid`.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: FDivergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    beta_dpo_alpha: float = 0.6


Loss = Callable[[Comparisons, LossParameters], Tensor]


def score(ratio: Tensor, p: LossParameters) -> Tensor:
    """s = f'(e^r) of f-DPO (arXiv 2309.16240), shifted so that r = 0 scores 0.

    Reverse KL: r. Forward KL: 1 − e^{−r}. Jensen-Shannon: ln 2 + log σ(r). α: (e^{(α−1)r} − 1)/(α − 1).
    """
    if p.f_divergence_type == "forward_kl":
        return 1 - _bounded_exp(-ratio)
    if p.f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    power = p.f_alpha_divergence_coef - 1
    if p.f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
        return (_bounded_exp(power * ratio) - 1) / power
    return ratio


def _bounded_exp(x: Tensor) -> Tensor:
    """e^x, flat above 80, where fp32 would soon overflow."""
    return torch.exp(x.clamp(max=80))


def _delta(c: Comparisons, p: LossParameters) -> Tensor:
    return score(c.winner_ratios, p) - score(c.loser_ratios, p)


def _logits(c: Comparisons, p: LossParameters) -> Tensor:
    """βΔ, less the margin that the comparison should have (ODPO, arXiv 2402.10571, eq. 8)."""
    logits = p.beta * _delta(c, p)
    return logits if c.offsets is None else logits - c.offsets


def _mean_delta(c: Comparisons, p: LossParameters) -> Tensor:
    """s_w/n_w − s_l/n_l."""
    winners = score(c.winner_ratios, p) / c.winner_lengths.clamp(min=1)
    return winners - score(c.loser_ratios, p) / c.loser_lengths.clamp(min=1)


def _smoothed_logistic(logits: Tensor, p: LossParameters) -> Tensor:
    """−(1−ε) log σ(x) − ε log σ(−x), the cross entropy with a label that is flipped with probability ε."""
    return -(1 - p.label_smoothing) * F.logsigmoid(logits) - p.label_smoothing * F.logsigmoid(-logits)


def sigmoid(c: Comparisons, p: LossParameters) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): −log σ(βΔ); with ε > 0 conservative DPO: −(1−ε) log σ(βΔ) − ε log σ(−βΔ)."""
    return _smoothed_logistic(_logits(c, p), p)


def sigmoid_norm(c: Comparisons, p: LossParameters) -> Tensor:
    """Length-normalised DPO (Tülu 3, arXiv 2411.15124): −log σ(β(s_w/n_w − s_l/n_l)); ε as in `sigmoid`."""
    return _smoothed_logistic(p.beta * _mean_delta(c, p), p)


def hinge(c: Comparisons, p: LossParameters) -> Tensor:
    """SLiC (arXiv 2305.10425) as RSO writes it (arXiv 2309.06657, eq. 11): max(0, 1 − βΔ)."""
    return torch.relu(1 - _logits(c, p))


def ipo(c: Comparisons, p: LossParameters) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17), averaged over tokens: (s_w/n_w − s_l/n_l − 1/(2β))²."""
    return (_mean_delta(c, p) - 1 / (2 * p.beta)) ** 2


def exo_pair(c: Comparisons, p: LossParameters) -> Tensor:
    """EXO (arXiv 2402.00856, eq. 16): KL of (σ(βΔ), σ(−βΔ)) from (1−ε, ε); needs ε > 0."""
    logits = _logits(c, p)
    winner = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-p.label_smoothing))
    return winner + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(p.label_smoothing))


def robust(c: Comparisons, p: LossParameters) -> Tensor:
    """Robust DPO (arXiv 2403.00409): [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε), unbiased under flips."""
    logits = _logits(c, p)
    clean, flipped = -(1 - p.label_smoothing) * F.logsigmoid(logits), p.label_smoothing * F.logsigmoid(-logits)
    return (clean + flipped) / (1 - 2 * p.label_smoothing)


def nca_pair(c: Comparisons, p: LossParameters) -> Tensor:
    """NCA (arXiv 2402.05369) of pairs: −log σ(βs_w) − ½ log σ(−βs_w) − ½ log σ(−βs_l)."""
    winner, loser = p.beta * score(c.winner_ratios, p), p.beta * score(c.loser_ratios, p)
    return -F.logsigmoid(winner) - 0.5 * F.logsigmoid(-winner) - 0.5 * F.logsigmoid(-loser)


def bco_pair(c: Comparisons, p: LossParameters) -> Tensor:
    """BCO on pairs, without its shift δ (arXiv 2404.04656): −log σ(βs_w) − log σ(−βs_l)."""
    winner, loser = p.beta * score(c.winner_ratios, p), p.beta * score(c.loser_ratios, p)
    return -F.logsigmoid(winner) - F.logsigmoid(-loser)


def sppo_hard(c: Comparisons, p: LossParameters) -> Tensor:
    """SPPO with hard labels (arXiv 2405.00675, eq. 4.7 with P = 1 and 0): (s_w − 1/(2β))² + (s_l + 1/(2β))²."""
    target = 0.5 / p.beta
    return (score(c.winner_ratios, p) - target) ** 2 + (score(c.loser_ratios, p) + target) ** 2


def apo_zero(c: Comparisons, p: LossParameters) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7), for winners better than the model: 1 − σ(βs_w) + σ(βs_l)."""
    return 1 - torch.sigmoid(p.beta * score(c.winner_ratios, p)) + torch.sigmoid(p.beta * score(c.loser_ratios, p))


def apo_down(c: Comparisons, p: LossParameters) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8), for winners worse than the model: σ(βs_w) + 1 − σ(βΔ)."""
    return torch.sigmoid(p.beta * score(c.winner_ratios, p)) + 1 - torch.sigmoid(p.beta * _delta(c, p))


def discopop(c: Comparisons, p: LossParameters) -> Tensor:
    """DiscoPOP (arXiv 2406.08414, eq. 5): −log σ(x)(1 − m) + e^{−x} m, with x = βΔ and m = σ(x/τ)."""
    logits = _logits(c, p)
    share = torch.sigmoid(logits / p.discopop_tau)
    return -F.logsigmoid(logits) * (1 - share) + _bounded_exp(-logits) * share


def plackett_luce(c: Comparisons, p: LossParameters) -> Tensor:
    """DPO of a full ranking (arXiv 2305.18290, appendix A.3, eq. 20): −Σ_k log [e^{βs_k} / Σ_{j from k on} e^{βs_j}].

    A winner and all its losers are one factor, log(1 + Σ_l e^{−βΔ_l}), of which each of its comparisons gets an equal
    part. With one loser each it is `sigmoid`.
    """
    logits = _logits(c, p)
    if c.winners is None:
        return F.softplus(-logits)
    same = c.winners[:, None] == c.winners
    total = torch.where(same, -logits, -torch.inf).logsumexp(dim=1)
    return F.softplus(total) / same.sum(dim=1)


def aot(c: Comparisons, p: LossParameters) -> Tensor:
    """AOT (arXiv 2406.05882) of pairs: d = sort(ℓ_w − ℓ_l) − sort(ℓ_w^ref − ℓ_l^ref), −(1−ε) log σ(βd) − ε log σ(−βd).

    It asks that the policy's margins dominate the reference's as a distribution, and couples the whole step.
    """
    policy, reference = c.winner_logps - c.loser_logps, c.winner_ref_logps - c.loser_ref_logps
    return _smoothed_logistic(p.beta * (policy.sort().values - reference.sort().values), p)


def aot_unpaired(c: Comparisons, p: LossParameters) -> Tensor:
    """AOT (arXiv 2406.05882) of unpaired sides: d = sort(s_w) − sort(s_l), as in `aot`."""
    winners, losers = score(c.winner_ratios, p).sort().values, score(c.loser_ratios, p).sort().values
    return _smoothed_logistic(p.beta * (winners - losers), p)


def beta_dpo(c: Comparisons, p: LossParameters) -> Tensor:
    """β-DPO (arXiv 2407.08639), its batch-level β: `sigmoid` with β′ = [1 + α(M − M₀)]β in place of β.

    M is the step's mean of βΔ, without gradient, and M₀ that of the steps before. β′ is kept above β/100, as a step far
    below M₀ would turn the preference around. It couples the whole step.
    """
    delta = _delta(c, p)
    margins = p.beta * delta.detach()
    weights = torch.ones_like(margins) if c.weights is None else c.weights.to(margins.dtype)
    excess = (margins * weights).sum() / weights.sum() - (0.0 if c.mean_margin is None else c.mean_margin)
    logits = p.beta * (1 + p.beta_dpo_alpha * excess).clamp(min=0.01) * delta
    return _smoothed_logistic(logits, p)


def sft(c: Comparisons, p: LossParameters) -> Tensor:
    """Negative log-likelihood of the winners; over a step, the mean over their tokens: −ℓ_w / mean(n_w)."""
    return -c.winner_log_likelihoods / c.mean_winner_tokens


def nll(c: Comparisons, p: LossParameters) -> Tensor:
    """Mean negative log-likelihood of a winner's tokens, −ℓ_w/n_w: the term that RPO adds (arXiv 2404.19733, eq. 2)."""
    return -c.winner_log_likelihoods / c.winner_lengths.clamp(min=1)


def simpo(c: Comparisons, p: LossParameters) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6), without a reference: −log σ(β(ℓ_w/n_w − ℓ_l/n_l) − γ); ε as in `sigmoid`."""
    winners, losers = c.winner_logps / c.winner_lengths.clamp(min=1), c.loser_logps / c.loser_lengths.clamp(min=1)
    return _smoothed_logistic(p.beta * (winners - losers) - p.simpo_gamma, p)


def cpo(c: Comparisons, p: LossParameters) -> Tensor:
    """CPO (arXiv 2401.08417), without a reference: −log σ(β(ℓ_w − ℓ_l)) plus `nll`; ε as in `sigmoid`."""
    return _smoothed_logistic(p.beta * (c.winner_logps - c.loser_logps), p) + nll(c, p)


def orpo(c: Comparisons, p: LossParameters) -> Tensor:
    """ORPO (arXiv 2403.07691, eq. 6 and 7), without a reference: `nll` − β log σ(log odds_w − log odds_l).

    odds = P/(1 − P) with P = e^{ℓ/n}; β is the paper's λ.
    """

    def log_odds(logps: Tensor, lengths: Tensor) -> Tensor:
        mean = (logps / lengths.clamp(min=1)).clamp(max=-1e-6)  # P < 1
        return mean - torch.log(-torch.expm1(mean))

    odds_ratio = log_odds(c.winner_logps, c.winner_lengths) - log_odds(c.loser_logps, c.loser_lengths)
    return nll(c, p) - p.beta * F.logsigmoid(odds_ratio)


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "robust": robust,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "plackett_luce": plackett_luce,
    "beta_dpo": beta_dpo,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "sft": sft,
    "nll": nll,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
}
SORTED = ("aot", "aot_unpaired")  # the losses that sort winners and losers apart
COUPLED = ("beta_dpo", *SORTED)  # the losses of a comparison that depend on all others of the step
REFERENCE_FREE = ("nll", "simpo", "cpo", "orpo")  # the losses that look at no reference log-prob
WITH_OFFSETS = ("sigmoid", "hinge", "exo_pair", "robust", "discopop", "plackett_luce")  # those that heed `offsets`
WITH_LENGTHS = ("sigmoid_norm", "ipo", "sft", "nll", "simpo", "cpo", "orpo")  # those that count tokens
SMOOTHED = (
    "sigmoid",
    "beta_dpo",
    "sigmoid_norm",
    "exo_pair",
    "robust",
    "aot",
    "aot_unpaired",
    "simpo",
    "cpo",
)  # the losses that ε means something to


_BUILT_IN = frozenset(LOSSES)


def heeds(name: str, those: Collection[str]) -> bool:
    """Whether a loss is one of `those` (`SMOOTHED`, `WITH_OFFSETS`); a function of one's own is taken to be."""
    return name in those or name not in _BUILT_IN


def named_loss(loss: str | Loss) -> str:
    """Returns the name of a loss; a function of one's own enters `LOSSES` under its own name.

    Raises:
        ValueError: an unknown name, or another loss has the function's name already.
    """
    name = getattr(loss, "__name__", None) if callable(loss) else loss
    if callable(loss) and name is not None and LOSSES.setdefault(name, loss) is not loss:
        raise ValueError(f"loss_type: {name} is the name of another loss already; rename the function.")
    if name not in LOSSES:
        raise ValueError(f"loss_type={loss!r} is not known; choose from {sorted(LOSSES)}, or give a named function.")
    return name


def preference_loss(
    comparisons: Comparisons,
    types: Sequence[str],
    weights: Sequence[float],
    parameters: LossParameters,
) -> Tensor:
    """Weighted sum of the losses named in `types`, one value a comparison: [C]."""
    return sum(weight * LOSSES[name](comparisons, parameters) for name, weight in zip(types, weights, strict=True))


def dpo_loss(
    policy_chosen_logps: Tensor,  # [B]
    policy_rejected_logps: Tensor,  # [B]
    reference_chosen_logps: Tensor,  # [B]
    reference_rejected_logps: Tensor,  # [B]
    beta: float = 0.1,
    loss_type: str | Loss = "sigmoid",
    label_smoothing: float = 0.0,
    *,
    chosen_lengths: Tensor | None = None,  # [B]
    rejected_lengths: Tensor | None = None,  # [B]
    offsets: Tensor | None = None,  # [B]
    **parameters,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of B pairs for a loop of one's own, with the arguments and results of the original DPO code.

    Args:
        policy_chosen_logps, policy_rejected_logps: ℓ in nats, summed over the completion's tokens.
        reference_chosen_logps, reference_rejected_logps: ℓ_ref, likewise.
        beta: strength of the pull to the reference.
        loss_type: a name of `LOSSES`, or a function like those.
        label_smoothing: probability that a label is flipped.
        chosen_lengths, rejected_lengths: completion tokens, for the losses in `WITH_LENGTHS`.
        offsets: margins that pairs should have, for the losses in `WITH_OFFSETS`.
        parameters: other fields of `LossParameters`.

    Returns:
        Losses [B], differentiable, and the rewards β(ℓ − ℓ_ref) of chosen and rejected [B], without gradient.

    Raises:
        ValueError: an unknown loss, lengths that are missing, shapes that differ, or an argument that means nothing to
            the loss.
    """
    name = named_loss(loss_type)
    tensors = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    if label_smoothing and not heeds(name, SMOOTHED):
        raise ValueError(
            f"label_smoothing={label_smoothing} means nothing to {name}; set it to 0, or choose from {list(SMOOTHED)}"
        )
    if offsets is not None and not heeds(name, WITH_OFFSETS):
        raise ValueError(f"offsets mean nothing to {name}; leave them out, or choose from {list(WITH_OFFSETS)}")
    for argument, tensor in {**tensors, "offsets": offsets}.items():
        if tensor is None and argument != "offsets" and name in WITH_LENGTHS:
            raise ValueError(f"{argument} is missing: {name} counts tokens; give both lengths")
        if tensor is not None and tensor.shape != policy_chosen_logps.shape:
            raise ValueError(
                f"{argument} must have the shape {tuple(policy_chosen_logps.shape)} of policy_chosen_logps, "
                f"got {tuple(tensor.shape)}"
            )
    mean_tokens = torch.ones(()) if chosen_lengths is None else chosen_lengths.float().mean()
    comparisons = Comparisons(*tensors.values(), mean_winner_tokens=mean_tokens, offsets=offsets)
    losses = LOSSES[name](comparisons, LossParameters(beta=beta, label_smoothing=label_smoothing, **parameters))
    return losses, beta * comparisons.winner_ratios.detach(), beta * comparisons.loser_ratios.detach()
