"""What a person sees of a pass over data, on stderr: a bar on a terminal, a line per minute elsewhere."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

SECONDS_BETWEEN_LINES = 60.0


@contextmanager
def show_pass(
    title: str | None, total: int, unit: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many more units are done, and shows their share of `total`.

    Nothing is shown without a title, by other processes of a machine than the first, or with `TQDM_DISABLE=1`, which
    also silences the bars of other libraries.
    """
    silent = os.environ.get("TQDM_DISABLE", "") not in ("", "0") or os.environ.get("LOCAL_RANK", "0") != "0"
    console = Console(stderr=True)
    if silent or not title or not total:
        yield lambda more: None
    elif console.is_terminal:
        with Progress(console=console, redirect_stdout=False, redirect_stderr=False, refresh_per_second=4) as bar:
            yield functools.partial(bar.advance, bar.add_task(title, total=total))
    else:
        yield _Lines(title, total, unit, clock).count


class _Lines:
    """Prints how far a pass is, a minute after the last line."""

    def __init__(self, title: str, total: int, unit: str, clock: Callable[[], float]) -> None:
        self._title, self._total, self._unit, self._clock = title, total, unit, clock
        self._done, self._began = 0, clock()
        self._printed = self._began

    def count(self, more: int) -> None:
        self._done += more
        now = self._clock()
        if now < self._printed + SECONDS_BETWEEN_LINES:
            return
        left = duration((now - self._began) * (self._total - self._done) / self._done)
        done = f"{self._title}: {self._done:,} of {self._total:,} {self._unit}, {left} left"
        print(done, file=sys.stderr, flush=True)
        self._printed = now


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds as `H:MM:SS`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
