"""The loss that TRL's trainer is configured to, as an `Objective`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from dpo_fast.losses import Comparisons, LossParameters, preference_loss
from dpo_fast.losses.objective import Objective

if TYPE_CHECKING:
    from trl import DPOTrainer

UNSMOOTHED = ("sigmoid", "sigmoid_norm")  # by TRL; dpo_fast's own trainer honours label_smoothing there


@dataclass(frozen=True)
class TRLObjective(Objective):
    """`Objective`, with label smoothing where TRL has it."""

    def _check(self) -> None:
        """Leave it to TRL, which takes parameters that mean nothing."""

    def mean(self, comparisons: Comparisons, totals: Tensor) -> Tensor:
        """The comparisons' share of the batch's loss, a scalar."""
        plain = replace(self.parameters, label_smoothing=0.0)
        losses = sum(
            preference_loss(comparisons, [name], [weight], plain if name in UNSMOOTHED else self.parameters)
            for name, weight in self.mix.items()
        )
        return (losses * comparisons.weights).sum() / totals[0]


def objective_of(trainer: DPOTrainer) -> TRLObjective:
    """Reads the trainer's attributes anew for every batch: callbacks may change them, beta above all."""
    mix = defaultdict(float)
    for name, weight in zip(trainer.loss_types, trainer.loss_weights, strict=True):
        mix[name] += weight
    parameters = LossParameters(
        beta=trainer.beta,
        label_smoothing=trainer.label_smoothing,
        f_divergence_type=trainer.f_divergence_type,
        f_alpha_divergence_coef=trainer.f_alpha_divergence_coef,
        discopop_tau=trainer.args.discopop_tau,
    )
    return TRLObjective(mix, parameters, trainer.use_weighting, trainer.ld_alpha)
