"""A signal ends a run with what is done kept, one line and status 128 + its number; a closed pipe ends output alone."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

from dpo_fast import cli
from dpo_fast.commands import train
from dpo_fast.commands.streams import keep_output_going

FLAGS = (
    *("train", "--model", "model", "--dataset", "rows.jsonl", "--use_cpu", "--max_length", "64", "--report_to", "none"),
    *("--per_device_train_batch_size", "4", "--max_steps", "8", "--logging_steps", "1", "--learning_rate", "1e-3"),
)


class _Raises(TrainerCallback):
    """Sends signals to this process while a step runs."""

    def __init__(self, step: int, numbers: list[int]):
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for number in self.numbers:
                signal.raise_signal(number)


computed: list[int] = []  # reference log-probs of each run whose trainer was made


def run(monkeypatch, *flags: str, signals: tuple[int, ...] = (), step: int = 3) -> int:
    make_trainer = train.make_trainer

    def with_signals(*args):
        trainer = make_trainer(*args)
        if trainer.reference is not None:
            computed.append(trainer.reference.store.computed)
        trainer.add_callback(_Raises(step, list(signals)))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_trainer", with_signals)
        return cli.main([*FLAGS, *flags])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_after_the_step_with_a_checkpoint_to_resume(folder, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    assert run(monkeypatch, "--output_dir", "whole") == 0
    assert run(monkeypatch, "--output_dir", "stopped", signals=(number,)) == 128 + number
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith(f"dpo-fast: stopped by {signal.Signals(number).name}; 4 of 8 steps are done")
    assert last.endswith("--resume_from_checkpoint stopped/checkpoint-4") and "Traceback" not in err
    assert "Saved the model to stopped" not in out and not Path("stopped/model.safetensors").exists()
    assert run(monkeypatch, "--output_dir", "stopped", "--resume_from_checkpoint", "stopped/checkpoint-4") == 0
    whole, resumed = (load_file(f"{name}/model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert signal.getsignal(number) is before, "handlers are those of the caller again"


def test_no_checkpoint_is_written_where_none_was_asked_for(folder, monkeypatch, capsys):
    assert run(monkeypatch, "--output_dir", "run", "--save_strategy", "no", signals=(signal.SIGTERM,)) == 143
    assert "4 of 8 steps are done; no checkpoint was asked for" in capsys.readouterr().err
    assert not list(Path().glob("run/checkpoint-*"))


def test_a_second_signal_ends_the_run_at_once(folder, monkeypatch, capsys):
    assert run(monkeypatch, "--output_dir", "run", signals=(signal.SIGTERM, signal.SIGINT)) == 130
    assert "stopped by SIGINT" in capsys.readouterr().err and not list(Path().glob("run/checkpoint-*"))


def test_a_signal_in_the_reference_pass_keeps_what_is_computed(folder, monkeypatch, capsys):
    from dpo_fast.reference.reference import Reference

    score, calls = Reference.score, []

    def stop_later(self, packed):
        calls.append(packed.num_tokens)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return score(self, packed)

    monkeypatch.setattr(Reference, "score", stop_later)
    small = ("--max_tokens_per_micro_batch", "100", "--output_dir", "run")
    assert run(monkeypatch, *small) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "dpo-fast: stopped by SIGTERM; what was computed is kept"
    monkeypatch.setattr(Reference, "score", score)
    assert run(monkeypatch, *small) == 0
    assert 0 < computed[-1] < 60, "what ran before the signal runs once"


def test_output_outlives_its_reader_and_its_encoding(monkeypatch):
    reading, writing = os.pipe()
    stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(writing, "w")), encoding="ascii", line_buffering=True)
    monkeypatch.setattr(sys, "stdout", stream)
    keep_output_going()
    print("3 rows → 2 groups")
    assert os.read(reading, 100) == b"3 rows \\u2192 2 groups\n"
    os.close(reading)
    for _ in range(3):
        print("nobody reads this")
    assert sys.stdout.fileno() == writing and not sys.stdout.isatty()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:659] . PytorchStreamWriter failed writing file data/7"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_costs_one_line(folder, monkeypatch, capsys, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.Trainer._save", fail)
    assert run(monkeypatch, "--output_dir", "run") == 2
    assert "output_dir='run': the disk is full" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_closed_pipe_ends_output_and_not_training(folder, encoding):
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [str(Path(sys.executable).with_name("dpo-fast")), *FLAGS, "--output_dir", "run"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read().decode(encoding)
    assert process.returncode == 0 and "Traceback" not in err and "BrokenPipe" not in err, err
    assert Path("run/model.safetensors").exists()
