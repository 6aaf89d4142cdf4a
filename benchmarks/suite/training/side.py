"""One side of run.py speed: a trainer in a process of its own, that runs an optimizer step when it is told to.

Its peak memory is its own, and while one side computes the others wait. The clock runs from the word to start until the
step is done. The first step warms up, the timed ones follow, and one more that is watched closely (`probe`).

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

from suite.training.providers import PROVIDERS
from suite.training.setting import Setting
from suite.training.turns import Turns

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


def _work(setting: Setting, folder: str, pipe: Any) -> None:
    """The child process: builds the trainer, then one optimizer step for every message."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pipe.recv()
    from datasets import disable_progress_bars
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
