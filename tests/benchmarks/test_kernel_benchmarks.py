"""The benchmarks of operations mark what computes something else, and count products, memory and turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast_kernels.head.gemm import Gemm
from repository import BENCHMARKS
from suite.harness.timing import DTYPES, LIMITS, SIZE_FACTOR, Repeat, Row, relative_error, take_turns
from suite.ops import head
from suite.ops.head_problem import HeadProblem, HeadShape, pair_lengths
from suite.ops.head_providers import MODES, PROVIDERS, set_leaves, solve


@pytest.mark.slow  # a process of its own; what it times, the questions `head` and `rows` check
def test_entry_points_of_pytest_benchmark():
    pytest.importorskip("pytest_benchmark")
    files = [str(BENCHMARKS / f"suite/ops/{name}.py") for name in ("head", "rows")]
    command = [sys.executable, "-Pm", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", "-k", "not trl"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *files], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert int(done.stdout.strip().splitlines()[-1].split()[0]) >= 20, "passed"


@pytest.fixture
def run_head(tmp_path, monkeypatch):
    """Runs the head's benchmark in this process on some providers, and returns its rows and how it ended."""

    def run_head(*providers: str, rows: int = 120) -> tuple[dict, str | None]:
        command = ["run.py", "--shapes", "tiny", "--rows", str(rows), "--repeats", "1", "--providers", *providers]
        monkeypatch.setattr(sys, "argv", [*command, "--dtype", "fp32", "--out", str(tmp_path)])
        ended = None
        try:
            head.main()
        except SystemExit as error:
            ended = str(error)
        (path,) = tmp_path.glob("*_head-fp32.json")
        (problem,) = json.loads(path.read_text())["problems"]
        return {(row["provider"], row["mode"]): row for row in problem["table"]}, ended

    return run_head


def changed(name: str, monkeypatch, change) -> None:
    """Lets a provider's forward return `change(problem, result)`."""
    provider = PROVIDERS[name]

    def prepare(problem, mode):
        candidate = provider.prepare(problem, mode)
        return replace(candidate, forward=lambda forward=candidate.forward: change(problem, forward()))

    monkeypatch.setitem(PROVIDERS, name, replace(provider, prepare=prepare))


@pytest.mark.parametrize("name", ["plain", "preference"])
def test_who_computes_something_else_is_timed_and_marked(name, run_head, monkeypatch):
    changed(name, monkeypatch, lambda problem, loss: loss * 1.001)
    rows, ended = run_head("preference", "plain")
    for mode in ("trainable", "frozen"):
        assert rows[name, mode]["disagrees"] and rows[name, mode]["ms"]["median"] > 0
        assert "loss errs by 1.00e-03" in rows[name, mode]["reason"]
        (other,) = {"preference", "plain"} - {name}
        assert not rows[other, mode]["disagrees"] and rows[other, mode]["percent_of_bare"] > 0
    assert ended == ("disagree or failed, see above: preference" if name == "preference" else None)


def test_an_error_at_the_timed_size_alone_is_found(run_head, monkeypatch):
    small = head.SMALL_ROWS

    def change(problem, loss):
        return loss * 1.01 if problem.rows > small else loss

    changed("kept", monkeypatch, change)
    rows, ended = run_head("kept", rows=small + 1)
    assert "at the timed size" in rows["kept", "trainable"]["reason"]
    assert max(rows["kept", "trainable"]["errors"].values()) <= LIMITS["fp32"]
    assert ended.endswith("kept")


def test_a_peer_that_raises_ends_nobody_else(run_head, monkeypatch):
    def change(problem, loss):
        raise RuntimeError("no such device\nsecond line")

    changed("plain", monkeypatch, change)
    rows, ended = run_head("preference", "plain")
    assert rows["plain", "forward"]["status"] == "failed"
    assert rows["plain", "forward"]["reason"] == "RuntimeError: no such device"
    assert rows["preference", "trainable"]["status"] == "timed" and ended is None


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """What is multiplied from here on: name of the call, shapes and dtypes of its tensors."""
    made = []
    for name in ("logits", "product", "accumulate"):
        original = getattr(Gemm, name)

        def counted(self, *tensors, original=original, name=name, **options):
            made.append((name, [tuple(tensor.shape) for tensor in tensors], [tensor.dtype for tensor in tensors]))
            return original(self, *tensors, **options)

        monkeypatch.setattr(Gemm, name, counted)
    return made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bare_takes_the_products_of_ours_and_no_other(mode, dtype, calls):
    """Same calls, shapes and order, on several tiles."""
    problem = HeadProblem(HeadShape(16, 101), 4000, dtype, torch.device("cpu"))
    ours, per_tile = {"trainable": ("preference", 3), "frozen": ("preference", 2), "forward": ("forward", 1)}[mode]
    found = {}
    for name in (ours, "bare"):
        candidate = PROVIDERS[name].prepare(problem, mode)
        set_leaves(candidate, problem, mode)
        calls.clear()
        candidate.forward()
        found[name] = list(calls)
    assert found["bare"] == found[ours] and len(found[ours]) >= 2 * per_tile


def flop_of(call: tuple) -> int:
    name, shapes, _ = call
    if name == "accumulate":
        (v, h), (n, _), _ = shapes
        return 2 * n * v * h
    (n, k), b = shapes
    return 2 * n * k * (b[0] if name == "logits" else b[1])


OURS = [(name, mode) for name, each in PROVIDERS.items() for mode in each.products if each.ours and name != "fused"]


@pytest.mark.parametrize(("name", "mode"), OURS)
def test_ours_take_as_many_products_as_is_counted(name, mode, calls):
    """Forward and backward together: TFLOP/s are on what is really done."""
    problem = HeadProblem(HeadShape(16, 101), 1500, torch.bfloat16, torch.device("cpu"))
    candidate = PROVIDERS[name].prepare(problem, mode)
    calls.clear()
    solve(candidate, problem, mode)
    product = 2 * 1500 * 16 * 101
    assert sum(map(flop_of, calls)) == PROVIDERS[name].products[mode] * product


@given(st.integers(2, 20_000), st.integers(0, 5))
def test_pairs_fill_the_rows_exactly(rows, seed):
    pairs = pair_lengths(rows, seed)
    assert sum(map(sum, pairs)) == rows and min(map(min, pairs)) >= 1 and all(len(pair) == 2 for pair in pairs)
    assert pairs == pair_lengths(rows, seed)


class TestTurns:
    """Who runs when, and when it ends."""

    def test_everyone_in_turn(self):
        order, rows = [], [Row("a", ""), Row("b", ""), Row("c", "")]

        def run(row):
            order.append(row.provider)
            return Repeat(1.0, 2.0, None)

        take_turns(rows, run, repeats=2, deadline=time.monotonic() + 60)
        assert order == ["a", "b", "c", "c", "b", "a"]
        assert rows[0].spreads()["ms"] == {"median": 3.0, "p20": 3.0, "p80": 3.0, "count": 2}
        assert rows[0].spreads()["peak_bytes"] is None

    def test_one_round_at_least_and_none_past_the_deadline(self):
        row = Row("a", "")
        take_turns([row], lambda row: Repeat(1.0, 0.0, 7), repeats=100, deadline=time.monotonic() - 1)
        assert len(row.repeats) == 1 and row.spreads()["peak_bytes"] == 7

    def test_who_fails_later_loses_his_figures_and_turns(self):
        rows = [Row("a", ""), Row("b", "")]

        def run(row):
            if row.provider == "a" and row.repeats:
                raise ValueError("worn out")
            return Repeat(1.0, 0.0, None)

        take_turns(rows, run, repeats=4, deadline=time.monotonic() + 60)
        assert rows[0].status == "failed" and not rows[0].repeats and len(rows[1].repeats) == 4


def test_peak_memory_is_what_a_repeat_adds():
    """In a process of its own, whose allocator has nothing left over from other tests."""
    program = """if True:
        import torch
        from suite.harness.timing import Stopwatch
        watch, kept = Stopwatch(torch.device("cpu")), torch.ones(1 << 24)
        print(watch.repeat(lambda: kept[:1]).peak_bytes, watch.repeat(lambda: torch.ones(1 << 24)).peak_bytes)
    """
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", program], env=path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, added = run.stdout.split()
    if before == "None":
        pytest.skip("resident memory is not told here")
    assert int(before) < 16 * 2**20 and 60 * 2**20 < int(added) < 96 * 2**20


def test_errors_are_relative_and_nan_never_passes():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    for found in (torch.tensor([3.0, torch.nan]), torch.zeros(3)):
        row = Row("a", "")
        row.check({"loss": relative_error(found, truth)}, "bf16")
        assert row.disagrees and row.record()["disagrees"]
    row = Row("a", "")
    row.check({"loss": 2 * LIMITS["fp32"]}, "fp32", at_size=True)
    assert not row.disagrees and SIZE_FACTOR > 2
