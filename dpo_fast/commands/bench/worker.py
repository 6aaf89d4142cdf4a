"""A trainer in a process of its own, which takes a step when it is told to: the far end of `turns.TrainerProcess`.

For every `TrainJob` the process builds the trainer and answers `READY`. It then runs one optimizer step per `STEP` that
it receives, and answers with the step's seconds. A `Report` ends the job, or a `Failure`; the next job may follow.

A training loop of any kind takes part. It gets a `StepGate` and calls the gate at its milestones.
"""

from __future__ import annotations

import gc
import importlib
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import datasets
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.utils import logging as transformers_logging

from dpo_fast.machine import peak_memory, reset_peak_memory

STEP, READY = "step", "ready"  # messages, beside jobs and what comes of them
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc")


@dataclass(frozen=True)
class TrainJob:
    """A training to measure. Its first step warms up, and the timed steps follow.

    Attributes:
        trainer: dotted name, "package.module:function", of a function that returns a `TrainingLoop`.
        arguments: arguments of that function.
        steps: number of timed steps.
        watch: dotted name of a `StepWatch` for one more step, which no figure of speed counts; None for no such step.
    """

    trainer: str
    arguments: tuple[Any, ...]
    steps: int
    watch: str | None = None

    @property
    def all_steps(self) -> int:
        return 1 + self.steps + (self.watch is not None)


@dataclass(frozen=True)
class Report:
    """Figures of a finished job.

    Attributes:
        log: row of every step, with its `loss`.
        seconds: seconds of every timed step.
        positions: token positions that went through the model in every timed step, padding included.
        peak_memory: bytes up to the last timed step; of the allocator on a GPU, of the resident process on a CPU.
        seconds_before_training: seconds that building the trainer took.
        notes: whatever the loop and the watch noted.
    """

    log: list[Mapping[str, float]]
    seconds: list[float]
    positions: list[int]
    peak_memory: int
    seconds_before_training: float
    notes: Mapping[str, Any]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.log]


@dataclass(frozen=True)
class Failure:
    """Reason why a job has no report; `refused` where the trainer does not take these arguments or rows."""

    message: str
    out_of_memory: bool = False
    refused: bool = False


class StepWatch(Protocol):
    """Watches one step, from its own construction to `close`."""

    def __init__(self, model: nn.Module, logging_seconds: float):
        """Begin; the log of the step before took `logging_seconds` of this step."""

    def data_ready(self) -> None:
        """Note that the micro-batches of the step are on the device."""

    def close(self) -> Mapping[str, Any]:
        """Return the figures of the step, after its end."""


class StepGate:
    """Milestones of a training loop, which holds the loop before every step until the other end says so.

    The clock of a step runs from that word to the step's end; writing the log of the step before falls into it.

    Attributes:
        notes: facts for the report, which the loop may add to.
    """

    def __init__(self, pipe: Connection, job: TrainJob):
        self.notes: dict[str, Any] = {}
        self._pipe, self._job = pipe, job
        self._seconds: list[float] = []
        self._positions: list[int] = []
        self._peak_memory = 0
        self._watch: StepWatch | None = None

    def begin(self, model: nn.Module) -> None:
        """Wait for the first step; `model` is what the loop calls."""
        self.model, self._device = model, next(model.parameters()).device
        reset_peak_memory(self._device)
        self._pipe.send(READY)
        self._wait()

    def _wait(self) -> None:
        if self._pipe.recv() != STEP:
            raise EOFError
        self._positions.append(0)
        self._began = time.perf_counter()

    def step_begins(self) -> None:
        """Note that the micro-batches of a step are on the device."""
        if self._watch is not None:
            self._watch.data_ready()

    def runs(self, positions: int) -> None:
        """Note that a micro-batch of so many token positions goes through the model."""
        self._positions[-1] += positions

    def step_ends(self) -> None:
        """Stop the clock, and wait for the next step if there is one."""
        if self._watch is not None:
            self.notes |= self._watch.close()
        elif self._device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds.append(time.perf_counter() - self._began)
        if self._timed_steps_are_over():
            self._peak_memory = peak_memory(self._device)
        self._pipe.send(self._seconds[-1])
        if len(self._seconds) < self._job.all_steps:
            self._wait()

    def logged(self) -> None:
        """Note that the log of a step is written; the watched step begins after that of the last timed one."""
        if self._job.watch is not None and self._watch is None and self._timed_steps_are_over():
            self._watch = _named(self._job.watch)(self.model, time.perf_counter() - self._began)

    def _timed_steps_are_over(self) -> bool:
        return len(self._seconds) == 1 + self._job.steps

    def report(self, log: Sequence[Mapping[str, float]], seconds_before_training: float) -> Report:
        timed = slice(1, 1 + self._job.steps)
        return Report(
            list(log),
            self._seconds[timed],
            self._positions[timed],
            self._peak_memory,
            seconds_before_training,
            self.notes,
        )


TrainingLoop = Callable[[StepGate], Sequence[Mapping[str, float]]]  # returns the log, a row for every step


class StepGateCallback(TrainerCallback):
    """Passes the milestones of a Hugging Face trainer on."""

    def __init__(self, gate: StepGate):
        self._gate = gate

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self._gate.begin(model)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._gate.step_begins()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._gate.step_ends()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._gate.logged()


def loop_of(trainer: Trainer, positions: Callable[[Any], int], **notes: Any) -> TrainingLoop:
    """Return the training of a Hugging Face trainer as a loop.

    Args:
        trainer: the trainer.
        positions: function that returns the token positions of a micro-batch, padding included.
        notes: facts for the report.
    """

    def train(gate: StepGate) -> list[Mapping[str, float]]:
        training_step = trainer.training_step

        def counted(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            gate.runs(positions(inputs))
            return training_step(model, inputs, *args, **kwargs)

        trainer.training_step = counted
        trainer.add_callback(StepGateCallback(gate))
        trainer.remove_callback(PrinterCallback)
        gate.notes |= notes
        trainer.train()
        return [row for row in trainer.state.log_history if "loss" in row]

    return train


def work(pipe: Connection) -> None:
    """Run jobs until the pipe closes."""
    _be_quiet()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer: Report | Failure = run(job, pipe)
        except EOFError:  # nobody waits for this job any more
            return
        except Exception as error:
            refused = isinstance(error, ValueError | ImportError)
            if not out_of_memory(error) and not refused:
                traceback.print_exc()
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            answer = Failure(message, out_of_memory(error), refused)
        pipe.send(answer)
        _free_memory()


def run(job: TrainJob, pipe: Connection) -> Report:
    """Run one job whose steps the other end of `pipe` calls for."""
    build = _named(job.trainer)
    began = time.perf_counter()
    train: TrainingLoop = build(*job.arguments)
    prepared = time.perf_counter() - began
    gate = StepGate(pipe, job)
    return gate.report(train(gate), prepared)


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out: of PyTorch's allocators, of Python, of C++."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error).lower() for sign in _NO_MEMORY)


def _be_quiet() -> None:
    """Leave the terminal to the process that compares: only warnings of our own and tracebacks pass."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
