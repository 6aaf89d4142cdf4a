"""The benchmarks run, check what they time, and write what the README quotes from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from families import tiny_model, tiny_tokenizer
from preferences import pairs
from repository import BENCHMARKS
from suite.training import speed


def test_layout_benchmark_runs_and_writes_its_result(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "run.py"), "layout", "--size", "tiny", "--steps", "3"]
    command += ["--batch_size", "3", "--max_length", "200", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    last = json.loads(run.stdout.strip().splitlines()[-1])
    result = json.loads(Path(last["file"]).read_text())
    shared, padded = (result["layouts"][name]["losses"] for name in ("shared", "padded"))
    assert last["speedup"] == result["speedup"] > 0
    assert len(shared) == 4 and shared == pytest.approx(padded, rel=1e-3)
    assert result["environment"]["versions"]["torch"] and Path(last["file"]).with_suffix(".png").stat().st_size > 1000


def test_store_benchmark_runs_and_writes_its_result(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "run.py"), "store", "--rows", "50000", "--repeats", "1"]
    run = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    last = json.loads(run.stdout.strip().splitlines()[-1])
    assert json.loads(Path(last["file"]).read_text())["sizes"]["50000"]["first_open_seconds"] > 0


def test_rounding_benchmark_finds_packed_log_probs_as_near_to_fp32_as_padded_ones(tmp_path):
    model = tmp_path / "model"
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    pairs(12).to_json(tmp_path / "pairs.jsonl")
    command = [sys.executable, str(BENCHMARKS / "run.py"), "rounding", "--model", str(model), "--batches", "3"]
    command += ["--dataset", str(tmp_path / "pairs.jsonl"), "--batch_size", "4", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    last = json.loads(run.stdout.strip().splitlines()[-1])
    errors = last["error_of_a_completion_nat"]
    assert 0 < errors["packed"] <= 2 * errors["padded"] + 1e-4
    between = json.loads(Path(last["file"]).read_text())["between_batch_and_alone"]
    assert between["packed"]["loss"] == pytest.approx(0.05 * between["packed"]["margin_nat"] / 2)


@pytest.mark.slow  # two processes with TRL
def test_curves_benchmark_runs_and_writes_its_result(tmp_path):
    model = tmp_path / "model"
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    pairs(24).to_json(tmp_path / "pairs.jsonl")
    command = [sys.executable, str(BENCHMARKS / "run.py"), "curves", "--model", str(model), "--steps", "6"]
    command += ["--dataset", str(tmp_path / "pairs.jsonl"), "--learning_rate", "1e-3", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    last = json.loads(run.stdout.strip().splitlines()[-1])
    curves = json.loads(Path(last["file"]).read_text())["curves"]
    ours, theirs = (curves[name]["losses"] for name in ("dpo_fast", "trl"))
    assert len(ours) == 6 and ours == pytest.approx(theirs, rel=1e-3) and len(set(ours)) == 6
    assert Path(last["file"]).with_suffix(".png").stat().st_size > 1000


def test_a_side_that_computes_something_else_is_not_timed():
    reports = {"dpo_fast": {"losses": [0.69, 0.5]}, "trl": {"losses": [0.69, 0.6]}}
    with pytest.raises(SystemExit, match="step 1"):
        speed._check_losses(reports, 1e-3)
    speed._check_losses(reports, 0.2)


def test_quoted_figures_are_in_the_results():
    """The speed-up in the README is that of a result file, and its spread is in there too."""
    path = max((BENCHMARKS / "results").glob("*train-full-fp32-len512-b4-vs-trl*.json"))  # the newest
    result = json.loads(path.read_text())
    readme = (BENCHMARKS.parent / "README.md").read_text()
    assert f"{result['speedup']:.2f}×" in readme and f"{result['memory_ratio']:.2f}×" in readme
    assert result["largest_loss_difference"] < 1e-3
    assert result["speedup_per_step"]["p20"] <= result["speedup_per_step"]["p80"]
