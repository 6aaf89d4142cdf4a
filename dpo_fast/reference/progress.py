"""What a person sees of the reference pass, on stderr: a bar on a terminal, a line per minute elsewhere."""

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
    name: str | None, total: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """Give a function that is told of the tokens that have run, and shows their share of `total`.

    Nothing is shown for a dataset without a name, by other processes of a machine than the first, or with
    `TQDM_DISABLE=1`, which also silences the bars of other libraries.
    """
    silent = os.environ.get("TQDM_DISABLE", "") not in ("", "0") or os.environ.get("LOCAL_RANK", "0") != "0"
    console = Console(stderr=True)
    if silent or name is None or not total:
        yield lambda tokens: None
    elif console.is_terminal:
        with Progress(console=console, redirect_stdout=False, redirect_stderr=False, refresh_per_second=4) as bar:
            yield functools.partial(bar.advance, bar.add_task(f"Reference log-probs of {name}", total=total))
    else:
        yield _Lines(name, total, clock).count


class _Lines:
    """Prints how far a pass is as `key=value` pairs, where a minute has gone by since the last line."""

    def __init__(self, name: str, total: int, clock: Callable[[], float]) -> None:
        self._name, self._total, self._clock = name, total, clock
        self._done, self._began = 0, clock()
        self._printed = self._began

    def count(self, tokens: int) -> None:
        self._done += tokens
        now = self._clock()
        if now < self._printed + SECONDS_BETWEEN_LINES:
            return
        left = duration((now - self._began) * (self._total - self._done) / self._done)
        line = f"reference_log_probs={self._name} tokens={self._done}/{self._total} time_left={left}"
        print(line, file=sys.stderr, flush=True)
        self._printed = now


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds as `H:MM:SS`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
