"""One call on a GPU: every step in a process of its own with a bound of seconds, one archive, a summary last.

    python benchmarks/run.py gpu --out DIR            what every claim waits for
    python benchmarks/run.py gpu --more --out DIR     what is left
    python benchmarks/run.py gpu --rehearse --out DIR the same steps on a CPU at toy sizes

No step stops another. One that takes too long is ended and named, after half more than its seconds where earlier steps
have left so much; steps for which no time is left are named too. Logs and results are packed into DIR/gpu.tar.gz every
few seconds and after every step, so that whatever ends this process leaves what was written before. The summary is the
last that is printed, and fits into 12 000 characters.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from suite.gpu import plan
from suite.gpu.plan import Step
from suite.gpu.tests_log import outcome_lines
from suite.harness.summary import prediction_lines, result_sections

MOST_CHARACTERS = 11_500
_PACK_SECONDS = 5
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
_GRACE = 5  # seconds that an interrupted step has to write what it knows
_LAST_SECONDS = 6  # of the call, for the archive and the summary
_LEAST_SECONDS = 3  # with which a step begins


@dataclass
class Outcome:
    """How a step ended, and its seconds."""

    step: Step
    status: str
    seconds: float = 0.0


class Call:
    """A call: its steps, the folder that they write to, and the archive."""

    def __init__(self, name: str, steps: Sequence[Step], work: Path, out: Path, seconds: float):
        self._steps, self._work, self._archive, self._name = steps, work, out / f"{name}.tar.gz", name
        self._began = time.monotonic()
        self._deadline = self._began + seconds - _LAST_SECONDS
        self._packed = 0.0
        self._process: subprocess.Popen | None = None
        self.outcomes = [Outcome(step, "left out") for step in steps]
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Run all steps, and print the summary; also when a signal ends the call."""
        try:
            for outcome in self.outcomes:
                self._run(outcome)
        finally:
            self._end()
            lines = self.summary()
            (self._work / "summary.txt").write_text("\n".join(lines) + "\n")
            self._pack()
            print("\n".join(["", *lines]), flush=True)

    def _run(self, outcome: Outcome) -> None:
        step, began = outcome.step, time.monotonic()
        left = self._deadline - began
        if left < _LEAST_SECONDS:
            return
        spare = left - sum(each.step.seconds for each in self.outcomes[self.outcomes.index(outcome) :])
        limit = min(step.seconds + max(0, min(spare, step.seconds / 2)), left)
        print(f"== {step.name} ({limit:.0f} s)", flush=True)
        log = self._work / f"{step.name.replace(' ', '-')}.log"
        outcome.status = "interrupted"
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, *(str(self._work) if part == "OUT" else part for part in step.command)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=plan.ROOT,
                env={**os.environ, **_ENVIRONMENT, **step.environment},
                process_group=0,
            )
            try:
                status = self._wait(began + limit)
            finally:
                self._end()
                outcome.seconds = time.monotonic() - began
        outcome.status = "out of time" if status is None else "done" if status == 0 else f"failed ({status})"
        print(f"   {outcome.status}, {outcome.seconds:.1f} s", flush=True)
        if outcome.status != "done":
            last = log.read_text(errors="replace").splitlines()[-4:]
            print("\n".join(f"   {line[:160]}" for line in last), flush=True)
        self._pack()

    def _wait(self, deadline: float) -> int | None:
        """Return the exit status of the running step, None where the deadline came first."""
        while time.monotonic() < deadline:
            try:
                return self._process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if time.monotonic() - self._packed > _PACK_SECONDS:
                    self._pack()
        return None

    def _end(self) -> None:
        """End the running step and all that it started: asked first, then not."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _pack(self) -> None:
        """Write the archive beside the old one, then in its place: there is always a whole one."""
        new = self._archive.with_suffix(".new")
        with tarfile.open(new, "w:gz", compresslevel=3) as archive:
            archive.add(self._work, arcname=self._name)
        new.replace(self._archive)
        self._packed = time.monotonic()

    def summary(self) -> list[str]:
        """Return the summary: steps, tests and checks, results, predictions beside what was measured."""
        taken = time.monotonic() - self._began
        steps = [f"{self._name}: {taken:.0f} s; {self._archive}"]
        steps += [
            f"  {each.step.name:16}{each.status:14}{each.seconds:7.1f} of {each.step.seconds:.0f} s"
            for each in self.outcomes
        ]
        late = [each.step.name for each in self.outcomes if each.status in ("out of time", "left out", "interrupted")]
        steps += [f"out of time: {', '.join(late)}"] if late else []
        tests = [outcome_lines(log) for log in sorted(self._work.glob("*tests.log"))]
        return bounded([steps, *tests, *result_sections(self._work), prediction_lines(self._work)], MOST_CHARACTERS)


def bounded(sections: Sequence[Sequence[str]], characters: int) -> list[str]:
    """Return all sections as lines of at most so many characters; the longest sections lose their last lines."""
    kept = [list(section) for section in sections if section]
    lost = [0] * len(kept)

    def lines() -> list[str]:
        ends = [[f"  … {count} more lines in the archive"] if count else [] for count in lost]
        return [line for section, end in zip(kept, ends, strict=True) for line in (*section, *end, "")]

    while sum(len(line) + 1 for line in lines()) > characters:
        longest = max(range(len(kept)), key=lambda index: sum(map(len, kept[index])))
        kept[longest].pop()
        lost[longest] += 1
    return lines()


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--more", action="store_true", help="what the first call leaves")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="some of them; all when left out")
    parser.add_argument("--seconds", type=float, default=plan.SECONDS, help="of the whole call")
    parser.add_argument("--out", type=Path, required=True, help="folder of the archive")
    options = parser.parse_args()
    steps = {
        (False, False): plan.first,
        (False, True): plan.first_rehearsed,
        (True, False): plan.more,
        (True, True): plan.more_rehearsed,
    }[options.more, options.rehearse]()
    if options.steps:
        unknown = set(options.steps) - {step.name for step in steps}
        if unknown:
            parser.error(f"--steps: no step is called {sorted(unknown)}; choose from {[step.name for step in steps]}")
        steps = [step for step in steps if step.name in options.steps]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)
    name = "gpu-more" if options.more else "gpu"
    if options.rehearse:
        print("rehearsal on a CPU: no figure below is one of a GPU", flush=True)
        name += "-rehearsal"
    with tempfile.TemporaryDirectory(prefix="dpo-fast-gpu-", ignore_cleanup_errors=True) as work:
        call = Call(name, steps, Path(work), options.out.resolve(), options.seconds)
        call.run()
    if any(outcome.status != "done" for outcome in call.outcomes):
        sys.exit(1)
