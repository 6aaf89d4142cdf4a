"""Figures of a kernel benchmark: check first, then a repeat of everyone in turn, time and memory together.

A repeat is a forward and, where its result asks for one, a backward; each part has its own time.

    GPU   events on the stream, after the L2 cache is overwritten, which also gives the host a head start;
          memory is the allocator's peak less what was allocated before
    CPU   wall clock; memory is the kernel's peak of resident memory (VmHWM), set back before each repeat, less what was
          resident before (None where Linux does not offer that)

Gradients count as memory of the repeat. A provider is compared with the truth before it is timed. One whose errors are
above the limits is timed all the same, and its figures are marked `disagrees`: nobody may quote them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_fast.machine import peak_memory, reset_peak_memory, used_memory
from suite.harness.results import spread

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest error ‖found − truth‖ / ‖truth‖ on a small problem, by the dtype of the inputs. At the timed size sums are
# longer, and some peers take them in the inputs' dtype: there it may be a few times as much. Both are reported.
LIMITS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
SIZE_FACTOR = 5
METHOD = " ".join(__doc__.split())

_FLUSH_BYTES = 256 * 2**20  # more than any L2 cache holds
_ERROR_BLOCK = 1 << 26  # elements that are compared in float64 at a time


@dataclass(frozen=True)
class Repeat:
    """Cost of one repeat: milliseconds of its two parts, and bytes beyond what was there before."""

    forward_ms: float
    backward_ms: float
    peak_bytes: int | None

    @property
    def ms(self) -> float:
        return self.forward_ms + self.backward_ms


@dataclass
class Row:
    """One row of a result: figures of a provider, or the reason why there are none.

    Attributes:
        provider: name of the provider.
        mode: name of the computation.
        status: "timed", "skipped" (cannot run here) or "failed" (raised an error).
        reason: reason why the row was not timed, or why it disagrees.
        disagrees: whether an error is above the limit.
        errors: relative errors on the small problem, by name of the tensor.
        errors_at_size: relative errors at the size that is timed.
        figures: figures that the benchmark derives from the repeats.
    """

    provider: str
    mode: str
    status: str = "timed"
    reason: str = ""
    disagrees: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    errors_at_size: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    repeats: list[Repeat] = field(default_factory=list)

    def refuse(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason
        self.repeats.clear()
        print(f"{self.provider}, {self.mode}: {status}: {reason}", flush=True)

    def attempt(self, function: Callable[[], Any]) -> Any:
        """Return what the function returns; an error in it ends this row, not the benchmark."""
        try:
            return function()
        except torch.cuda.OutOfMemoryError:
            self.refuse("failed", "out of memory")
            torch.cuda.empty_cache()
        except Exception as error:  # of a peer, that may be anything
            self.refuse("failed", f"{type(error).__name__}: {_first_line(error)}")
        return None

    def check(self, errors: dict[str, float], dtype: str, at_size: bool = False) -> None:
        """Remember errors, and mark the row when one is above the limit or not a number."""
        limit = LIMITS[dtype] * (SIZE_FACTOR if at_size else 1)
        (self.errors_at_size if at_size else self.errors).update(errors)
        wrong = {name: error for name, error in errors.items() if not error <= limit}
        if wrong:
            where = "at the timed size" if at_size else "on the small problem"
            found = ", ".join(f"{name} errs by {error:.2e}" for name, error in wrong.items())
            self.disagrees, self.reason = True, f"{where} {found}, the limit for {dtype} is {limit:.0e}"
            print(f"{self.provider}, {self.mode}: disagrees: {self.reason}", flush=True)

    def spreads(self) -> dict[str, Any]:
        """Return milliseconds of both parts and their sum with spread, and the largest peak of memory."""
        peaks = [repeat.peak_bytes for repeat in self.repeats if repeat.peak_bytes is not None]
        return {
            "ms_forward": spread([repeat.forward_ms for repeat in self.repeats]),
            "ms_backward": spread([repeat.backward_ms for repeat in self.repeats]),
            "ms": spread([repeat.ms for repeat in self.repeats]),
            "peak_bytes": max(peaks) if peaks else None,
        }

    def record(self) -> dict[str, Any]:
        """Return this row for a result file."""
        names = ("provider", "mode", "status", "reason", "disagrees", "errors", "errors_at_size")
        return {**{name: getattr(self, name) for name in names}, **self.figures}


def skip(rows: Sequence[Row], reason: str | None) -> None:
    """Leave rows of one provider out for a reason, None for none; print the same reason only once."""
    if reason:
        for row in rows:
            row.status, row.reason = "skipped", reason
        _say(f"{rows[0].provider}: skipped: {reason}")


@cache
def _say(line: str) -> None:
    print(line, flush=True)


class Stopwatch:
    """Takes the time and the peak memory of repeats on one device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._cuda = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if self._cuda else None

    def repeat(self, forward: Callable[[], Tensor]) -> Repeat:
        """Run a forward that returns a scalar or needs no backward, and the backward where its result has one."""
        before = self._start_memory()
        if self._cuda:
            self._flush.zero_()
        marks = [self._mark()]
        result = forward()
        marks.append(self._mark())
        if result.requires_grad:
            result.backward()
        marks.append(self._mark())
        peak = None if before is None else peak_memory(self._device)
        first, second = (self._milliseconds(*pair) for pair in zip(marks, marks[1:], strict=False))
        return Repeat(first, second, None if peak is None else max(0, peak - before))

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _milliseconds(self, start: Any, end: Any) -> float:
        if not self._cuda:
            return (end - start) * 1e3
        end.synchronize()
        return start.elapsed_time(end)

    def _start_memory(self) -> int | None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
        try:
            reset_peak_memory(self._device)
        except OSError:  # Linux alone tells
            return None
        return used_memory(self._device)


def take_turns(
    rows: Sequence[Row],
    run: Callable[[Row], Repeat],
    repeats: int,
    deadline: float,
) -> None:
    """Add repeats to the rows that are not refused: one of each in turn, until there are enough or time is short.

    Args:
        rows: rows in the order of a round; every second round goes backwards, so that nobody always follows the same.
        run: function that takes one repeat of a row.
        repeats: largest number of rounds; there is always one.
        deadline: instant of `time.monotonic()`; a round as long as the last one must end before it.
    """
    for turn in range(repeats):
        began = time.monotonic()
        for row in rows if turn % 2 == 0 else reversed(rows):
            repeat = row.attempt(lambda row=row: run(row)) if row.status == "timed" else None
            if repeat is not None:
                row.repeats.append(repeat)
        now = time.monotonic()
        if now + (now - began) > deadline:
            break


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Return ‖found − truth‖ / ‖truth‖ in float64; NaN where found is not finite."""
    if found.shape != truth.shape:
        return float("nan")
    square, norm = (torch.zeros((), dtype=torch.float64, device=truth.device) for _ in range(2))
    blocks = (tensor.detach().reshape(-1).split(_ERROR_BLOCK) for tensor in (found, truth))
    for a, b in zip(*blocks, strict=True):
        b = b.double()
        square += (a.double() - b).square().sum()
        norm += b.square().sum()
    return (square / norm).sqrt().item()


def import_error(*modules: str) -> str | None:
    """Return why an optional peer cannot be imported, or None when it can."""
    for module in modules:
        try:
            __import__(module)
        except Exception as error:  # a peer that does not fit the other packages may raise anything
            return f"{module} cannot be imported: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def mark(row: Mapping[str, Any]) -> str:
    """Return what stands behind a figure of a row that disagrees."""
    return "≠" if row.get("disagrees") else ""


def runs_triton(device: torch.device) -> bool:
    """Return whether Triton kernels run: on a GPU, or in Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with aligned columns, the first to the left and the others to the right."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    return [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))  # noqa: B905
        for line in (header, *lines)
    ]


def fail_if_wrong(problems: Sequence[Mapping[str, Any]], ours: Collection[str]) -> None:
    """End the script with an error when a row of ours disagrees or failed."""
    rows = [row for problem in problems for row in problem["table"]]
    bad = {row["provider"] for row in rows if row["disagrees"] or row["status"] == "failed"} & set(ours)
    if bad:
        raise SystemExit(f"disagree or failed, see above: {', '.join(sorted(bad))}")


def shares(problem: Mapping[str, Any], figure: str) -> dict[str, float]:
    """Return a figure of every row of a problem that has it, by provider and mode."""
    return {f"{row['provider']}, {row['mode']}": row[figure] for row in problem["table"] if figure in row}


def plot_bars(panels: Mapping[str, Mapping[str, float]], label: str, path: Path) -> None:
    """Draw one panel of horizontal bars per title, with a line at 100 %; nothing where matplotlib is missing."""
    panels = {title: bars for title, bars in panels.items() if bars}
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    if not panels:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, lines * (0.9 + 0.24 * most)), layout="constrained", squeeze=False
    )
    for place, (title, bars) in zip(axes.flat, panels.items(), strict=False):
        names = list(bars)[::-1]
        drawn = place.barh(names, [bars[name] for name in names])
        place.bar_label(drawn, fmt="%.0f", padding=2, fontsize=7)
        place.axvline(100, color="black", linewidth=0.8)
        place.set_title(title, fontsize=9)
        place.set_xlabel(label, fontsize=8)
        place.tick_params(labelsize=7)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)
