"""Trainers compared fairly: a process each, a step each in turns on the same rows, losses before times."""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dpo_fast.commands.bench.worker import STEP, Failure, Report, TrainJob, work
from dpo_fast.errors import InputError

# Signals that end a process without memory: from the kernel, and from C++ code that was refused memory.
_NO_MEMORY = (signal.SIGKILL, signal.SIGABRT)


class TrainerError(RuntimeError):
    """A job has no report; `failure` says why."""

    def __init__(self, failure: Failure, name: str = ""):
        super().__init__(f"{name}: {failure.message}" if name else failure.message)
        self.failure = failure


class TrainerProcess:
    """A process that trains when it is told to. Use it as a context: the process ends with it.

    Every method raises `TrainerError` when the job fails.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def __enter__(self) -> TrainerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.terminate()

    def start(self, job: TrainJob) -> None:
        """Build the trainer and its reference log-probs."""
        self._pipe.send(job)
        self._receive()

    def step(self) -> float:
        """Run one step and return its seconds."""
        self._pipe.send(STEP)
        return self._receive()

    def finish(self) -> Report:
        """Return the report of the job, after its last step."""
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            status = self._process.exitcode
            no_memory = -status in _NO_MEMORY
            ended = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise TrainerError(Failure(f"its process {ended}", out_of_memory=no_memory)) from None
        if isinstance(answer, Failure):
            raise TrainerError(answer)
        return answer


@dataclass(frozen=True)
class Comparison:
    """Reports by name, failures of the others, and whether the jobs took turns or ran one after the other."""

    reports: dict[str, Report]
    failures: dict[str, Failure]
    in_turns: bool


def compare(jobs: Mapping[str, TrainJob], required: Collection[str] = ()) -> Comparison:
    """Run all steps of every job, a step each in turns.

    Jobs that fit the machine's memory alone, but not all at once, run one after the other. A job that does not fit even
    alone has a failure instead of a report, and the others take turns without it.

    Args:
        jobs: jobs of equally many steps.
        required: names of jobs that must not fail for another reason than memory.

    Raises:
        TrainerError: a required job failed.
    """
    found = _in_turns(jobs, required)
    short = [name for name, failure in found.failures.items() if failure.out_of_memory]
    if not short or len(jobs) == 1:
        return found
    alone = each_alone({name: jobs[name] for name in short}, required)
    others = {name: job for name, job in jobs.items() if name not in short}
    rest = each_alone(others, required) if alone.reports else compare(others, required)
    reports = alone.reports | rest.reports
    return Comparison(
        {name: reports[name] for name in jobs if name in reports}, alone.failures | rest.failures, rest.in_turns
    )


def each_alone(jobs: Mapping[str, TrainJob], required: Collection[str] = ()) -> Comparison:
    """Run one job after the other, each with the machine's memory to itself; otherwise as `compare` does."""
    parts = [_in_turns({name: job}, required) for name, job in jobs.items()]
    reports = {name: report for part in parts for name, report in part.reports.items()}
    failures = {name: failure for part in parts for name, failure in part.failures.items()}
    return Comparison(reports, failures, in_turns=False)


def _in_turns(jobs: Mapping[str, TrainJob], required: Collection[str]) -> Comparison:
    """Run all jobs at once, a step each; one that runs out of memory ends them all, with its failure and no report."""
    failures: dict[str, Failure] = {}
    reports: dict[str, Report] = {}
    steps = max((job.all_steps for job in jobs.values()), default=0)
    with ExitStack() as stack:
        processes = {name: stack.enter_context(TrainerProcess()) for name in jobs}

        def everyone(turn: Callable[[TrainerProcess, TrainJob], Any]) -> dict[str, Any]:
            answers = {}
            for name in [name for name in jobs if name not in failures]:
                try:
                    answers[name] = turn(processes[name], jobs[name])
                except TrainerError as error:
                    failures[name] = error.failure
                    if error.failure.out_of_memory or name in required:
                        raise TrainerError(error.failure, name) from None
            return answers

        try:
            everyone(TrainerProcess.start)
            for _ in range(steps):
                everyone(lambda process, _: process.step())
            reports = everyone(lambda process, _: process.finish())
        except TrainerError as error:
            if not error.failure.out_of_memory:
                raise
    return Comparison(reports, failures, in_turns=True)


def one_after_another(jobs: Sequence[TrainJob]) -> Iterator[Report | Failure]:
    """Run jobs in one process, each when it is asked for; where one runs out of memory, the next gets a new process.

    Raises:
        TrainerError: a job failed for another reason.
    """
    with ExitStack() as stack:
        process = stack.enter_context(TrainerProcess())
        for job in jobs:
            try:
                process.start(job)
                for _ in range(job.all_steps):
                    process.step()
                yield process.finish()
            except TrainerError as error:
                if not error.failure.out_of_memory:
                    raise
                yield error.failure
                process = stack.enter_context(TrainerProcess())


def loss_tolerance(exact: bool, beta: float, comparisons: int) -> float:
    """Return how far losses of the same step may be apart, as a share of ln 2; `exact` is fp32.

    In half precision a pair's margin depends on what it is packed or padded with, in any trainer, by 1 nat or so (RMS,
    `run.py rounding`). β/2 of that reaches the loss, less in a mean of many `comparisons`; three times as much may.
    """
    if exact:
        return 1e-3
    return min(max(3 * beta / 2 / math.log(2) / math.sqrt(comparisons), 2e-2), 0.5)


def check_losses(losses: Mapping[str, Sequence[float]], tolerance: float) -> float:
    """Compare the losses of every step with those of the first side, and return the largest relative difference.

    Differences are relative to the step's loss, or to the first loss where training has made that of the step small.

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
                raise InputError(
                    f"losses: in step {step} {first} has {a:.6g} and {name} {b:.6g}, more than {tolerance:g} apart; "
                    "what computes something else is not timed. Lower learning_rate if the losses run away"
                )
            largest = max(largest, difference)
    return largest
