"""The LM head and a preference loss as one module, with the arguments and results of Liger's fused DPO loss.

    ℓ_i = Σ_t logp_t over the n_i scored positions of sequence i, or their mean with average_log_prob
    loss = 1/B Σ_b L(ℓ_b, ℓ_{B+b}, references) + alpha·nll        nll = −Σ_b Σ_t logp_t / Σ_b n_b, of chosen sequences

For hidden states that are there already, padded and in two halves, chosen sequences before rejected ones. Positions
that target ignores are left out before the head: it multiplies N score rows where the padded input has 2B·T. The mean
logit, which Liger takes over ignored positions too, is linear in both factors and takes no logits:

    mean_{b,t,v} (x_bt·w_v + bias_v) = (mean_{b,t} x_bt)·(mean_v w_v) + mean_v bias_v

B pairs, T positions, H hidden, V vocabulary, N score rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpo_fast.errors import InputError
from dpo_fast.losses import (
    Comparisons,
    Loss,
    LossParameters,
    named_loss,
    preference_loss,
    uses,
)
from dpo_fast_kernels import ScoreLayout, SequenceLoss, linear_logps, linear_preference_loss

# Loss; log-probs of chosen and rejected [B], their mean logits, NLL of chosen, rewards of chosen and rejected [B].
FusedLinearOutput = tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]


class FusedLinearDPOLoss(nn.Module):
    """`LigerFusedLinearDPOLoss` of liger-kernel 0.8.5, computed by dpo_fast's ops.

    It differs in what it adds (cached references, more losses) and in this: `label_smoothing` means something to
    "sigmoid" too (conservative DPO), where Liger leaves it out without a word; log-probs are of unrounded logits in
    fp32, and float64 stays float64; bad input is an error.

    Args:
        ignore_index: what target holds where nothing is scored: prompts and padding.
        beta: strength of the pull to the reference.
        alpha: weight of the NLL of the chosen completions.
        compute_nll_loss: whether the loss has that term.
        compiled: how Liger computes; without effect.
        use_ref_model: whether there is a reference. Without one its log-probs are 0, unless they are given.
        average_log_prob: whether ℓ is a mean over scored positions, of the policy and the reference.
        chunk_size: how Liger computes; without effect.
        loss_type: a name of `LOSSES` that does not couple the pairs of a step, or a function like those.
        label_smoothing: ε, the probability that a label is flipped, for the losses that it means something to.
        discopop_tau: τ of "discopop".
        parameters: other fields of `LossParameters`.

    Raises:
        ValueError: a loss that is unknown or couples pairs, or parameters that do not fit it.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str | Loss = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        **parameters,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = named_loss(loss_type)
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        self.more_parameters = parameters
        self._check_options()
        self._sequence_loss = SequenceLoss(self._loss)

    def forward(
        self,
        lin_weight: Tensor,  # [V, H]
        _input: Tensor,  # [2B, T, H]
        target: Tensor,  # int64 [2B, T]
        bias: Tensor | None = None,  # [V]
        ref_input: Tensor | None = None,  # [2B, T, H of the reference]
        ref_weight: Tensor | None = None,  # [V, H of the reference]
        ref_bias: Tensor | None = None,  # [V]
        ref_chosen_logps: Tensor | None = None,  # [B]
        ref_rejected_logps: Tensor | None = None,  # [B]
    ) -> FusedLinearOutput:
        """Returns the loss, differentiable in _input, lin_weight and bias, and what else Liger's module returns.

        Products are taken in the inputs' dtype, or in autocast's where that is on; everything behind them in fp32
        (float64 for float64 inputs).

        Args:
            lin_weight: the LM head.
            _input: last hidden states, all chosen sequences before all rejected ones.
            target: the token that each position predicts (nothing is shifted), `ignore_index` where none is scored.
                On a GPU its counts are read once, which waits for the device; a target on the CPU saves that.
            bias: bias of the head.
            ref_input, ref_weight, ref_bias: the same of the reference model; they get no gradient.
            ref_chosen_logps, ref_rejected_logps: the reference's log-probs where they are known already, in place of
                its hidden states: sums over completions, or means with `average_log_prob`.

        Returns:
            `(loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, chosen_nll_loss,
            chosen_rewards, rejected_rewards))`. All but the loss are without gradient. The means are over the logits of
            all positions, ignored ones as well; the NLL is a mean over scored chosen positions, 0 where the loss does
            not have it; rewards are β(ℓ − ℓ_ref).

        Raises:
            ValueError: shapes, dtypes or devices do not fit; a completion has no scored position; the reference is
                missing, or given twice; on a CPU also targets outside the vocabulary, which on a GPU come out as a
                loss of NaN.
        """
        _check_target(target, _input)
        _check_head(target, _input.device, _input=_input, lin_weight=lin_weight, bias=bias)
        cached = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
        model = {"ref_input": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
        self._check_reference(cached, model)
        rows = _ScoreRows.of(target, self.ignore_index, _input.device)
        lengths = rows.layout.cu_scores.diff()
        if ref_chosen_logps is not None:
            ref_logps = _cached(_input, **cached)
        elif ref_input is not None:
            _check_head(target, _input.device, **model)
            ref_logps = self._of_model(rows, lengths, **model)
        else:
            ref_logps = torch.zeros(lengths.shape, device=lengths.device)
        loss, of_rows = linear_preference_loss(
            rows.select(_input), lin_weight, rows.targets, rows.layout, self._sequence_loss, [ref_logps, lengths], bias
        )
        with torch.no_grad():
            sums = of_rows.sequence_logps
            logps = self._per_sequence(sums, lengths)
            rewards = self.beta * (logps - ref_logps.to(logps.dtype))
            nll = _chosen_nll(sums, lengths) if self.compute_nll_loss else torch.zeros_like(loss)
            reports = (*_split(logps), *_mean_logits(_input, lin_weight, bias), nll, *_split(rewards))
        return loss, reports

    def _loss(
        self,
        sums: Tensor,  # [2B], pair after pair
        ref_logps: Tensor,  # [2B]
        lengths: Tensor,  # int64 [2B]
    ) -> Tensor:
        chosen_lengths, rejected_lengths = _split(lengths)
        comparisons = Comparisons(
            *_split(self._per_sequence(sums, lengths)),
            *_split(ref_logps.to(sums.dtype)),
            chosen_lengths,
            rejected_lengths,
            mean_winner_tokens=chosen_lengths.to(sums.dtype).mean(),
        )
        loss = preference_loss(comparisons, [self.loss_type], [1.0], self._loss_parameters).mean()
        return loss + self.alpha * _chosen_nll(sums, lengths) if self.compute_nll_loss else loss

    @property
    def _loss_parameters(self) -> LossParameters:
        return LossParameters(
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            discopop_tau=self.discopop_tau,
            **self.more_parameters,
        )

    def _per_sequence(self, sums: Tensor, lengths: Tensor) -> Tensor:
        return sums / lengths if self.average_log_prob else sums

    @torch.no_grad()
    def _of_model(
        self,
        rows: _ScoreRows,
        lengths: Tensor,  # int64 [2B]
        ref_input: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
    ) -> Tensor:  # [2B]
        cu_scores = rows.layout.cu_scores
        of_rows = linear_logps(rows.select(ref_input), ref_weight, rows.targets, ref_bias, cu_scores=cu_scores)
        return self._per_sequence(of_rows.sequence_logps, lengths)

    def _check_options(self) -> None:
        name = self.loss_type
        if uses(name, "step"):
            raise InputError(
                f"loss_type={name!r} couples all pairs of a step; take linear_logps and the loss of all its log-probs, "
                "or DPOTrainer"
            )
        self._loss_parameters.check([name])
        if self.average_log_prob and uses(name, "lengths"):
            raise InputError(
                f"average_log_prob=True would divide by lengths twice: loss_type={name!r} does it already; leave it out"
            )

    def _check_reference(self, cached: Mapping[str, Tensor | None], model: Mapping[str, Tensor | None]) -> None:
        """Raises a ValueError when the reference is missing, in part too, or given twice, or not wanted."""
        given = next((name for name, tensor in model.items() if tensor is not None), None)
        needed = ["ref_input", "ref_weight"] if self.use_ref_model else []
        if any(tensor is not None for tensor in cached.values()):
            if given:
                raise InputError(f"{given} is given beside cached reference log-probs; leave one of the two out")
            needed = list(cached)
        elif given and not self.use_ref_model:
            raise InputError(f"{given} is given, but use_ref_model=False; leave it out, or build with True")
        for name in needed:
            if {**cached, **model}[name] is None:
                raise InputError(
                    f"{name} is missing: give ref_input and ref_weight, or ref_chosen_logps and ref_rejected_logps, "
                    "or build with use_ref_model=False for no reference"
                )


@dataclass(frozen=True)
class _ScoreRows:
    """The N positions that are scored, pair after pair, chosen before rejected.

    Attributes:
        sequence, position: int64 [N], where they lie in a padded tensor.
        targets: int64 [N].
        layout: a group for each pair.
    """

    sequence: Tensor
    position: Tensor
    targets: Tensor
    layout: ScoreLayout

    @classmethod
    def of(cls, target: Tensor, ignore_index: int, device: torch.device) -> _ScoreRows:
        pairs = target.unflatten(0, (2, -1)).transpose(0, 1)  # [B, 2, T]
        scored = pairs != ignore_index
        lengths = scored.sum(-1).tolist()  # the only time that the host waits for the device
        for pair, (chosen, rejected) in enumerate(lengths):
            if not (chosen and rejected):
                sequence = pair + len(lengths) if chosen else pair
                raise InputError(
                    f"target has no scored position in sequence {sequence}, all are {ignore_index}; "
                    f"leave pair {pair} out"
                )
        layout = ScoreLayout.build(lengths)
        found = torch.nonzero_static(scored, size=layout.num_rows)
        targets = pairs[found.unbind(1)].to(device, non_blocking=True)
        pair, side, position = found.to(device, non_blocking=True).unbind(1)
        return cls(side * len(lengths) + pair, position, targets, layout.to(device, non_blocking=True))

    def select(self, padded: Tensor) -> Tensor:  # [2B, T, H] → [N, H]
        return padded[self.sequence, self.position]


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Deals values [2B], pair after pair, into those of the chosen and of the rejected completions, [B] each."""
    return values.view(-1, 2).t().contiguous().unbind()


def _chosen_nll(sums: Tensor, lengths: Tensor) -> Tensor:
    return -_split(sums)[0].sum() / _split(lengths)[0].sum()


def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the mean over all positions and words of the logits of chosen and of rejected sequences."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    means = hidden.unflatten(0, (2, -1)).mean((1, 2), dtype=dtype) * weight.mean(0, dtype=dtype)
    logits = means.sum(-1)
    return (logits if bias is None else logits + bias.mean(dtype=dtype)).unbind()


def _cached(_input: Tensor, **logps: Tensor) -> Tensor:
    """Returns log-probs of chosen and of rejected completions, [B] each, as [2B], pair after pair."""
    pairs = _input.shape[0] // 2
    for name, tensor in logps.items():
        if tensor.shape != (pairs,) or not tensor.is_floating_point() or tensor.device != _input.device:
            raise InputError(
                f"{name} must be floating-point [{pairs}] on {_input.device}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    dtype = torch.promote_types(_input.dtype, torch.float32)
    return torch.stack([tensor.detach().to(dtype) for tensor in logps.values()], dim=1).flatten()


def _check_target(target: Tensor, _input: Tensor) -> None:
    if target.ndim != 2 or target.dtype != torch.int64:
        raise InputError(f"target must be int64 [2B, T], got {target.dtype} {tuple(target.shape)}")
    if target.shape[0] == 0 or target.shape[0] % 2:
        raise InputError(f"target must have an even number of sequences, chosen then rejected, got {target.shape[0]}")
    if target.device not in (_input.device, torch.device("cpu")):
        raise InputError(f"target must be on _input's device {_input.device} or on the CPU, got {target.device}")


def _check_head(target: Tensor, device: torch.device, **head: Tensor | None) -> None:
    """Raises a ValueError that names what of hidden states, weight and bias, in this order, does not fit."""
    (its_hidden, hidden), (its_weight, weight), (its_bias, bias) = head.items()
    if hidden.ndim != 3 or hidden.shape[:2] != target.shape:
        wanted = ", ".join(map(str, target.shape))
        raise InputError(f"{its_hidden} must have shape [{wanted}, H] as target has, got {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[2]:
        wanted = hidden.shape[2]
        raise InputError(f"{its_weight} must have shape [V, {wanted}] as {its_hidden} has, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        wanted = weight.shape[0]
        raise InputError(f"{its_bias} must have shape [{wanted}] as {its_weight} has, got {tuple(bias.shape)}")
    for name, tensor in head.items():
        if tensor is not None and (tensor.device != device or not tensor.is_floating_point()):
            raise InputError(f"{name} must be floating-point on {device}, got {tensor.dtype} on {tensor.device}")
    autocast = torch.is_autocast_enabled(device.type)
    if weight.dtype != hidden.dtype and (not autocast or torch.float64 in (weight.dtype, hidden.dtype)):
        wanted = hidden.dtype
        raise InputError(f"{its_weight} must have {its_hidden}'s dtype {wanted} outside autocast, got {weight.dtype}")
