"""The end of a training whose losses or weights are no longer finite.

A step only keeps its losses and its gradient norm, on the device. They are read where metrics are read anyway: to log,
to evaluate, to save and at the end. One infinite loss, or a gradient that mixed precision's scaler skipped, does no
harm: the run goes on while its weights are finite. Weights are looked at once something was not finite, and before all
that is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from dpo_fast.errors import InputError, TrainingDiverged

# After so many steps in a row without a finite one, a run learns nothing. Mixed precision's scaler needs 16 steps to
# come down from its first scale to 1.
_MOST_IN_A_ROW = {"loss": 3, "gradient norm": 32}
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@dataclass
class _Watch:
    """What is known of a run.

    Attributes:
        losses: those of the present step, scalars.
        steps: number, losses and gradient norm of every step that has not been looked at.
        in_a_row: last steps without a finite value, by what it is.
        first: what was not finite first since the weights were last looked at, and in which step.
        done: steps that were looked at.
        sound: last step after which the weights were seen to be finite.
    """

    losses: list[Tensor] = field(default_factory=list)
    steps: list[tuple[int, list[Tensor], Tensor | float | None]] = field(default_factory=list)
    in_a_row: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_MOST_IN_A_ROW, 0))
    first: tuple[str, int] | None = None
    done: int = 0
    sound: int | None = None


class FiniteTrainer(Trainer):
    """Ends with `TrainingDiverged`, on all ranks together, and never saves weights that are not finite."""

    _watch: _Watch | None = None  # while it trains
    _last_checkpoint: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.is_fsdp_enabled:  # only its first rank may have loaded the weights yet
            refuse_unless_finite(self.model, self.accelerator)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            output = super().train(*args, **kwargs)
            self.end_if_diverged(weights=True, final=True)
            return output
        except RuntimeError as error:
            if "without overflow" not in str(error):  # what PyTorch's optimizers say of a step that fp32 cannot hold
                raise
            raise self._diverged("weights", self.state.global_step + 1) from error
        finally:
            self._watch = None

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._last_checkpoint = kwargs.get("resume_from_checkpoint") or None
        self._watch = _Watch()
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        watch = self._watch or _Watch()  # somebody's own loop, which looks for itself
        loss = super().training_step(*args, **kwargs)
        watch.losses.append(loss)
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Tensor | float | None, *args: Any, **kwargs: Any):
        watch = self._watch
        if watch.losses:  # else the epoch ends, after a step that is known
            watch.steps.append((self.state.global_step, watch.losses, grad_norm))
            watch.losses = []
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            tr_loss.zero_()  # transformers subtracts it from itself, and NaN and inf stay

    def log(self, *args: Any, **kwargs: Any) -> None:
        super().log(*args, **kwargs)
        self.end_if_diverged()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.end_if_diverged(weights=True)
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.end_if_diverged(weights=True)
        super()._save_checkpoint(*args, **kwargs)
        folder = Path(self._get_output_dir(trial=None), f"checkpoint-{self.state.global_step}")
        self._last_checkpoint = str(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Do what `Trainer.save_model` does.

        Raises:
            TrainingDiverged: the weights are not finite; nothing is written.
        """
        known = self._watch is not None and self._watch.sound == self.state.global_step  # as in a checkpoint
        if not known and not weights_are_finite(self.model, self.accelerator):
            raise self._diverged("weights", self.state.global_step)
        super().save_model(output_dir, _internal_call)

    def end_if_diverged(self, weights: bool = False, final: bool = False) -> None:
        """Read what the steps since the last call kept; outside of training there is nothing to read.

        Args:
            weights: whether to look at the weights whatever the steps say.
            final: whether this is the end, where fewer losses in a row count if they are all.

        Raises:
            TrainingDiverged: the weights are not finite, or no loss or gradient was in several steps.
        """
        watch, lost = self._watch, None
        if watch is None:
            return
        for step, *finite in self._read(watch):
            watch.done += 1
            for what, good in zip(watch.in_a_row, finite, strict=True):
                watch.in_a_row[what] = row = 0 if good else watch.in_a_row[what] + 1
                watch.first = watch.first or (None if good else (what, step))
                if row == _MOST_IN_A_ROW[what]:
                    lost = lost or (what, step - row + 1)
        if weights or watch.first:
            if not weights_are_finite(self.model, self.accelerator):
                first = watch.first or ("weights", self.state.global_step)
                raise self._diverged(*first, then="neither are the weights after it")
            watch.sound = self.state.global_step
        if final and watch.done and watch.in_a_row["loss"] == watch.done:
            lost = "loss", self.state.global_step - watch.done + 1
        if lost:
            raise self._diverged(*lost, then="neither is that of the steps after it")
        watch.first = None

    def _read(self, watch: _Watch) -> Iterable[tuple[int, bool, bool]]:
        """Return number, finite loss and finite gradient norm of the steps, as all ranks see them; one transfer."""
        steps, watch.steps = watch.steps, []
        if not steps:
            return []
        device = self.args.device
        rows = []
        for _, losses, norm in steps:
            norm = 0.0 if norm is None else getattr(norm, "full_tensor", lambda norm=norm: norm)()
            norm = torch.as_tensor(norm, dtype=torch.float32, device=device).reshape(())
            rows.append(torch.stack([sum(losses).float().reshape(()), norm]))
        finite = self.accelerator.gather(torch.stack(rows).isfinite().int()[None]).amin(dim=0)
        return [(step, *row) for (step, *_), row in zip(steps, finite.tolist(), strict=True)]

    def _diverged(self, first: str, step: int, then: str = "") -> TrainingDiverged:
        """Return the error that says what was not finite first, in which step, why, and what to go on from."""
        what = f"the {first} of step {step} is not finite"
        if first == "weights":
            what = f"the weights are not finite after step {step}"
            if self._watch and self._watch.sound is not None:
                what += f", and were after step {self._watch.sound}"
        elif then:
            what += f", and {then}"
        checkpoint, cure = self._last_checkpoint, "Begin again with that changed, a lower learning_rate first."
        if checkpoint:
            cure += (
                f" Or go on from that checkpoint with what is changed, by name: --resume_from_checkpoint {checkpoint} "
                "--resume_changed learning_rate"
            )
        halves = any(weight.dtype == torch.float16 for weight in self.model.parameters() if weight.requires_grad)
        causes = likely_causes(self.args, untouched=step <= 1 and first != "weights", halves=halves)
        return TrainingDiverged(
            f"training diverged: {what}. Likely cause: {causes}. Last good checkpoint: {checkpoint or 'none'}. {cure}",
            step=step,
            first=first,
            checkpoint=checkpoint,
        )


def likely_causes(args: TrainingArguments, untouched: bool, halves: bool) -> str:
    """Return the settings that are known to end in NaN, and what went in where the weights are as they were given."""
    causes = [text for extreme, text in _suspects(args) if extreme]
    causes += ["weights in float16, whose numbers end at 65504: take bf16 or fp32"] * halves
    if untouched:
        causes.append("what went in: a weight of the model, an offset, a weight of a row or a reference log-prob")
    return " or ".join(causes) or f"learning_rate={args.learning_rate:g} is too high for these data"


def _suspects(args: TrainingArguments) -> Iterable[tuple[bool, str]]:
    rate, beta = args.learning_rate, getattr(args, "beta", 0.1)
    smallest = min(args.adam_beta1, args.adam_beta2)
    yield rate > 1e-3, f"learning_rate={rate:g} (1e-6 to 1e-4 are usual)"
    yield rate * args.weight_decay > 1, f"weight_decay={args.weight_decay:g}, which turns weights around at this rate"
    yield args.adam_epsilon < 1e-12, f"adam_epsilon={args.adam_epsilon:g}, which divides 0 by 0"
    yield smallest < 0.5, f"adam_beta1={args.adam_beta1:g} and adam_beta2={args.adam_beta2:g} (0.9 and 0.999 are usual)"
    noise = args.neftune_noise_alpha or 0
    yield noise > 100, f"neftune_noise_alpha={noise:g} (5 to 15 are usual)"
    mix = getattr(args, "loss_mix", {})
    yield beta > 10 or beta < 1e-3, f"beta={beta:g} in {' + '.join(mix)} (0.01 to 1 are usual)"
    share = max(map(abs, mix.values()), default=1)
    yield share > 100, f"a loss that weighs {share:g}"
    divergence = getattr(args, "f_divergence_type", "reverse_kl")
    yield divergence in ("forward_kl", "alpha_divergence"), f"f_divergence_type={divergence}, which grows exponentially"
    yield not 0 < args.max_grad_norm <= 100, f"max_grad_norm={args.max_grad_norm:g}, which clips nothing (1 is usual)"
    yield args.fp16, "fp16=True, whose numbers end at 65504: take bf16"


@torch.no_grad()
def weights_are_finite(model: nn.Module, accelerator: Accelerator) -> bool:
    """Return whether all weights that are trained are finite, reading each once; the host waits for the device.

    Ranks that hold parts of the weights hear of each other's, so all of them call it together.
    """
    extremes = [
        torch.stack(torch.aminmax(weight)).isfinite().all().to(accelerator.device)
        for weight in map(_own_part, model.parameters())
        if weight is not None
    ]
    finite = torch.stack(extremes).all() if extremes else torch.ones((), dtype=torch.bool, device=accelerator.device)
    if accelerator.distributed_type in _SHARDED and accelerator.num_processes > 1:
        finite = accelerator.gather(finite.int()[None]).all()
    return bool(finite)


def refuse_unless_finite(model: nn.Module, accelerator: Accelerator) -> None:
    """Refuse a model before anything is computed.

    Raises:
        InputError: a weight that would be trained is not finite.
    """
    if not weights_are_finite(model, accelerator):
        names = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
        raise InputError(
            f"model: {', '.join(names[:3]) or 'a weight'} holds NaN or inf before the first step; take a checkpoint "
            "that has not diverged, or load it in bf16 or fp32"
        )


def _own_part(parameter: nn.Parameter) -> Tensor | None:
    """Return what this rank holds of a weight that is trained; None for nothing."""
    if not (parameter.requires_grad and parameter.is_floating_point()):
        return None
    part = getattr(parameter, "ds_tensor", parameter.detach())  # ZeRO-3 keeps its part aside
    part = part.to_local() if hasattr(part, "to_local") else part
    return part if part.numel() and not part.is_meta else None
