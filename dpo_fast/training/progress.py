"""What a person sees of training: a table on a terminal, a line of `key=value` pairs for each log elsewhere.

Both begin with the same figures:

    step        optimizer steps done, of all steps
    loss        mean since the last log, or over the held-out data
    margin      rewards/margins: nats times beta
    accuracy    rewards/accuracies: share of comparisons whose winner has the larger reward
    tokens/s    tokens of all processes since the last log, per second of training without evaluations and checkpoints
    time left   at the mean pace of the steps after the first, which warms up
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer_utils import has_length

from dpo_fast.reference.progress import duration
from dpo_fast.training.metrics import NAMES

# What lines call a figure → its title in the table, and how that prints it.
_COLUMNS = {
    "loss": ("loss", ".4f"),
    "margin": ("margin", "+.4f"),
    "accuracy": ("accuracy", ".3f"),
    "tokens_per_second": ("tokens/s", ","),
    "time_left": ("time left", ""),
}
_STEP_WIDTH, _WIDTH = 20, 9  # of columns: 80 characters in all
_END = "train_"  # what the names of the last log begin with
_OF_AN_EVALUATION = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", *NAMES)
_SECONDS_BETWEEN_UPDATES = 0.1
_ERASE_LINE = Control((ControlType.ERASE_IN_LINE, 2), ControlType.CARRIAGE_RETURN)


def show_progress(trainer: Trainer) -> None:
    """Replace the callback by which transformers shows its logs; the table that it draws in a notebook stays."""
    callbacks = trainer.callback_handler.callbacks
    if type(callbacks[-1]) in (PrinterCallback, ProgressCallback):  # it comes after those of the user
        is_terminal = getattr(sys.stdout, "isatty", lambda: False)()  # some programs put another object there
        callbacks[-1] = TrainingProgress(Console() if is_terminal and not trainer.args.disable_tqdm else None)


class TrainingProgress(ProgressCallback, PrinterCallback):
    """Shows the logs of a trainer, on the first process.

    It derives from both callbacks that it stands for, so that a script that removes one of them removes this one.

    Args:
        console: terminal that gets the table; None prints lines to stdout.
        clock: seconds from any origin.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._console, self._clock = console, clock
        self._pace = _Pace(TrainerState(), clock)
        self._has_header = False
        self._evaluated = 0  # batches of the evaluation that is under way
        self._updated = -_SECONDS_BETWEEN_UPDATES  # when the line below the table was written

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._pace, self._evaluated = _Pace(state, self._clock), 0
        if self._console is not None and state.is_world_process_zero:
            self._console.print(_table(self._console.width, header=True))
            self._has_header = True

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._pace.begin_step(state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._pace.count()
        left = self._pace.time_left(state)
        self._update(state, _step(state) if left is None else f"{_step(state)}  {left} left")

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        self._evaluated += 1
        of_all = f"/{len(eval_dataloader)}" if has_length(eval_dataloader) else ""
        self._update(state, f"evaluation: batch {self._evaluated}{of_all}")

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._evaluated = 0
        self._pace.pause()

    def on_predict(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._evaluated = 0
        self._pace.pause()
        self._erase(state)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._pace.pause()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._has_header = False
        self._erase(state)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or not state.is_world_process_zero:
            return
        row = _Row.of_log(logs, state, self._pace)
        if self._console is None:
            print(row.line, flush=True)
            return
        self._erase(state)
        if row.has_cells and not self._has_header:  # an evaluation outside of training
            self._console.print(_table(self._console.width, header=True))
        if row.has_cells:
            table = _table(self._console.width)
            table.add_row(*row.cells[: len(table.columns)], style="cyan" if row.prefix else "")
            self._console.print(table)
        if text := row.below:
            self._console.print(Text(text))

    def _update(self, state: TrainerState, text: str) -> None:
        """Show what is under way in the line below the table, where whatever is printed next is written over it."""
        console, now = self._console, self._clock()
        if console is None or not state.is_world_process_zero or now < self._updated + _SECONDS_BETWEEN_UPDATES:
            return
        if console.is_terminal and not console.is_dumb_terminal:
            self._erase(state)
            console.print(Text(text, style="dim"), end="\r", no_wrap=True, overflow="crop")
            self._updated = now

    def _erase(self, state: TrainerState) -> None:
        if self._console is not None and state.is_world_process_zero:
            self._console.control(_ERASE_LINE)


class _Pace:
    """How fast training is, from when this object is made."""

    def __init__(self, state: TrainerState, clock: Callable[[], float]) -> None:
        self._clock, self._first_step = clock, state.global_step
        self._anchor = state.global_step, clock()  # where the mean pace is counted from
        self._counted_at: float | None = clock()
        self._seconds, self._tokens = 0.0, state.num_input_tokens_seen  # since the last log
        self._all_seconds, self._first_tokens = 0.0, state.num_input_tokens_seen

    def begin_step(self, state: TrainerState) -> None:
        if state.global_step == self._first_step + 1:
            self._anchor = state.global_step, self._clock()
        if self._counted_at is None:
            self._counted_at = self._clock()

    def count(self) -> None:
        """Add the time since the last call, unless training has paused."""
        if self._counted_at is not None:
            now = self._clock()
            self._seconds += now - self._counted_at
            self._all_seconds += now - self._counted_at
            self._counted_at = now

    def pause(self) -> None:
        """Leave the time out until the next step."""
        self._counted_at = None

    def tokens_per_second(self, state: TrainerState) -> int | None:
        """Return the mean since the last call."""
        self.count()
        tokens, seconds = state.num_input_tokens_seen - self._tokens, self._seconds
        self._tokens, self._seconds = state.num_input_tokens_seen, 0.0
        return round(tokens / seconds) if tokens > 0 and seconds > 0 else None

    def mean_tokens_per_second(self, state: TrainerState) -> int | None:
        tokens = state.num_input_tokens_seen - self._first_tokens
        return round(tokens / self._all_seconds) if tokens > 0 and self._all_seconds > 0 else None

    def time_left(self, state: TrainerState) -> str | None:
        step, since = self._anchor
        if state.global_step <= step or state.max_steps <= 0:
            return None
        seconds_per_step = (self._clock() - since) / (state.global_step - step)
        return duration(seconds_per_step * max(state.max_steps - state.global_step, 0))


@dataclass(frozen=True)
class _Row:
    """A log in the terms of the table.

    Attributes:
        prefix: of the log's names: none for steps, `eval_` or another for an evaluation, `train_` at the end.
        figures: what the table shows, by `_COLUMNS`.
        rest: what else was logged, by the trainer's names.
    """

    step: str
    prefix: str
    figures: dict[str, Any]
    rest: dict[str, Any]

    @classmethod
    def of_log(cls, logs: Mapping[str, Any], state: TrainerState, pace: _Pace) -> _Row:
        prefix = next((name.removesuffix("runtime") for name in logs if name.endswith("_runtime")), "")
        names = {f"{prefix}loss": "loss"}
        if prefix != _END:
            names |= {f"{prefix}rewards/margins": "margin", f"{prefix}rewards/accuracies": "accuracy"}
        figures = {column: logs[name] for name, column in names.items() if name in logs}
        if prefix == _END:
            figures["tokens_per_second"] = pace.mean_tokens_per_second(state)
        elif "loss" in logs:
            figures |= {"tokens_per_second": pace.tokens_per_second(state), "time_left": pace.time_left(state)}
        figures = {column: value for column, value in figures.items() if value is not None}
        rest = {name: value for name, value in logs.items() if name not in {*names, "total_flos"}}
        return cls(_step(state), prefix, figures, rest)

    @property
    def has_cells(self) -> bool:
        return "loss" in self.figures and self.prefix != _END

    @property
    def cells(self) -> list[str]:
        figures = (
            format(self.figures[name], how) if name in self.figures else "" for name, (_, how) in _COLUMNS.items()
        )
        return [f"{self.step} {self.prefix.rstrip('_')}", *figures]

    @property
    def line(self) -> str:
        """Everything, as pairs that `shlex.split` takes apart."""
        figures = {f"{self.prefix}{column}": value for column, value in self.figures.items()}
        return _pairs({"step": self.step, **figures, **self.rest})

    @property
    def below(self) -> str:
        """What the table has no column for: the end, figures of a user's own."""
        if self.prefix == _END:
            figures = [f"mean loss {self.figures['loss']:.4f}"]
            if "tokens_per_second" in self.figures:
                figures.append(f"{self.figures['tokens_per_second']:,} tokens/s")
            return f"Step {self.step} after {duration(self.rest['train_runtime'])}: {', '.join(figures)}."
        if not self.has_cells:
            return self.line
        known = {f"{self.prefix}{name}" for name in _OF_AN_EVALUATION} | {"epoch"}
        return _pairs({name: value for name, value in self.rest.items() if self.prefix and name not in known})


def _table(room: int, header: bool = False) -> Table:
    """Return an empty part of the table, with the columns that fit into `room`; those of all parts are as wide."""
    table = Table(box=box.SIMPLE_HEAD, show_header=header, show_edge=False, pad_edge=False)
    table.add_column("step", width=_STEP_WIDTH, no_wrap=True)
    for title, _ in list(_COLUMNS.values())[: (room - _STEP_WIDTH) // (_WIDTH + 3)]:  # three spaces between columns
        table.add_column(title, width=_WIDTH, justify="right", no_wrap=True)
    return table


def _step(state: TrainerState) -> str:
    return f"{state.global_step}/{state.max_steps}" if state.max_steps > 0 else str(state.global_step)


def _pairs(values: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return f"{value:.6g}" if isinstance(value, float) else shlex.quote(str(value))

    return " ".join(f"{name}={text(value)}" for name, value in values.items())
