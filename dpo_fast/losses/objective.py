"""What training minimises: the log-probs of a packed batch's completions → its comparisons → a mix of losses.

    Σ_c weight_c · Σ_k mix_k · loss_k(c) / Σ_c weight_c        over the comparisons c of the whole optimizer step

LD-DPO (arXiv 2409.06411) weighs what makes one completion longer than the other: in a comparison of y and y′, with
m = min(|y|, |y′|), ℓ = Σ_{t ≤ m} log p_t + α Σ_{t > m} log p_t, for policy and reference alike. So a completion is cut
into pieces where another that it is compared with ends, and the head sums its log-probs piece by piece.

P pieces, J of them at most in a completion, S completions, C comparisons; without LD-DPO a completion is one piece.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast.batches.completion_pieces import by_completion
from dpo_fast.batches.packing import PackedBatch
from dpo_fast.errors import InputError
from dpo_fast.losses.catalogue import (
    Comparisons,
    LossParameters,
    looks_at_others,
    named_loss,
    preference_loss,
    uses,
)


@dataclass(frozen=True)
class Objective:
    """A loss of sequence log-probs, as `dpo_fast_kernels.SequenceLoss` takes it.

    Attributes:
        mix: weight of every loss, by its name in `LOSSES` or by the function itself.
        parameters: what the losses are tuned by.
        use_weighting: whether a comparison also weighs by how likely the policy is to write its completions (WPO).
        ld_alpha: α of LD-DPO; the packed batches must be cut into pieces then.
        mean_margin: running mean of the margins βΔ of steps before, a scalar that may change in place; for β-DPO.
    """

    mix: Mapping[str, float]
    parameters: LossParameters = LossParameters()
    use_weighting: bool = False
    ld_alpha: float | None = None
    mean_margin: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse losses that are not known, and parameters that do not fit them.

        Raises:
            ValueError: the message begins with the argument.
        """
        if not self.mix:
            raise InputError("mix is empty; give the weight of one loss at least, {'sigmoid': 1.0}")
        object.__setattr__(self, "mix", {named_loss(loss): weight for loss, weight in self.mix.items()})
        self._check()

    def _check(self) -> None:
        self.parameters.check(list(self.mix))
        for name in self.mix:
            if not uses(name, "step") and looks_at_others(name, self.parameters):
                raise InputError(
                    f"loss_type: the loss {name} gives a comparison a gradient that depends on comparisons of other "
                    "prompts; say so with @dpo_fast.losses.loss(step=True), and DPOTrainer takes the step as a whole"
                )
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise InputError(f"ld_alpha={self.ld_alpha!r} must lie in [0, 1], or be None")

    @property
    def couples_groups(self) -> bool:
        """Whether a comparison's loss depends on all others, so that it takes the log-probs of all of them at once."""
        return any(uses(name, "step") for name in self.mix)

    @property
    def _looks_at_reference(self) -> bool:
        """Whether a loss needs reference log-probs; `sft` gets them for its metrics alone."""
        return any(uses(name, "reference") for name in self.mix if name != "sft")

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics of the head whose sums `__call__` takes after the log-probs."""
        return ("log_sum_sq_probs",) if self.use_weighting else ()

    def inputs(
        self,
        packed: PackedBatch,
        totals: Tensor,  # fp32 [2], sums over the step of the weights, and of them times the winner's tokens
    ) -> tuple[Tensor, ...]:
        """What the objective takes besides log-probs and statistics."""
        reference = packed.ref_logps
        if reference is None and self._looks_at_reference:
            raise InputError(
                f"packed has no reference log-probs, and {', '.join(self.mix)} looks at them; give groups with "
                "ref_logps (ref_token_logps with ld_alpha), as dpo_fast.Reference adds them"
            )
        if (packed.completion_pieces is None) != (self.ld_alpha is None):
            raise InputError(
                f"ld_alpha={self.ld_alpha!r} does not fit the pack: with ld_alpha, and only then, give "
                "pack(…, split_for_ld_dpo=True)"
            )
        if reference is None:
            of_completions = packed.completion_lengths if packed.completion_pieces is None else packed.completion_pieces
            reference = torch.zeros(of_completions.shape, device=of_completions.device)
        completion_pieces = () if packed.completion_pieces is None else (packed.completion_pieces, packed.full_pieces)
        of_comparisons = packed.comparisons, packed.comparison_weights, packed.offsets
        return totals, reference, packed.completion_lengths, *of_comparisons, *completion_pieces

    def compare(
        self,
        logps: Tensor,  # fp32 [P]
        totals: Tensor,  # fp32 [2]
        ref_logps: Tensor,  # fp32 [S], or [S, J] by piece
        lengths: Tensor,  # int64 [S]
        comparisons: Tensor,  # int64 [C, 2], (winner, loser)
        weights: Tensor,  # fp32 [C]
        offsets: Tensor,  # fp32 [C]
        completion_pieces: Tensor | None = None,  # int64 [S, J]
        full_pieces: Tensor | None = None,  # int64 [C, 2], leading pieces that count in full
    ) -> Comparisons:
        """Returns what the losses look at, differentiable in `logps`."""
        winners, losers = comparisons.unbind(1)
        if completion_pieces is None:
            policy, reference, whole = logps[comparisons], ref_logps[comparisons], None
        else:
            logps = by_completion(logps, completion_pieces)
            in_full = torch.arange(completion_pieces.shape[1], device=logps.device) < full_pieces[..., None]
            share = torch.where(in_full, 1.0, self.ld_alpha).to(logps.dtype)
            policy, reference = ((by_piece[comparisons] * share).sum(dim=2) for by_piece in (logps, ref_logps))
            whole = logps.sum(dim=1)[winners]
        return Comparisons(
            *policy.unbind(1),
            *reference.unbind(1),
            lengths[winners],
            lengths[losers],
            mean_winner_tokens=totals[1] / totals[0],
            offsets=offsets,
            winners=winners,
            whole_winner_logps=whole,
            weights=weights,
            mean_margin=self.mean_margin,
        )

    def mean(
        self,
        comparisons: Comparisons,
        totals: Tensor,  # fp32 [2]
    ) -> Tensor:
        """The comparisons' share of the step's loss, a scalar."""
        losses = preference_loss(comparisons, list(self.mix), list(self.mix.values()), self.parameters)
        return (losses * comparisons.weights).sum() / totals[0]

    def __call__(
        self,
        logps: Tensor,  # fp32 [P]
        *statistics_and_inputs: Tensor,
    ) -> Tensor:
        """A batch's share of the optimizer step's loss, a scalar; it adds up over the batches of a step."""
        count = len(self.statistics)
        statistics, inputs = statistics_and_inputs[:count], statistics_and_inputs[count:]
        compared, totals = self.compare(logps, *inputs), inputs[0]
        if self.use_weighting:
            weights = compared.weights * _policy_weights(logps, *statistics, *inputs)
            compared = dataclasses.replace(compared, weights=weights)
        return self.mean(compared, totals)


@torch.no_grad()
def _policy_weights(
    logps: Tensor,  # fp32 [P]
    log_sum_sq_probs: Tensor,  # Σ_t log Σ_v p_v², fp32 [P]
    totals: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,  # int64 [S]
    comparisons: Tensor,  # int64 [C, 2]
    weights: Tensor,
    offsets: Tensor,
    completion_pieces: Tensor | None = None,  # int64 [S, J]
    full_pieces: Tensor | None = None,
) -> Tensor:  # [C]
    """w_w·w_l, w = exp(mean_t[logp_t − log Σ_v p_v²]): what the policy would write counts more.

    WPO (arXiv 2406.11827, eq. 2). It takes the inputs of `Objective.compare`.
    """
    excess = logps - log_sum_sq_probs
    if completion_pieces is not None:
        excess = by_completion(excess, completion_pieces).sum(dim=1)
    return torch.exp(excess / lengths.clamp(min=1))[comparisons].prod(dim=1)
