"""Every question of `benchmarks/run.py` runs, and writes a result whose figures add up."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import run
from families import tiny_model, tiny_tokenizer
from preferences import pairs
from repository import BENCHMARKS
from suite.harness.timing import DTYPES, LIMITS
from suite.ops.head_problem import pair_lengths
from suite.ops.head_providers import MODES
from suite.reference import store


@pytest.fixture
def ask(monkeypatch, capfd, tmp_path):
    """Runs a question in this process, and returns what it printed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the processes that a question starts
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path / "cache"))

    def ask(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        capfd.readouterr()
        run.main()
        return capfd.readouterr().out

    return ask


@pytest.fixture
def measure(ask, tmp_path):
    """Runs a question, and returns what it printed and the result that it wrote."""

    def measure(*arguments: str) -> tuple[str, dict]:
        printed = ask(*arguments, "--out", str(tmp_path / "results"))
        (path,) = (tmp_path / "results").glob("*.json")
        result = json.loads(path.read_text())
        assert result["environment"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
        return printed, result

    return measure


@pytest.fixture
def data(tmp_path) -> list[str]:
    """Options that name rows and a model."""
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    pairs(24).to_json(tmp_path / "pairs.jsonl")
    return ["--dataset", str(tmp_path / "pairs.jsonl"), "--model", str(tmp_path / "model")]


def picture(folder: Path) -> bool:
    (path,) = folder.glob("*.png")
    return path.stat().st_size > 1000


@pytest.mark.parametrize("question", run.QUESTIONS)
def test_every_question_explains_its_options(ask, capfd, question):
    with pytest.raises(SystemExit) as end:
        ask(question, "--help")
    printed = capfd.readouterr().out
    assert end.value.code == 0 and f"usage: run.py {question}" in printed and "options:" in printed


@pytest.mark.parametrize(("arguments", "status"), [([], 0), (["--help"], 0), (["spede"], 2)])
def test_without_a_question_all_are_listed(ask, capfd, arguments, status):
    with pytest.raises(SystemExit) as end:
        ask(*arguments)
    assert end.value.code == status and all(question in capfd.readouterr().out for question in ["speed"])


# ---- training ----


def test_speed_and_its_picture(measure, ask, tmp_path, data):
    options = [*data, "--max_length", "40", "--batch_size", "3", "--steps", "2", "--against", "plain"]
    printed, result = measure("speed", *options)
    last = json.loads(printed.splitlines()[-1])
    assert last["pairs_per_second"] == {name: side["pairs_per_second"] for name, side in result["sides"].items()}
    assert result["largest_loss_difference"] < 1e-4 and result["largest_gradient_norm_difference"] < 1e-3
    assert result["speedup"] == result["against"]["plain"]["speedup"] > 0 and not result["does_not_fit"]
    assert result["bare_gemm"]["flops_per_second"] > 1e8 and result["turns"] == "a step each"
    assert result["settings"]["dataset"] == "pairs.jsonl" and set(result["summary"]) <= set(printed.splitlines())
    (written,) = (tmp_path / "results").glob("*.json")
    ask("plot", "speedup", str(written), "--against", "plain", "--out", str(tmp_path / "speedup.png"))
    assert picture(tmp_path)


@pytest.mark.slow  # processes of three trainers, four of each
def test_speed_of_every_side_at_its_fastest(measure, data):
    pytest.importorskip("trl")
    options = ["--synthetic", "hh", *data[2:], "--max_length", "60", "--best", "--global_batch", "2", "--steps", "1"]
    _, result = measure("speed", *options, "--against", "trl", "patch_trl", "plain")
    assert {name: len(trials) for name, trials in result["trials"].items()} == dict.fromkeys(result["sides"], 2)
    for name, side in result["sides"].items():
        fastest = min(result["trials"][name], key=lambda trial: trial["seconds"])
        assert side["setting"]["micro_batch"] == fastest["micro_batch"]
        assert side["setting"]["micro_batch"] * side["setting"]["accumulation"] == 2


def test_growth_is_drawn_with_its_fit(ask, tmp_path):
    """A step takes 1 s and 0.01 s per token, and 2 GiB and 1 MiB per token at the most."""
    files = []
    for tokens in (100, 400, 1000):
        side = {"seconds": [1 + tokens / 100, 1 + tokens / 50], "peak_memory_gib": 2 + 2 * tokens / 1024}
        result = {
            "unique_tokens": [tokens, 2 * tokens],
            "sides": {"dpo_fast": side},
            "environment": {"hardware": "cpu", "date": "2026-11-22", "versions": {"torch": "2.13"}},
            "settings": {"model": "tiny", "precision": "fp32"},
        }
        files.append(tmp_path / f"{tokens}.json")
        files[-1].write_text(json.dumps(result))
    printed = ask("plot", "growth", *map(str, files), "--out", str(tmp_path / "growth.png"))
    found = json.loads(printed.splitlines()[-1])["dpo_fast"]
    assert found["time_fit"] == pytest.approx({"slope": 0.01, "intercept": 1, "r_squared": 1})
    assert found["memory_fit"] == pytest.approx({"slope": 1 / 1024, "intercept": 2, "r_squared": 1})
    assert picture(tmp_path)


@pytest.mark.slow  # two processes with TRL
def test_curves(measure, tmp_path, data):
    _, result = measure("curves", *data, "--steps", "6", "--learning_rate", "1e-3")
    ours, theirs = (result["curves"][name]["losses"] for name in ("dpo_fast", "trl"))
    assert len(ours) == 6 and ours == pytest.approx(theirs, rel=1e-3) and len(set(ours)) == 6
    assert picture(tmp_path / "results")


def test_layout(measure, tmp_path):
    printed, result = measure("layout", "--size", "tiny", "--steps", "3", "--batch_size", "3", "--max_length", "200")
    shared, padded = (result["layouts"][name]["losses"] for name in ("shared", "padded"))
    assert json.loads(printed.splitlines()[-1])["speedup"] == result["speedup"] > 0
    assert len(shared) == 4 and shared == pytest.approx(padded, rel=1e-3)
    assert picture(tmp_path / "results")


def test_rounding_finds_packed_log_probs_as_near_to_fp32_as_padded_ones(measure, data):
    _, result = measure("rounding", *data, "--batches", "3", "--batch_size", "4")
    errors, between = result["error_of_a_completion_nat"], result["between_batch_and_alone"]["packed"]
    assert 0 < errors["packed"] <= 2 * errors["padded"] + 1e-4
    assert between["loss"] == pytest.approx(0.05 * between["margin_nat"] / 2)


def test_bits(ask, tmp_path):
    printed = ask("bits", "--out", str(tmp_path / "bits.jsonl"))
    lines = (tmp_path / "bits.jsonl").read_text().splitlines()
    assert printed.splitlines()[-3:] == lines
    trainings = {line["training"]: line for line in map(json.loads, lines)}
    assert len({line["weights"] for line in trainings.values()}) == len(trainings) == 3
    for name in ("full", "ranked"):
        losses = [float.fromhex(loss) for loss in trainings[name]["losses"]]
        assert len(losses) == 12 and losses[0] == pytest.approx(math.log(2))


# ---- reference ----


@pytest.mark.slow  # three processes, one with TRL
def test_reference(measure, data):
    pytest.importorskip("trl")
    options = ["--pairs", "12", "--slices", "2", "--max_length", "64", "--batch_size", "4"]
    _, result = measure("reference", *data, *options)
    for side in result["sides"].values():
        assert side["pairs"] == 12 and side["pairs_per_second"] == pytest.approx(12 / side["seconds"])
    assert result["second_run_seconds"] > 0


def test_store(measure, monkeypatch):
    monkeypatch.setattr(store, "ASKED", 10_000)  # in the second pass, which is this process's part
    _, result = measure("store", "--rows", "50000", "--repeats", "1")
    size = result["sizes"]["50000"]
    assert size["first_open_seconds"] > 0 and size["peak_mib"] >= size["imports_mib"] > 10
    assert result["second_pass"]["completions"] == 10_000


# ---- operations ----


def checked(measure, ask, folder: Path, *arguments: str) -> tuple[str, dict]:
    """Runs a question of `ops`, whose table is printed last, above its file's name, and by `summary` again."""
    printed, result = measure(*arguments, "--shapes", "tiny", "--repeats", "2")
    assert printed.splitlines()[-1 - len(result["summary"]) : -1] == result["summary"]
    assert set(result["summary"]) <= set(ask("summary", str(folder / "results")).splitlines())
    return printed, result


def timed_rows(problem: dict) -> dict[tuple[str, str], dict]:
    """Returns the rows that were timed, each checked for what holds whatever was measured."""
    rows = {(row["provider"], row["mode"]): row for row in problem["table"]}
    for row in rows.values():
        assert row["status"] in ("timed", "skipped"), row
        assert ("ms" in row) == (row["status"] == "timed") == (not row["reason"])
    timed = {key: row for key, row in rows.items() if row["status"] == "timed"}
    for row in timed.values():
        for part in ("ms", "ms_forward", "ms_backward"):
            assert row[part]["p20"] <= row[part]["median"] <= row[part]["p80"] and row[part]["count"] == 2
        assert row["ms"]["median"] > 0
    return timed


def test_head(measure, ask, tmp_path):
    pytest.importorskip("trl")
    printed, result = checked(measure, ask, tmp_path, "head", "--rows", "300", "--dtype", "bf16")
    (problem,) = result["problems"]
    rows, lengths = timed_rows(problem), pair_lengths(300)
    assert (problem["rows"], problem["completions"]) == (300, 2 * len(lengths))
    assert problem["longest_completion"] == max(map(max, lengths))
    assert {mode for name, mode in rows if name == "bare"} == set(MODES)
    assert {name for name, _ in rows} >= {"preference", "kept", "recomputed", "forward", "trl", "plain"}
    for (name, mode), row in rows.items():
        bare = rows["bare", mode]["ms"]["median"]
        assert row["percent_of_bare"] == pytest.approx(100 * bare / row["ms"]["median"])
        assert row["tflops"] == pytest.approx(row["flop"] / row["ms"]["median"] / 1e9)
        if name not in ("bare", "untiled"):
            assert set(row["errors"]) == set(row["errors_at_size"])
            assert 0 <= max(row["errors"].values()) <= LIMITS["bf16"] == result["limits"]["small problem"]
            assert 0 <= max(row["errors_at_size"].values()) <= result["limits"]["timed size"]
            assert ("d weight" in row["errors"]) == (mode == "trainable")
    product = 2 * 300 * 64 * 2003
    products = {("preference", "trainable"): 3, ("preference", "frozen"): 2, ("recomputed", "trainable"): 4}
    products |= {("trl", "trainable"): 4, ("trl", "frozen"): 3, ("forward", "forward"): 1}
    products |= {("bare", "trainable"): 3, ("bare", "frozen"): 2, ("bare", "forward"): 1}
    assert {key: rows[key]["flop"] / product for key in products} == products
    assert picture(tmp_path / "results")
    if not torch.cuda.is_available():
        assert printed.count("liger-ce: skipped") == 1, "said once, not for every row"


def test_rows(measure, ask, tmp_path):
    options = ["--rows", "97", "--dtypes", "fp32", "fp16", "--providers", "torch", "sequence-torch", "plain"]
    _, result = checked(measure, ask, tmp_path, "rows", *options)
    assert [problem["dtype"] for problem in result["problems"]] == ["fp32", "fp16"]
    passes = {"forward": 1, "backward": 2, "forward+backward": 3, "copy": 2}
    for problem in result["problems"]:
        rows = timed_rows(problem)
        assert {mode for name, mode in rows if name == "torch"} == {"forward", "backward", "forward+backward"}
        copied = rows["copy", "copy"]["gb_per_second"]
        for (name, mode), row in rows.items():
            assert row["bytes"] == passes[mode] * 97 * 2003 * DTYPES[problem["dtype"]].itemsize
            assert row["gb_per_second"] == pytest.approx(row["bytes"] / row["ms"]["median"] / 1e6)
            assert row["percent_of_copy"] == pytest.approx(100 * row["gb_per_second"] / copied)
            assert name == "copy" or 0 <= max(row["errors"].values()) <= LIMITS[problem["dtype"]]
    assert picture(tmp_path / "results")


def test_liger(measure, ask, tmp_path):
    pytest.importorskip("liger_kernel")
    _, result = checked(measure, ask, tmp_path, "liger", "--rows", "120", "--modes", "trainable")
    (problem,) = result["problems"]
    rows = timed_rows(problem)
    assert {name for name, _ in rows} >= {"dpo_fast", "dpo_fast-cached", "liger", "liger-no-reference"}
    assert all(0 <= max(row["errors_at_size"].values()) <= result["limits"]["timed size"] for row in rows.values())


def test_attention(measure, tmp_path):
    printed, result = measure("attention", "--seconds", "0.1", "--device", "cpu")
    assert not result["refused"] and {row["provider"] for row in result["rows"]} > {"plain", "duplicated"}
    flop = {(row["batch"], row["provider"]): row["both_tflop"] for row in result["rows"]}
    for row in result["rows"]:
        ratio = row["both_tflop"] / flop[row["batch"], "plain"]
        assert ratio > 1.1 if row["provider"] == "duplicated" else ratio == pytest.approx(1, rel=0.1)
        assert row["tflop_per_second"] == pytest.approx(1e3 * row["both_tflop"] / row["both_ms"]["median"])
        assert row["provider"] in printed and row["both_tflop"] == pytest.approx(3.5 * row["forward_tflop"])
    assert picture(tmp_path / "results")


def test_quoted_figures_are_in_the_results():
    """The speed-up in the README is that of a result file, and its spread is in there too."""
    path = max((BENCHMARKS / "results").glob("*train-full-fp32-len512-b4-vs-trl*.json"))  # the newest
    result = json.loads(path.read_text())
    readme = (BENCHMARKS.parent / "README.md").read_text()
    assert f"{result['speedup']:.2f}×" in readme and f"{result['memory_ratio']:.2f}×" in readme
    assert result["largest_loss_difference"] < 1e-3
    assert result["speedup_per_step"]["p20"] <= result["speedup_per_step"]["p80"]
