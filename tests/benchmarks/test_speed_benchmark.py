"""The training benchmark compares like with like: every side computes the same loss and gradients in every setting, one
that does not is refused, one that runs out of memory is reported and stops nothing, and figures are counted as said."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dpo_fast.commands.bench.turns import loss_tolerance
from families import VOCAB, tiny_model, tiny_tokenizer
from preferences import pairs, ranked
from repository import BENCHMARKS

PARTS = ("data", "forward", "head", "backward", "optimizer")


@pytest.fixture
def bench():
    """The benchmark's modules."""
    from suite.training import models, plot, probe, providers, setting, side, speed, summary, workloads

    return SimpleNamespace(
        train=speed,
        plot=plot,
        models=models,
        probe=probe,
        providers=providers,
        Setting=setting.Setting,
        side=side,
        summary=summary,
        workloads=workloads,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of two tiny models; what a mixture's configuration says of an auxiliary loss holds for no side."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder / "llama")
    tiny_model("mixtral", num_hidden_layers=2, router_aux_loss_coef=1.0).save_pretrained(folder / "mixtral")
    tiny_tokenizer().save_pretrained(folder / "llama")
    return folder


@pytest.fixture(scope="module")
def model_folder(folders):
    return str(folders / "llama")


@pytest.fixture(autouse=True)
def own_store(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path / "cache"))  # which the side `patch_trl` sets


class _Pipe:
    """Always says to go on."""

    def send(self, what) -> None:
        pass

    def recv(self) -> str:
        return "step"


def trained(bench, provider: str, folder: Path, setting) -> dict:
    """The report of a side that runs in this process."""
    return bench.side._train(bench.providers.PROVIDERS[provider], setting, str(folder), _Pipe())


def tiny_groups(bench, count: int, group_size: int = 2) -> list[dict]:
    return bench.workloads.synthetic_groups("hh", count, group_size=group_size, max_length=60, vocab_size=VOCAB)


# ---- the sides ----

SETTINGS = {
    "same": {"micro_batch": 4},
    "cut": {"micro_batch": 2, "accumulation": 2, "checkpointing": True},
    "lora": {"micro_batch": 4, "lora": True},
    "lora-bf16": {"micro_batch": 2, "accumulation": 2, "lora": True, "precision": "bf16"},
    "three completions": {"micro_batch": 2},
    "mixture": {"micro_batch": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_side_computes_the_same(bench, tmp_path, folders, name):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    from dpo_fast import unpatch_trl

    completions = 3 if name == "three completions" else 2
    comparisons = completions * (completions - 1) // 2
    model = str(folders / ("mixtral" if name == "mixture" else "llama"))
    ours = bench.Setting("dpo_fast", model, steps=2, max_length=60, **SETTINGS[name])
    groups = tiny_groups(bench, ours.rows * ours.all_steps, completions)
    bench.workloads.save_rows(groups, str(tmp_path))
    settings = {"dpo_fast": ours}
    for other in ("patch_trl", "trl", "plain"):
        settings[other] = replace(ours, provider=other, micro_batch=ours.micro_batch * comparisons)
    reports = {}
    for provider, setting in settings.items():
        try:
            reports[provider] = trained(bench, provider, tmp_path, setting)
        finally:
            unpatch_trl()
    exact = ours.precision == "fp32"
    bench.train._check_losses(reports, loss_tolerance(exact, bench.providers.BETA, ours.rows * comparisons))
    tolerance = bench.summary.GRADIENT_TOLERANCE[ours.precision]
    bench.summary.check_values(reports, "gradient_norms", "gradient norm", tolerance)
    gemm = {"flops_per_second": 1e9}
    result = bench.summary.figures(reports, settings, groups, ours.rows, gemm)
    steps = [groups[start : start + ours.rows] for start in range(ours.rows, 3 * ours.rows, ours.rows)]
    assert result["unique_tokens"] == [sum(map(bench.models.unique_tokens, step)) for step in steps]
    shared = {result["sides"][provider]["token_positions"] for provider in ("dpo_fast", "patch_trl")}
    if completions == 2:  # what runs is what is unique, no more
        assert shared == {sum(result["unique_tokens"])}
    assert result["sides"]["trl"]["token_positions"] == result["sides"]["plain"]["token_positions"] > max(shared)
    for side in result["sides"].values():
        assert len(side["losses"]) == len(side["gradient_norms"]) == 4 and len(side["seconds"]) == 2
        assert side["pairs_per_second"] == pytest.approx(2 * ours.rows * comparisons / sum(side["seconds"]))
        assert side["model_flop_utilisation"] > 0 and side["unique_tokens_per_second"] > 0
        assert side["peak_memory_gib"] > 0.1
        assert all(side["seconds_by_part"][part] > 0 for part in PARTS)
    assert result["sides"]["dpo_fast"]["host_syncs"] == 0 < result["sides"]["trl"]["host_syncs"]
    for found in result["against"].values():
        assert found["speedup"] > 0 and found["memory_ratio"] > 0


@pytest.mark.parametrize("changed", ["beta", "learning rate"])
def test_a_side_that_computes_something_else_is_refused(bench, monkeypatch, tmp_path, model_folder, changed):
    """Even where the loss hides it: in the first step it is ln 2 whatever β is."""
    setting = bench.Setting("plain", model_folder, micro_batch=2, steps=1, max_length=60)
    bench.workloads.save_rows(tiny_groups(bench, 6), str(tmp_path))
    reports = {"right": trained(bench, "plain", tmp_path, setting), "again": trained(bench, "plain", tmp_path, setting)}

    def check() -> None:
        bench.train._check_losses(reports, 1e-3)
        bench.summary.check_values(reports, "gradient_norms", "gradient norm", 5e-3)

    check()
    if changed == "beta":
        monkeypatch.setattr(bench.providers, "BETA", 0.2)
    else:
        setting = dataclasses.replace(setting, learning_rate=0.1)
    reports["again"] = trained(bench, "plain", tmp_path, setting)
    with pytest.raises(SystemExit, match="what computes something else is not timed"):
        check()


def test_what_is_not_a_number_is_refused(bench):
    with pytest.raises(SystemExit, match="step 0"):
        bench.train._check_losses({"a": {"losses": [math.nan]}, "b": {"losses": [0.69]}}, 1e-3)


def test_host_reads_are_counted(bench):
    x = torch.arange(4.0)
    with bench.probe.CountHostReads() as reads:
        x[torch.tensor([0, 2])] + x.sum()
        assert reads.count == 0
        x.sum().item(), x.nonzero(), x[x > 1], bool(x[0] == 1)
        assert reads.count == 4
        reads.paused = True
        x.sum().item()
    assert reads.count == 4


class _Sleeps(torch.autograd.Function):
    """The identity, which takes its time forward and backward."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


class _SlowBody(torch.nn.Module):
    def forward(self, x):
        return (_Sleeps.apply(x, 0.04, 0.16),)


class _SlowModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base_model, self.weight = _SlowBody(), torch.nn.Parameter(torch.ones(3))

    def forward(self):
        return _Sleeps.apply(self.base_model(self.weight)[0], 0.05, 0.03).sum()


class _SlowOptimizer(torch.optim.SGD):
    def step(self, closure=None):
        time.sleep(0.06)
        super().step(closure)


def test_time_goes_to_the_part_that_takes_it(bench):
    """Two micro-batches; half of the head's time is in the backward, before the body's."""
    model = _SlowModel()
    optimizer = _SlowOptimizer(model.parameters(), lr=0.1)
    stock = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_
    probe = bench.probe.StepProbe(model)
    probe.open()
    time.sleep(0.12)
    probe.data_ready()
    for _ in range(2):
        loss = model()
        time.sleep(0.01)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    found = probe.close()
    least = {"data": 0.12, "forward": 0.08, "head": 0.16, "backward": 0.32, "optimizer": 0.06, "rest": 0.02}
    assert found["seconds_by_part"].keys() == least.keys()
    for part, seconds in least.items():  # what one part got wrongly, another lacks
        assert found["seconds_by_part"][part] >= seconds, part
    assert (torch.Tensor.backward, torch.nn.utils.clip_grad_norm_) == stock and not model._forward_hooks


# ---- memory ----


def fake_interleaved(bench, monkeypatch, fits) -> list[list]:
    """Replaces what runs sides: seconds of a step grow with the square of the micro-batch; returns what was asked."""
    asked: list[list] = []

    def interleaved(settings, folder):
        asked.append(list(settings))
        for setting in settings:
            if not fits(setting, settings):
                raise bench.side.DoesNotFit(setting.provider, "no memory")
        return [{"seconds": [s.accumulation * s.micro_batch**2.0], "peak_memory_gib": 1} for s in settings]

    monkeypatch.setattr(bench.train, "_interleaved", interleaved)
    return asked


def test_the_fastest_setting_that_fits_is_taken(bench, monkeypatch):
    def fits(setting, beside):
        return setting.micro_batch < (4 if setting.checkpointing else 2)

    asked = fake_interleaved(bench, monkeypatch, fits)
    trials = {}
    fastest = bench.train._fastest(bench.Setting("trl", "model", micro_batch=8), "", trials)
    tried = [(s.micro_batch, s.accumulation, s.checkpointing) for (s,) in asked]
    # 2 does not fit without checkpointing, so 4 and 8 are not tried without; nor 8 with, since 4 does not fit with
    assert tried == [(1, 8, False), (2, 4, False), (2, 4, True), (4, 2, True)]
    assert (fastest.micro_batch, fastest.accumulation, fastest.checkpointing) == (1, 8, False)
    assert fastest.steps == 6 and fastest.watched
    assert [set(trial) & {"seconds", "does_not_fit"} for trial in trials["trl"]] == [
        {"seconds"},
        {"does_not_fit"},
        {"seconds"},
        {"does_not_fit"},
    ]
    fake_interleaved(bench, monkeypatch, lambda setting, beside: False)
    assert bench.train._fastest(bench.Setting("trl", "model", micro_batch=8), "", {}) is None


def test_sides_that_do_not_fit_at_once_run_one_after_the_other(bench, monkeypatch):
    settings = {name: bench.Setting(name, "model", micro_batch=8) for name in ("dpo_fast", "trl", "plain")}
    fake_interleaved(bench, monkeypatch, lambda setting, beside: setting.provider == "dpo_fast" or len(beside) < 3)
    does_not_fit = {}
    reports, turns = bench.train._run(settings, "", does_not_fit)
    assert set(reports) == set(settings) and not does_not_fit and turns.startswith("all steps of one")


def test_a_side_without_memory_is_reported_and_stops_nothing(bench, tmp_path):
    """The plain loop makes logits of all positions; 0.7 GiB do for ours."""
    tiny_model("llama", num_hidden_layers=2, vocab_size=100_000).save_pretrained(tmp_path / "wide")
    options = ["--model", str(tmp_path / "wide"), "--synthetic", "hh", "--max_length", "64", "--batch_size", "8"]
    options += ["--steps", "1", "--against", "plain", "--memory_gib", "0.7"]
    result = run_script(tmp_path, *options)
    assert set(result["sides"]) == {"dpo_fast"} and "allocate memory" in result["does_not_fit"]["plain"]
    assert not result["against"] and result["sides"]["dpo_fast"]["pairs_per_second"] > 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shape '[3]' is invalid"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_errors(bench, error, expected):
    assert bench.side.out_of_memory(error) is expected


# ---- what is trained ----


@pytest.mark.parametrize("name", ["ultrafeedback", "hh", "tldr", "long-prompt"])
def test_lengths_have_the_published_medians(bench, name):
    groups = bench.workloads.synthetic_groups(name, 1000, group_size=2, max_length=100_000, vocab_size=50)
    published = bench.workloads.PUBLISHED[name]
    lengths = zip(*([len(g["prompt_ids"]), *map(len, g["completion_ids"])] for g in groups), strict=True)
    for found, median in zip(lengths, (published.prompt, published.chosen, published.rejected), strict=True):
        # the standard error of a median of 1000 is 1.25 · 0.8 / √1000 of it
        assert statistics.median(found) == pytest.approx(median, rel=0.1)
        assert statistics.stdev(map(math.log, found)) == pytest.approx(0.8, rel=0.1)


def test_synthetic_groups_fit_and_are_the_same_again(bench):
    groups = tiny_groups(bench, 50, group_size=4)
    assert groups == tiny_groups(bench, 50, group_size=4)
    for group in groups:
        assert max(map(len, group["completion_ids"])) + len(group["prompt_ids"]) <= 60
        ids = [*group["prompt_ids"], *(i for completion in group["completion_ids"] for i in completion)]
        assert min(ids) >= 3 and max(ids) < VOCAB
        assert group["comparisons"] == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    expanded = bench.workloads.pairs_of(groups[:1])
    best, *_, worst = groups[0]["completion_ids"]
    assert len(expanded) == 6 and [expanded[2]["chosen_ids"], expanded[2]["rejected_ids"]] == [best, worst]
    with pytest.raises(ValueError, match="max_length=20 is too short for 'long-prompt'"):
        bench.workloads.synthetic_groups("long-prompt", 50, group_size=2, max_length=20, vocab_size=50)


def test_groups_of_a_dataset(bench, tmp_path):
    pairs(12).to_json(tmp_path / "pairs.jsonl")
    ranked(12).to_json(tmp_path / "ranked.jsonl")

    def groups(name: str, count: int, group_size: int) -> list[dict]:
        path = str(tmp_path / f"{name}.jsonl")
        options = {"max_length": 64, "tokenizer": tiny_tokenizer(), "vocab_size": VOCAB}
        return bench.workloads.dataset_groups(path, count, group_size=group_size, **options)

    first = tiny_tokenizer()(pairs(12)[0]["prompt"])["input_ids"]
    found = groups("pairs", 12, 2)
    assert first in [group["prompt_ids"] for group in found] and found[:5] == groups("pairs", 5, 2)
    assert first != found[0]["prompt_ids"], "in an order drawn at random"
    untied = [row for row in ranked(12) if len(set(row["scores"])) == len(row["scores"]) == 3]
    assert untied, "else the next lines prove nothing"
    assert all(len(group["comparisons"]) == 3 for group in groups("ranked", len(untied), 3))
    with pytest.raises(ValueError, match=rf"ranked.jsonl' has {len(untied)} usable groups of 3 completions"):
        groups("ranked", 13, 3)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("smollm2-135m", 134.5),
        ("qwen2.5-0.5b", 494),
        ("qwen2.5-1.5b", 1544),
        ("llama-3.2-1b", 1236),
        ("llama-3-8b", 8030),
    ],
)
def test_random_models_have_the_published_size(bench, name, millions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(bench.models.model_config(name))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.002)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "mixtral"])
def test_flops_are_those_of_the_model(bench, family):
    """Products of one sequence, forward and backward, as PyTorch counts them; in a mixture what tokens visit."""
    model = tiny_model(family)
    model.set_experts_implementation("eager")  # PyTorch does not count the fused one
    group = {"prompt_ids": list(range(3, 20)), "completion_ids": [list(range(3, 26))], "comparisons": []}
    ids = torch.tensor([[*group["prompt_ids"], *group["completion_ids"][0]]])
    with FlopCounterMode(display=False) as counter:
        model.base_model(ids).last_hidden_state.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    body = sum(flops for op, flops in counts.items() if "attention" not in str(op))
    width, heads, layers = 8, 4, model.config.num_hidden_layers
    head = 6 * VOCAB * model.config.hidden_size * 23
    attention = 12 * width * heads * layers * (40 * 41 // 2)
    found = bench.models.step_flops(model.config, [group], frozen=False)
    # a product of 320 FLOP, the angles of positions before transformers 5.19, is left out
    assert found == pytest.approx(body + head + attention, rel=1e-4)
    frozen = bench.models.step_flops(model.config, [group], frozen=True)
    assert frozen == pytest.approx((body + head) * 4 / 6 + attention, rel=1e-4)
    # two completions attend to one prompt, which attends once: 3 + 2 · (2 · 3 + 6) pairs
    group = {"prompt_ids": [3, 4], "completion_ids": [[5, 6, 7], [8, 9, 10]]}
    assert bench.models._attended_pairs(group) == 27 and bench.models.unique_tokens(group) == 8


# ---- the script and its plots ----


def run_script(folder: Path, *options: str) -> dict:
    """Runs the benchmark; returns the result file that it wrote."""
    command = [sys.executable, str(BENCHMARKS / "run.py"), "speed", *options, "--out", str(folder / "results")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert run.returncode == 0, run.stderr[-2000:]
    (path,) = (folder / "results").glob("*.json")
    result = json.loads(path.read_text())
    last = json.loads(run.stdout.strip().splitlines()[-1])
    assert last["pairs_per_second"] == {name: side["pairs_per_second"] for name, side in result["sides"].items()}
    return result


def test_benchmark_runs_and_writes_its_result(bench, tmp_path, model_folder):
    pairs(24).to_json(tmp_path / "pairs.jsonl")
    options = ["--dataset", str(tmp_path / "pairs.jsonl"), "--model", model_folder, "--max_length", "40"]
    result = run_script(tmp_path, *options, "--batch_size", "3", "--steps", "2", "--against", "plain")
    assert result["largest_loss_difference"] < 1e-4 and result["largest_gradient_norm_difference"] < 1e-3
    assert result["speedup"] == result["against"]["plain"]["speedup"] > 0
    assert result["bare_gemm"]["flops_per_second"] > 1e8 and result["environment"]["versions"]["torch"]
    assert result["settings"]["dataset"] == "pairs.jsonl" and result["turns"] == "a step each"
    bench.plot.draw_speedup([result], "plain", tmp_path / "speedup.png")
    assert (tmp_path / "speedup.png").stat().st_size > 1000


@pytest.mark.slow
def test_best_against_best_of_every_side(tmp_path, model_folder):
    pytest.importorskip("trl")
    options = ["--synthetic", "hh", "--model", model_folder, "--max_length", "60", "--best", "--global_batch", "2"]
    result = run_script(tmp_path, *options, "--steps", "1", "--against", "trl", "patch_trl", "plain")
    assert {name: len(trials) for name, trials in result["trials"].items()} == dict.fromkeys(result["sides"], 2)
    for name, side in result["sides"].items():
        fastest = min(result["trials"][name], key=lambda trial: trial["seconds"])
        assert side["setting"]["micro_batch"] == fastest["micro_batch"]
        assert side["setting"]["micro_batch"] * side["setting"]["accumulation"] == 2


@pytest.mark.slow
def test_a_random_model_of_a_real_shape_trains(tmp_path):
    options = ["--synthetic", "tldr", "--model", "smollm2-135m", "--max_length", "128", "--batch_size", "1"]
    result = run_script(tmp_path, *options, "--steps", "1", "--against", "plain", "--precision", "bf16", "--lora")
    assert result["sides"]["dpo_fast"]["losses"][0] == pytest.approx(math.log(2), abs=2e-3)


def test_a_grid_is_all_combinations(bench):
    base = ["--synthetic", "hh"]
    points = bench.train.parse([*base, "--grid", "max_length=512,1024", "lora=no,yes", "model=llama-3.2-1b"]).points
    assert len(points) == 4
    assert points[1] == {"max_length": 512, "lora": True, "model": "llama-3.2-1b"}
    assert bench.train.parse(base).points == [{}]
    for wrong in ("steps=3", "lora=maybe", "max_length=0", "batch_size", "synthetic=mine"):
        with pytest.raises(SystemExit):
            bench.train.parse([*base, "--grid", wrong])


def test_a_line_is_fitted(bench):
    x = [1000.0, 2000.0, 5000.0, 10000.0]
    exact = bench.plot.linear_fit(x, [0.5 + 3e-4 * a for a in x])
    assert exact.slope == pytest.approx(3e-4) and exact.intercept == pytest.approx(0.5)
    assert exact.r_squared == pytest.approx(1)
    # y = x² on 0, 1, 2, 3: slope 3, intercept −1, residuals 1, −1, −1, 1 of a variance of 49
    curved = bench.plot.linear_fit([0, 1, 2, 3], [0, 1, 4, 9])
    assert curved == bench.plot.Line(3, -1, pytest.approx(1 - 4 / 49))
    for few in ([1.0, 2.0], [3.0, 3.0, 3.0]):
        with pytest.raises(ValueError, match="too few different points"):
            bench.plot.linear_fit(few, few)


def made_up(tokens: int, hardware: str = "cpu") -> dict:
    """A result whose step takes 1 s and 0.01 s a token, and 2 GiB and 1 MiB a token at the most."""
    side = {"seconds": [1 + tokens / 100, 1 + tokens / 50], "peak_memory_gib": 2 + 2 * tokens / 1024}
    return {
        "unique_tokens": [tokens, 2 * tokens],
        "sides": {"dpo_fast": side},
        "environment": {"hardware": hardware, "date": "2026-11-22", "versions": {"torch": "2.13"}},
        "settings": {"model": "tiny", "precision": "fp32"},
        "against": {},
    }


def test_growth_is_drawn_with_its_fit(bench, tmp_path):
    results = [made_up(tokens) for tokens in (100, 400, 1000)]
    found = bench.plot.draw_growth(results, tmp_path / "growth.png")["dpo_fast"]
    assert found["time_fit"] == pytest.approx({"slope": 0.01, "intercept": 1, "r_squared": 1})
    assert found["memory_fit"] == pytest.approx({"slope": 1 / 1024, "intercept": 2, "r_squared": 1})
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_results_of_two_machines_are_not_drawn_together(bench, tmp_path):
    with pytest.raises(ValueError, match="of different hardware"):
        bench.plot.caption([made_up(100), made_up(100, hardware="h100")])
    with pytest.raises(ValueError, match="against='trl' is in none of the results"):
        bench.plot.speedups([made_up(100)], "trl")
