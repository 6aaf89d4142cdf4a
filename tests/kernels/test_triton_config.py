"""A kernel's configuration comes from its table, and from a timing only when the user asks for one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="configurations are Triton's")

from dpo_fast_kernels import _triton

TABLE = {8: {"BLOCK": 1}, 9: {"BLOCK": 2}}
CANDIDATES = [{"BLOCK": 2}, {"BLOCK": 3}, {"BLOCK": 4}, {"BLOCK": 5}]
SECONDS = {2: 7.0, 3: 5.0, 4: 9.0}


@pytest.fixture
def gpu(monkeypatch):
    """A device of the newest row, on which a configuration of 5 does not fit; yields what was timed."""
    timed = []

    def bench(run):
        block = run()
        timed.append(block)
        if block not in SECONDS:
            raise _triton.triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return SECONDS[block]

    monkeypatch.setattr(_triton.triton.testing, "do_bench", bench)
    monkeypatch.setattr(_triton, "major_capability", lambda device: 12)
    monkeypatch.setattr(_triton, "_tuned", {})
    return timed


def pick(device="cuda", kind="bf16"):
    device = torch.device(device)
    return _triton.pick_config("kernel", kind, TABLE, CANDIDATES, device, lambda config: config["BLOCK"])


def test_the_table_answers_and_nothing_is_timed(gpu, monkeypatch):
    monkeypatch.delenv("DPO_FAST_AUTOTUNE", raising=False)
    assert pick() == TABLE[9], "an architecture newer than the table takes its last row"
    monkeypatch.setattr(_triton, "major_capability", lambda device: 8)
    assert pick() == TABLE[8]
    assert gpu == []


def test_tuning_times_every_candidate_once_and_prints_the_row(gpu, monkeypatch, capsys):
    monkeypatch.setenv("DPO_FAST_AUTOTUNE", "1")
    assert pick() == pick() == {"BLOCK": 3}
    assert gpu == [2, 3, 4, 5], "the table's row and every other candidate, once"
    assert capsys.readouterr().out == "kernel bf16: 12: {'BLOCK': 3},  # 5.000 ms\n"
    pick(kind="fp16")
    assert len(gpu) == 8, "another kind of input is another choice"


def test_the_interpreter_is_never_tuned(gpu, monkeypatch):
    monkeypatch.setenv("DPO_FAST_AUTOTUNE", "1")
    assert pick("cpu") == TABLE[9] and gpu == []
