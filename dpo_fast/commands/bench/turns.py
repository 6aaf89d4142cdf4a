"""Trainers compared fairly: a process each, a step each in turns on the same rows, losses before times."""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dpo_fast.commands.bench.worker import STEP, Failure, Job, Report, work


class SideError(RuntimeError):
    """A side came to nothing; `failure` says why."""

    def __init__(self, failure: Failure):
        super().__init__(failure.message)
        self.failure = failure


class Side:
    """One process that trains when it is told to. Use it as a context: the process ends with it.

    Every method raises `SideError` when the job fails.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.terminate()

    def start(self, job: Job) -> None:
        """Builds the trainer and its reference log-probs."""
        self._pipe.send(job)
        self._receive()

    def step(self) -> float:
        """Runs one step and returns its seconds."""
        self._pipe.send(STEP)
        return self._receive()

    def finish(self) -> Report:
        """What the run came to, after its last step."""
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            status = self._process.exitcode
            killed = status == -signal.SIGKILL  # what a machine without memory left does
            raise SideError(Failure(f"its process ended with status {status}", out_of_memory=killed)) from None
        if isinstance(answer, Failure):
            raise SideError(answer)
        return answer


@dataclass(frozen=True)
class Comparison:
    """Reports by name, why others have none, and whether the sides took turns or ran one after the other."""

    reports: dict[str, Report]
    failures: dict[str, Failure]
    in_turns: bool


def compare(jobs: Mapping[str, Job], steps: int) -> Comparison:
    """Runs `steps` steps and one to warm up of every job, a step each in turns.

    Where the machine's memory is too small for all of them together, they run one after the other. A job that does not
    fit even alone, or fails otherwise, has a failure instead of a report.
    """
    try:
        return _in_turns(jobs, steps)
    except SideError as error:
        if len(jobs) == 1:
            return Comparison({}, {name: error.failure for name in jobs}, in_turns=True)
    reports: dict[str, Report] = {}
    failures: dict[str, Failure] = {}
    for name, job in jobs.items():
        try:
            alone = _in_turns({name: job}, steps)
        except SideError as error:
            failures[name] = error.failure
        else:
            reports |= alone.reports
            failures |= alone.failures
    return Comparison(reports, failures, in_turns=False)


def _in_turns(jobs: Mapping[str, Job], steps: int) -> Comparison:
    failures: dict[str, Failure] = {}
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Side()) for name in jobs}

        def everyone(turn: Callable[[Side, Job], Any]) -> dict[str, Any]:
            answers = {}
            for name in [name for name in jobs if name not in failures]:
                try:
                    answers[name] = turn(sides[name], jobs[name])
                except SideError as error:
                    if error.failure.out_of_memory:
                        raise
                    failures[name] = error.failure
            return answers

        everyone(Side.start)
        for _ in range(steps + 1):
            everyone(lambda side, _: side.step())
        reports = everyone(lambda side, _: side.finish())
    return Comparison(reports, failures, in_turns=True)


def one_after_another(jobs: Sequence[Job], steps: int) -> Iterator[Report | Failure]:
    """Runs jobs in one process, each when it is asked for; where one runs out of memory, the next gets a new process.

    Raises:
        SideError: a job failed for another reason.
    """
    with ExitStack() as stack:
        side = stack.enter_context(Side())
        for job in jobs:
            try:
                side.start(job)
                for _ in range(steps + 1):
                    side.step()
                yield side.finish()
            except SideError as error:
                if not error.failure.out_of_memory:
                    raise
                yield error.failure
                side = stack.enter_context(Side())


def loss_tolerance(exact: bool, beta: float, comparisons: int) -> float:
    """How far losses of the same step may be apart, as a share of ln 2; `exact` is fp32.

    In half precision a pair's margin depends on what it is packed or padded with, in any trainer, by 1 nat or so (RMS,
    `run.py rounding`). β/2 of that reaches the loss, less in a mean of many `comparisons`; three times as much may.
    """
    if exact:
        return 1e-3
    return min(max(3 * beta / 2 / math.log(2) / math.sqrt(comparisons), 2e-2), 0.5)


def check_losses(losses: Mapping[str, Sequence[float]], tolerance: float) -> float:
    """Compares the losses of every step with those of the first side, and returns the largest relative difference.

    Differences are relative to the step's loss, or to the first one where training has made it small.

    Raises:
        ValueError: a difference exceeds `tolerance`: the sides do not compute the same, so that no time is comparable.
    """
    if not losses:
        return 0.0
    (first, expected), *others = losses.items()
    largest = 0.0
    for name, found in others:
        for step, (a, b) in enumerate(zip(expected, found, strict=True)):
            difference = abs(a - b) / max(abs(a), abs(expected[0]))
            if not difference <= tolerance:
                raise ValueError(
                    f"losses: in step {step} {first} has {a:.6g} and {name} {b:.6g}, more than {tolerance:g} apart; "
                    "what computes something else is not timed. Lower learning_rate if the losses run away"
                )
            largest = max(largest, difference)
    return largest
