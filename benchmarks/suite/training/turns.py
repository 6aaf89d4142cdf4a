"""What a training loop calls at its milestones, so that its steps run one at a time, when it is told to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dpo_fast.machine import peak_memory, reset_peak_memory
from suite.training.probe import StepProbe
from suite.training.setting import Setting


class Turns:
    """The child's end: what a training loop calls at its milestones."""

    def __init__(self, pipe: Any, setting: Setting):
        self._pipe, self._setting = pipe, setting
        self._seconds: list[float] = []
        self._positions: list[int] = []
        self._peak = 0
        self._probe: StepProbe | None = None
        self._logging_seconds = 0.0
        self._probed: dict[str, Any] | None = None

    def begin(self, model: nn.Module) -> None:
        """Before the first step; `model` is what the loop calls."""
        self._model = model
        self._attention = getattr(model, "causal_lm", model).config._attn_implementation
        reset_peak_memory()
        self._pipe.send("ready")
        self._wait()

    def _wait(self) -> None:
        self._pipe.recv()
        self._began = time.perf_counter()

    def step_begins(self) -> None:
        """The micro-batches of a step are on the device."""
        if self._probe:
            self._probe.data_ready()

    def step_ends(self) -> None:
        if self._probe:
            self._probed = self._probe.close()
            self._probed["seconds_by_part"]["logging"] = self._logging_seconds
            self._probe = None
        else:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seconds.append(time.perf_counter() - self._began)
            if len(self._seconds) == 1 + self._setting.steps:
                self._peak = peak_memory()
        self._pipe.send("done")
        if len(self._seconds) + (self._probed is not None) < self._setting.all_steps:
            self._wait()

    def logged(self) -> None:
        """The log of a step is written. After the last timed one, a watched step begins."""
        if self._probed is None and len(self._seconds) == 1 + self._setting.steps < self._setting.all_steps:
            self._logging_seconds = time.perf_counter() - self._began
            self._probe = StepProbe(self._model)
            self._probe.open()

    def collating(self, collate: Callable[[Any], Any], positions: Callable[[Any], int]) -> Callable[[Any], Any]:
        """A collator that also notes how many token positions its batches have."""

        def counted(rows: Any) -> Any:
            if self._probe:
                self._probe.pause_counting(True)
            batch = collate(rows)
            self._positions.append(positions(batch))
            if self._probe:
                self._probe.pause_counting(False)
            return batch

        return counted

    def report(self) -> dict[str, Any]:
        every = self._setting.accumulation
        steps = range(every, every * len(self._seconds), every)  # a loader collates ahead: what is over was never run
        return {
            "seconds": self._seconds[1:],
            "token_positions": [sum(self._positions[start : start + every]) for start in steps],
            "peak_memory_gib": self._peak / 2**30,
            "allocation_retries": torch.cuda.memory_stats()["num_alloc_retries"] if torch.cuda.is_available() else 0,
            "attention": self._attention,
            **(self._probed or {}),
        }
