"""The losses by name: what a loss takes, what each looks at, and the checks and sums that follow from it.

`functions` fills the catalogue. A property of a loss is declared in one place, at its function; everything that asks
for it asks `uses` or `losses_using`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dpo_fast.errors import InputError

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


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

    def check(self, names: Sequence[str]) -> None:
        """Refuse parameters that no loss can have, or that do not fit the losses `names`.

        Raises:
            ValueError: the message begins with the parameter and its value.
        """
        for parameter, (allowed, low, closed, high) in _RANGES.items():
            value = getattr(self, parameter)
            number = isinstance(value, int | float | Tensor)
            if not number or not (low <= value if closed else low < value) or not value < high:
                raise InputError(f"{parameter}={value!r} must {allowed}")
        if self.f_divergence_type not in get_args(FDivergence):
            raise InputError(
                f"f_divergence_type={self.f_divergence_type!r} is not known; choose from {list(get_args(FDivergence))}"
            )
        if self.label_smoothing and not any(uses(name, "label_smoothing") for name in names):
            raise InputError(
                f"label_smoothing={self.label_smoothing!r} means nothing to loss_type={list(names)}; set it to 0, "
                f"or choose from {list(losses_using('label_smoothing'))}"
            )
        if "exo_pair" in names and not self.label_smoothing:
            raise InputError(
                "label_smoothing=0.0 is not possible with loss_type 'exo_pair'; 1e-3 is the paper's choice"
            )
        if "aot" in names and self.f_divergence_type != "reverse_kl":
            raise InputError(
                f"f_divergence_type={self.f_divergence_type!r} has no ratio to score in 'aot', which sorts the "
                "margins of policy and reference apart; take 'aot_unpaired', or 'reverse_kl'"
            )


# What a number must be; its lower bound, whether that is allowed, and what it must stay below.
_RANGES = {
    "beta": ("be a finite number above 0, from 1e-15 to 1e15; 0.1 is the usual choice", 1e-15, True, 1e15),  # fp32
    "label_smoothing": (
        "lie in [0, 0.5): it is the share of flipped labels; use 0 for labels that are right",
        0,
        True,
        0.5,
    ),
    "f_alpha_divergence_coef": ("be a finite number; try 0.5", -math.inf, False, math.inf),
    "discopop_tau": ("be a finite number above 0; 0.05 is the paper's", 0, False, math.inf),
    "simpo_gamma": ("be a finite number, 0 or more", 0, True, math.inf),
    "beta_dpo_alpha": ("be a finite number, 0 or more", 0, True, math.inf),
}


Loss = Callable[[Comparisons, LossParameters], Tensor]
LOSSES: dict[str, Loss] = {}
_BUILT_IN: set[str] = set()


@dataclass(frozen=True)
class LossUses:
    """What a loss looks at, beside the log-probs of policy and reference.

    Attributes:
        label_smoothing: whether ε means something to it.
        offsets: whether it heeds the margins that comparisons should have.
        lengths: whether it counts tokens.
        reference: whether it looks at reference log-probs.
        step: whether the loss of a comparison depends on all others of the step.
        sorting: whether it sorts winners and losers apart.
    """

    label_smoothing: bool = False
    offsets: bool = False
    lengths: bool = False
    reference: bool = True
    step: bool = False
    sorting: bool = False


_OF_ONES_OWN = LossUses(label_smoothing=True, offsets=True)  # of a function that does not say: it may use them


def loss(**looks_at: bool) -> Callable[[Loss], Loss]:
    """Return a decorator that enters a loss in `LOSSES` under its name; the arguments are those of `LossUses`."""

    def enter(function: Loss) -> Loss:
        function.uses = LossUses(**looks_at)
        LOSSES[function.__name__] = function
        if function.__module__ == f"{__package__}.functions":
            _BUILT_IN.add(function.__name__)
        return function

    return enter


def uses(name: str, what: str) -> bool:
    """Return whether a loss looks at `what`, an attribute of `LossUses`."""
    return getattr(getattr(LOSSES[name], "uses", _OF_ONES_OWN), what)


def losses_using(what: str) -> tuple[str, ...]:
    """Return the names of the losses that say they look at `what`, an attribute of `LossUses`."""
    return tuple(name for name, function in LOSSES.items() if getattr(getattr(function, "uses", None), what, False))


def looks_at_others(name: str, parameters: LossParameters) -> bool:
    """Return whether a comparison's gradient depends on those of other prompts, as four pairs on the CPU show.

    A function that fails on them does not show it.
    """
    function = LOSSES[name]
    try:
        one, *others = (_gradient_of_the_first(function, parameters, shift) for shift in (0.0, 9.0, -9.0))
    except Exception:  # whatever a function of somebody else's raises
        return False
    return not all(torch.allclose(one, other, rtol=1e-3, atol=0.0, equal_nan=True) for other in others)


@torch.enable_grad()
def _gradient_of_the_first(function: Loss, parameters: LossParameters, shift: float) -> Tensor:
    """Return ∂Σ loss/∂ℓ of the first of four pairs, winner and loser; `shift` moves the log-probs of the others."""
    others = shift * torch.tensor([0.0, 1.0, 2.0, 1.0])
    winners = (torch.tensor([-20.0, -31.0, -17.0, -26.0]) + others).requires_grad_()
    losers = (torch.tensor([-22.0, -30.0, -12.0, -27.0]) - others).requires_grad_()
    lengths = torch.tensor([9, 12, 7, 10])
    comparisons = Comparisons(
        winners,
        losers,
        torch.tensor([-21.0, -29.0, -18.0, -25.0]),
        torch.tensor([-23.0, -28.0, -15.0, -29.0]),
        lengths,
        lengths + 1,
        mean_winner_tokens=lengths.float().mean(),
        offsets=torch.zeros(4),
        winners=torch.arange(0, 8, 2),
        weights=torch.ones(4),
    )
    total = function(comparisons, parameters).sum()
    return torch.stack(torch.autograd.grad(total, (winners, losers), materialize_grads=True))[:, 0]


def named_loss(loss: str | Loss) -> str:
    """Return the name of a loss; a function of your own enters `LOSSES` under its own name.

    A second function of the same name replaces the first, as when a cell of a notebook runs again.

    Raises:
        ValueError: an unknown name, or a loss of dpo_fast has the function's name.
    """
    name = getattr(loss, "__name__", None) if callable(loss) else loss
    if callable(loss) and name is not None:
        if name in _BUILT_IN and LOSSES[name] is not loss:
            raise InputError(f"loss_type: {name} is the name of a loss of dpo_fast; rename the function.")
        LOSSES[name] = loss
    if not isinstance(name, str) or name not in LOSSES:
        raise InputError(f"loss_type={loss!r} is not known; choose from {sorted(LOSSES)}, or give a named function.")
    return name


def preference_loss(
    comparisons: Comparisons,
    types: Sequence[str],
    weights: Sequence[float],
    parameters: LossParameters,
) -> Tensor:
    """Return the weighted sum of the losses named in `types`, one value per comparison: [C]."""
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
    """Return the loss of B pairs for a loop of your own, with the arguments and results of the original DPO code.

    Args:
        policy_chosen_logps, policy_rejected_logps: ℓ in nats, summed over the completion's tokens.
        reference_chosen_logps, reference_rejected_logps: ℓ_ref, likewise.
        beta: strength of the pull to the reference.
        loss_type: a name of `LOSSES`, or a function like those.
        label_smoothing: probability that a label is flipped.
        chosen_lengths, rejected_lengths: completion tokens, for the losses that count tokens.
        offsets: margins that pairs should have, for the losses that use offsets.
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
    tuned_by = LossParameters(beta=beta, label_smoothing=label_smoothing, **parameters)
    tuned_by.check([name])
    if offsets is not None and not uses(name, "offsets"):
        raise InputError(
            f"offsets mean nothing to {name}; leave them out, or choose from {list(losses_using('offsets'))}"
        )
    for argument, tensor in {**tensors, "offsets": offsets}.items():
        if tensor is None and argument != "offsets" and uses(name, "lengths"):
            raise InputError(f"{argument} is missing: {name} counts tokens; give both lengths")
        if tensor is not None and tensor.shape != policy_chosen_logps.shape:
            raise InputError(
                f"{argument} must have the shape {tuple(policy_chosen_logps.shape)} of policy_chosen_logps, "
                f"got {tuple(tensor.shape)}"
            )
    mean_tokens = torch.ones(()) if chosen_lengths is None else chosen_lengths.float().mean()
    comparisons = Comparisons(*tensors.values(), mean_winner_tokens=mean_tokens, offsets=offsets)
    losses = LOSSES[name](comparisons, tuned_by)
    return losses, beta * comparisons.winner_ratios.detach(), beta * comparisons.loser_ratios.detach()
