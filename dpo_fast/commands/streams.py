"""Output that nothing ends: a reader that went away, a terminal of another encoding, a signal."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, what_remains: str = "what was computed is kept"):
        super().__init__(f"stopped by {signal.Signals(number).name}; {what_remains}")
        self.number = number


class _Patient(io.RawIOBase):
    """A stream that takes what nobody reads any more."""

    def __init__(self, stream: io.RawIOBase):
        self._stream, self._closed = stream, False

    def write(self, data: bytes) -> int:
        if not self._closed:
            try:
                return self._stream.write(data)
            except BrokenPipeError:
                self._closed = True
        return len(data)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def keep_output_going() -> None:
    """Let stdout and stderr outlive their readers, and print what their encoding lacks as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # itself with PYTHONUNBUFFERED
        if isinstance(raw, io.FileIO):
            stream.flush()
            patient = io.TextIOWrapper(
                io.BufferedWriter(_Patient(raw)),
                encoding=stream.encoding,
                errors="backslashreplace",
                line_buffering=stream.line_buffering or raw is buffer or name == "stderr",
            )
            setattr(sys, name, patient)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` where SIGINT or SIGTERM arrives, so that what holds something unsaved can save it."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    with handling_signals(stop):
        yield


@contextmanager
def handling_signals(handler: object) -> Iterator[None]:
    """Call `handler` for SIGINT and SIGTERM; those who handled them before do so again afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, handler) for number in numbers]
    except ValueError:  # not the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        for number, former in zip(numbers, before, strict=True):
            signal.signal(number, former)
