"""One side of bench_train.py: a trainer in a process of its own, that runs an optimizer step when it is told to.

Its peak memory is its own, and while one side computes the others wait. The clock runs from the word to start until the
step is done. The first step warms up, the timed ones follow, and one more that is watched closely (`train_probe`).

Memory: a process may take what the machine has to spare when it starts, or what it is given. What needs more fails
in that process alone and is reported as a setting that does not fit.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from train_probe import StepProbe
from train_setting import Setting

from dpo_fast.machine import peak_memory, reset_peak_memory

_RESERVE = 2**30  # bytes that stay free for everything else
_KILLED = (signal.SIGKILL, signal.SIGABRT)  # by the kernel; by C++ code that was refused memory


class DoesNotFit(Exception):
    """A side ran out of memory."""

    def __init__(self, provider: str, reason: str):
        super().__init__(provider, reason)
        self.provider, self.reason = provider, reason


class Side:
    """The parent's end: starts the process, tells it when to step, and collects its report.

    Raises:
        DoesNotFit: from every method, when the process ran out of memory. Any other end of it ends the program.
    """

    def __init__(self, setting: Setting, folder: str):
        self.name = setting.provider
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(setting, folder, theirs), daemon=True)
        self._process.start()
        theirs.close()  # else its end would not be noticed

    def _tell(self, what: str) -> Any:
        try:
            self._pipe.send(what)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            if -self._process.exitcode in _KILLED:
                raise DoesNotFit(self.name, f"ended by {signal.Signals(-self._process.exitcode).name}") from None
            sys.exit(f"{self.name} ended with an error, see above")
        if isinstance(answer, DoesNotFit):
            self._process.join()
            raise answer
        return answer

    def start(self) -> None:
        """Loads, prepares and computes the references; afterwards the side waits before its first step."""
        self._tell("start")

    def step(self) -> None:
        self._tell("step")

    def finish(self) -> dict[str, Any]:
        report = self._tell("finish")
        self._process.join()
        return report

    def stop(self) -> None:
        """Ends a process that is not needed any more."""
        self._process.kill()
        self._process.join()


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


def _work(setting: Setting, folder: str, pipe: Any) -> None:
    """The child process: builds the trainer, then one optimizer step for every message."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pipe.recv()
    from datasets import disable_progress_bars
    from train_providers import PROVIDERS
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        limit_memory(setting.memory_gib)
        pipe.send(_train(PROVIDERS[setting.provider], setting, folder, pipe))
    except Exception as error:
        if not out_of_memory(error):
            traceback.print_exc()
            sys.exit(1)
        pipe.send(DoesNotFit(setting.provider, f"{type(error).__name__}: {error}".splitlines()[0][:200]))


def _train(provider: Callable, setting: Setting, folder: str, pipe: Any) -> dict[str, Any]:
    turns = Turns(pipe, setting)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        train = provider(setting, folder, output)
        prepared = time.perf_counter() - began
        log = train(turns)
    pipe.recv()
    return {
        "losses": [row["loss"] for row in log],
        "gradient_norms": [row["grad_norm"] for row in log],
        "seconds_before_training": prepared,
        **turns.report(),
    }


def limit_memory(gib: float | None) -> None:
    """Bounds what this process may allocate from now on: to `gib`, or on a CPU to what is free."""
    if torch.cuda.is_available():
        if gib is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / torch.cuda.mem_get_info()[1]))
        return
    Path("/proc/self/oom_score_adj").write_text("1000")  # should it come to that, the kernel takes this process first
    spare = int(gib * 2**30) if gib is not None else _bytes("/proc/meminfo", "MemAvailable") - _RESERVE
    limit = _bytes("/proc/self/status", "VmData") + spare
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of PyTorch's allocators, of Python, of C++."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory", "cannot allocate memory")
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error).lower() for sign in signs)


def _bytes(file: str, name: str) -> int:
    """A figure that Linux gives in kB."""
    (line,) = (line for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
