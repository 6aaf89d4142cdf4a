"""The running mean M₀ of a step's margins, against which β-DPO (arXiv 2407.08639) measures the next step.

    M₀ ← 0.9·M₀ + 0.1·M        M the mean of β[(ℓ − ℓ_ref)_w − (ℓ − ℓ_ref)_l] over the step's comparisons

It stays on the device and is read back only into checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerState

from dpo_fast.training.checkpoints import STATE_FILE

DECAY = 0.9
_STATE = "RunningMargin"


class RunningMargin:
    """M₀, from 0.

    Attributes:
        mean: fp32 scalar, changed in place between steps.
    """

    def __init__(self, device: torch.device):
        self.mean = torch.zeros((), device=device)
        self._step = torch.zeros((), device=device)

    def add(self, share: Tensor) -> None:
        """Adds a pack's share of the mean of the present step."""
        self._step += share

    def end_step(self, sum_over_ranks=lambda share: share) -> None:
        """Closes the step: its mean moves the running one."""
        step = sum_over_ranks(self._step)
        self.mean.lerp_(torch.where(step.isfinite(), step, self.mean), 1 - DECAY)  # one bad step does not stay
        self._step.zero_()

    def save(self, state: TrainerState) -> None:
        state.stateful_callbacks[_STATE] = {"args": {}, "attributes": {"mean": self.mean.item()}}

    def begin(self, checkpoint: str | None) -> None:
        """Begins a training: from 0, or where the one of a checkpoint's folder was."""
        self._step.zero_()
        self.load(TrainerState.load_from_json(str(Path(checkpoint, STATE_FILE))) if checkpoint else TrainerState())

    def load(self, state: TrainerState) -> None:
        """Takes up the mean of a checkpoint, where it has one."""
        self.mean.fill_(state.stateful_callbacks.get(_STATE, {"attributes": {"mean": 0.0}})["attributes"]["mean"])
