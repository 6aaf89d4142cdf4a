"""A person sees a table that grows on a terminal, and `key=value` lines elsewhere; dictionaries and warnings nowhere.

Also promised: figures are right (tokens per second of training alone, time left, steps after a resume), one process
speaks, the user's own callbacks and the log history stay as they are, and whoever removes transformers' callback
removes this one.
"""

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys

import pytest
import torch
from datasets import IterableDataset
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState

from dpo_fast.reference.progress import SECONDS_BETWEEN_LINES, duration, show_pass
from dpo_fast.training.progress import TrainingProgress
from families import tiny_model, tiny_tokenizer
from preferences import logged, make_trainer, pairs

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def parsed(text):
    """The pairs of each line that begins with a step."""
    lines = [line for line in text.splitlines() if line.startswith("step=")]
    return [dict(pair.split("=", 1) for pair in shlex.split(line)) for line in lines]


def progress_of(trainer):
    (found,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, TrainingProgress))
    return found


class Run:
    """Calls a callback as a trainer would, with a clock of its own."""

    def __init__(self, console=None, max_steps=10, step=0, tokens=0, is_first=True):
        self.now = 0.0
        self.state = TrainerState(
            max_steps=max_steps, global_step=step, num_input_tokens_seen=tokens, is_world_process_zero=is_first
        )
        self.progress = TrainingProgress(console, clock=lambda: self.now)
        self("train_begin")

    def __call__(self, event, **values):
        getattr(self.progress, f"on_{event}")(None, self.state, None, **values)

    def steps(self, count, seconds, tokens=0):
        for _ in range(count):
            self("step_begin")
            self.now += seconds
            self.state.global_step += 1
            self.state.num_input_tokens_seen += tokens
            self("step_end")

    def log(self, **values):
        self("log", logs={"loss": 0.5, "rewards/margins": -0.25, "rewards/accuracies": 0.75, **values})

    def evaluate(self, seconds, prefix="eval", **values):
        self.now += seconds
        self("prediction_step", eval_dataloader=[0, 0])
        names = {f"{prefix}_loss": 0.625, f"{prefix}_rewards/margins": 0.125, f"{prefix}_rewards/accuracies": 0.875}
        self("log", logs={**names, f"{prefix}_runtime": float(seconds), **values})
        self("evaluate")


@pytest.fixture(autouse=True)
def environment_that_rich_reads(monkeypatch):
    monkeypatch.setattr(Console, "_environ", os.environ)  # which datasets replaces by a copy when it starts processes


# ---- lines ----


def test_lines_of_a_training_are_pairs_and_hold_every_log(tmp_path, capsys):
    trainer = make_trainer(tmp_path, eval_dataset=pairs(4, seed=1), eval_strategy="steps", eval_steps=2)
    trainer.train()
    out = capsys.readouterr().out
    assert "{" not in out
    rows = parsed(out)
    assert [row["step"] for row in rows] == ["1/3", "2/3", "2/3", "3/3", "3/3", "3/3"]
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    for shown, key in (("loss", "loss"), ("margin", "rewards/margins"), ("accuracy", "rewards/accuracies")):
        assert [float(row[shown]) for row in steps] == pytest.approx(logged(trainer, key), rel=1e-5)
        held_out = [float(row[f"eval_{shown}"]) for row in evaluations]
        assert held_out == pytest.approx(logged(trainer, f"eval_{key}"), rel=1e-5)
    for row, log in zip(rows, trainer.state.log_history, strict=True):
        assert {"step", *row} >= {*log} - {"loss", "total_flos"} - {
            f"{prefix}rewards/{name}" for prefix in ("", "eval_") for name in ("margins", "accuracies")
        }
    assert list(steps[0])[:6] == ["step", "loss", "margin", "accuracy", "tokens_per_second", "time_left"]
    assert "train_runtime" in rows[-1] and float(rows[-1]["train_loss"]) > 0


def test_speed_leaves_evaluations_and_checkpoints_out_and_the_first_step_is_not_the_pace(capsys):
    run = Run()
    run.steps(1, seconds=50, tokens=500)
    run.log()
    run.steps(1, seconds=2, tokens=500)
    run.evaluate(seconds=100)
    run.steps(1, seconds=3, tokens=500)
    run.now += 1000
    run("save")
    run.steps(1, seconds=5, tokens=500)
    run.log()
    first, _, second = parsed(capsys.readouterr().out)
    assert (first["tokens_per_second"], first["time_left"]) == ("10", "0:07:30")
    assert second["tokens_per_second"] == str(1500 // 10)
    assert second["time_left"] == duration((2 + 100 + 3 + 1000 + 5) / 3 * 6) == "0:37:00"
    run("log", logs={"train_runtime": 1160.0, "train_loss": 0.5})
    (last,) = parsed(capsys.readouterr().out)
    assert last["train_tokens_per_second"] == str(round(2000 / 60))


def test_a_resumed_run_counts_on_and_its_speed_is_its_own(capsys):
    run = Run(step=6, tokens=10**6)
    run.steps(2, seconds=1, tokens=100)
    run.log()
    (row,) = parsed(capsys.readouterr().out)
    assert (row["step"], row["tokens_per_second"], row["time_left"]) == ("8/10", "100", "0:00:02")


def test_time_left_is_missing_where_the_number_of_steps_is_not_known(capsys):
    run = Run(max_steps=0)
    run.steps(2, seconds=1, tokens=100)
    run.log()
    (row,) = parsed(capsys.readouterr().out)
    assert row["step"] == "2" and "time_left" not in row and row["tokens_per_second"] == "100"


def test_a_trainer_goes_on_from_its_checkpoint(tmp_path, capsys):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    capsys.readouterr()
    make_trainer(tmp_path, max_steps=4, resume_changed=["max_steps"]).train(resume_from_checkpoint=True)
    assert [row["step"] for row in parsed(capsys.readouterr().out)] == ["3/4", "4/4", "4/4"]


def test_a_stream_is_shown_too(tmp_path, capsys):
    rows = pairs(12)
    make_trainer(tmp_path, IterableDataset.from_generator(lambda: iter(rows))).train()
    (*steps, last) = parsed(capsys.readouterr().out)
    assert [row["step"] for row in steps] == ["1/3", "2/3", "3/3"] and steps[-1]["time_left"] == "0:00:00"
    assert "train_loss" in last


def test_what_else_is_logged_is_shown_and_can_be_taken_apart(capsys):
    run = Run()
    run("log", logs={"note": "two words", "flag": True, "count": 12345678, "rate": 1.5e-7})
    (row,) = parsed(capsys.readouterr().out)
    assert row == {"step": "0/10", "note": "two words", "flag": "True", "count": "12345678", "rate": "1.5e-07"}


@pytest.mark.parametrize("console", [None, Console(file=io.StringIO(), force_terminal=True, width=100)])
def test_other_processes_say_nothing(capsys, console):
    run = Run(console, is_first=False)
    run.steps(2, seconds=1)
    run.log()
    run.evaluate(seconds=1)
    run("train_end")
    assert capsys.readouterr().out == "" and (console is None or console.file.getvalue() == "")


# ---- the table ----


@pytest.fixture
def console():
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def screen(console):
    """The lines that a terminal shows after what was written to it."""
    text = ESCAPES.sub("", console.file.getvalue().replace("\x1b[2K", "\x00"))
    lines = [""]
    for part in re.split("(\x00|\r|\n)", text):
        if part == "\n":
            lines.append("")
        elif part == "\x00":
            lines[-1] = ""
        elif part not in ("\r", ""):
            lines[-1] = part + lines[-1][len(part) :]
    return [line.rstrip() for line in lines]


def test_the_table_grows_by_a_line_for_each_log(console):
    run = Run(console, max_steps=1000)
    head = screen(console)
    assert head[0].split() == ["step", "loss", "margin", "accuracy", "tokens/s", "time", "left"]
    for count in (1, 2, 3):
        run.steps(2, seconds=1, tokens=10_000)
        run.log()
        assert [len(screen(console)), *screen(console)[:2]] == [len(head) + count, *head[:2]]
    assert screen(console)[4].split() == ["6/1000", "0.5000", "-0.2500", "0.750", "10,000", "0:16:34"]
    run.evaluate(seconds=1)
    assert screen(console)[5].split() == ["6/1000", "eval", "0.6250", "+0.1250", "0.875"]
    ends = {len(line) for line in screen(console)[2:5]} | {len(head[0])}
    assert len(ends) == 1, "columns stand below each other"


def test_the_line_below_the_table_says_what_goes_on(console):
    run = Run(console)
    run.steps(3, seconds=1)
    assert screen(console)[-1] == "3/10  0:00:07 left"
    run("log", logs={"a": 1})
    assert screen(console)[-2:] == ["step=3/10 a=1", ""], "nothing stays of the line"
    run.now += 1
    run("prediction_step", eval_dataloader=[0] * 8)
    assert screen(console)[-1] == "evaluation: batch 1/8"
    run("train_end")
    assert screen(console)[-1] == ""


def test_the_line_below_is_written_at_most_ten_times_per_second(console):
    run = Run(console)
    before = len(console.file.getvalue())
    run.steps(100, seconds=0.01)
    assert console.file.getvalue()[before:].count("left") in (9, 10, 11)


def test_a_terminal_without_cursor_gets_whole_lines_only(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    run = Run(console)
    run.steps(2, seconds=1)
    run.log()
    assert "\r" not in console.file.getvalue() and len(console.file.getvalue().splitlines()) == 3


def test_the_end_and_metrics_of_the_user_stand_below_the_table(console):
    run = Run(console)
    run.steps(10, seconds=1, tokens=1500)
    run.evaluate(seconds=1, eval_f1=0.25, eval_entropy=3.0, epoch=1.0)
    run("log", logs={"train_runtime": 3725.0, "train_loss": 0.61, "total_flos": 1e9})
    *_, own, end, _ = screen(console)
    assert own == "eval_f1=0.25" and end == "Step 10/10 after 1:02:05: mean loss 0.6100, 1,500 tokens/s."


def test_an_evaluation_outside_of_training_has_a_head_and_its_name(console):
    run = Run(console)
    run("train_end")
    before = len(screen(console))
    run.evaluate(seconds=1, prefix="eval_other")
    head, rule, row = screen(console)[before - 1 : before + 2]
    assert head.startswith("step") and set(rule) == {"─"}
    assert row.split()[:3] == ["0/10", "eval_other", "0.6250"]


def test_a_narrow_terminal_gets_the_first_columns_whole():
    console = Console(file=io.StringIO(), force_terminal=True, width=57)
    run = Run(console)
    run.steps(1, seconds=1)
    run.log()
    assert screen(console)[0].split() == ["step", "loss", "margin", "accuracy"]
    assert screen(console)[2].split() == ["1/10", "0.5000", "-0.2500", "0.750"]


# ---- which of them, and for whom ----


@pytest.mark.parametrize(
    ("is_terminal", "disable_tqdm", "has_table"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_table_is_for_terminals_where_bars_are_wanted(tmp_path, monkeypatch, is_terminal, disable_tqdm, has_table):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    trainer = make_trainer(tmp_path, disable_tqdm=disable_tqdm)
    assert (progress_of(trainer)._console is not None) == has_table
    own = [c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback | PrinterCallback)]
    assert own == [progress_of(trainer)]


@pytest.mark.parametrize("removed", [PrinterCallback, ProgressCallback, TrainingProgress])
@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_who_removes_a_callback_of_transformers_removes_this_one(tmp_path, capsys, removed, disable_tqdm):
    trainer = make_trainer(tmp_path, disable_tqdm=disable_tqdm)
    trainer.remove_callback(removed)
    trainer.remove_callback(removed)  # nothing is left, and nothing is said
    trainer.train()
    out, err = capsys.readouterr()
    assert out == "" and "it/s" not in err
    assert len(logged(trainer, "loss")) == 3


def test_callbacks_and_history_of_the_user_stay(tmp_path, capsys):
    class Own(PrinterCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            print("own", sorted(logs))

    class Other(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    seen = []
    trainer = make_trainer(tmp_path)
    reference = make_trainer(tmp_path)
    reference.remove_callback(PrinterCallback)
    capsys.readouterr()
    trainer.add_callback(Own)
    trainer.add_callback(Other())
    trainer.train()
    out = capsys.readouterr().out
    assert out.count("own [") == 4 and len(parsed(out)) == 4
    reference.train()
    assert [sorted(row) for row in trainer.state.log_history] == [sorted(row) for row in reference.state.log_history]
    assert [sorted(row) for row in seen] == [sorted({*row} - {"step"}) for row in trainer.state.log_history]


def test_every_event_that_transformers_shows_something_at_is_ours():
    """A new one there would run code that expects the bars which are not made here."""
    for base in (ProgressCallback, PrinterCallback):
        events = {name for name in vars(base) if name.startswith("on_")}
        assert events and events <= set(vars(TrainingProgress))


# ---- passes over data ----


def test_a_pass_prints_a_line_per_minute_where_there_is_no_terminal(capsys):
    now = [0.0]
    with show_pass("Samples", 10_000, "prompts", clock=lambda: now[0]) as are_done:
        for _ in range(10):
            now[0] += SECONDS_BETWEEN_LINES / 2
            are_done(1000)
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 5
    assert err.splitlines()[0] == "Samples: 2,000 of 10,000 prompts, 0:04:00 left"


@pytest.mark.parametrize(
    ("title", "variables", "is_shown"),
    [
        ("Samples", {}, True),
        (None, {}, False),
        ("Samples", {"TQDM_DISABLE": "1"}, False),
        ("Samples", {"LOCAL_RANK": "1"}, False),
    ],
)
def test_the_bar_of_a_pass_is_silent_where_nobody_wants_it(monkeypatch, capsys, title, variables, is_shown):
    for variable in ("TQDM_DISABLE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    with show_pass(title, 100, "tokens") as have_run:
        have_run(100)
    assert ("Samples" in capsys.readouterr().err) == is_shown


# ---- the command ----


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, rows in (("train", pairs(8)), ("test", pairs(4, seed=1))):
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = """train --model ./model --dataset ./data --max_steps 2 --logging_steps 1 --per_device_train_batch_size 4
        --eval_strategy epoch --save_steps 1 --report_to none --output_dir out --use_peft"""
    environment = {**os.environ, "DPO_FAST_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    return {
        "args": [sys.executable, "-P", "-m", "dpo_fast.cli", *flags.split()],
        "cwd": folder,
        "env": {name: value for name, value in environment.items() if name != "PYTHONWARNINGS"},
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="promises something of machines without a GPU")
def test_a_piped_command_prints_pairs_and_no_warnings(command):
    done = subprocess.run(**command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "{" not in done.stdout and done.stdout.endswith("Saved the model to out.\n")
    rows = parsed(done.stdout)
    assert [row["step"] for row in rows] == ["1/2", "2/2", "2/2", "2/2"] and "eval_loss" in rows[2]
    assert not re.findall(r"(?i).*(?:warn|deprecat|pin_memory|non_blocking).*", done.stderr)
    assert not re.search(r"(?:^|[\r\n]) *\d+%\|", done.stderr), "the bar of a trainer has no name"


@pytest.mark.slow
def test_a_command_on_a_terminal_draws_one_table(command):
    parent, child = pty.openpty()
    process = subprocess.Popen(**command, stdin=child, stdout=child, stderr=child)
    os.close(child)
    text = ""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the terminal is closed
            break
        if not part:
            break
        text += part.decode(errors="replace")
    os.close(parent)
    assert process.wait() == 0, text
    lines = [ESCAPES.sub("", line).split("\r")[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    top = next(i for i, line in enumerate(lines) if line.startswith("step "))
    assert [line.split()[0] for line in lines[top + 2 : top + 5]] == ["1/2", "2/2", "2/2"], lines[top:]
    assert lines[top + 4].split()[1] == "eval" and lines[top + 5].startswith("Step 2/2 after 0:")
    assert sum(line.startswith("step ") for line in lines) == 1 and "{" not in text
