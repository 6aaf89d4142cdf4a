"""The training benchmark compares like with like: every side computes the same loss and gradients in every setting, one
that does not is refused, one that runs out of memory is reported and stops nothing, and figures are counted as said."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers import __version__ as transformers_version

from dpo_fast.commands.bench import worker
from dpo_fast.commands.bench.trainers import pairs_of
from dpo_fast.commands.bench.turns import Comparison, loss_tolerance
from dpo_fast.commands.bench.worker import Failure, Report
from families import VOCAB, tiny_model, tiny_tokenizer
from preferences import pairs, ranked
from suite.training import models, plot, providers, side, speed, summary, workloads
from suite.training.probe import CountHostReads, StepProbe
from suite.training.setting import Setting

PARTS = ("data", "forward", "head", "backward", "optimizer")
NO_MEMORY = Failure("RuntimeError: can't allocate memory", out_of_memory=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of two tiny models; what a mixture's configuration says of an auxiliary loss holds for no side."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder / "llama")
    tiny_model("mixtral", num_hidden_layers=2, router_aux_loss_coef=1.0).save_pretrained(folder / "mixtral")
    return folder


@pytest.fixture(autouse=True)
def own_store(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path / "cache"))  # which the side `patch_trl` sets


class Pipe:
    """Always says to run a step."""

    def send(self, what) -> None:
        pass

    def recv(self) -> str:
        return worker.STEP


def trained(setting: Setting, folder: Path, monkeypatch) -> Report:
    """Returns the report of a side that runs in this process, whose memory is not bounded."""
    monkeypatch.setattr(side, "limit_memory", lambda gib: None)
    return worker.run(side.side_job(setting, str(folder)), Pipe())


def tiny_groups(count: int, group_size: int = 2) -> list[dict]:
    return workloads.synthetic_groups("hh", count, group_size=group_size, max_length=60, vocab_size=VOCAB)


# ---- the sides ----

SETTINGS = {
    "cut": {"micro_batch": 2, "accumulation": 2, "checkpointing": True},
    "lora": {"micro_batch": 4, "lora": True},
    "lora-bf16": {"micro_batch": 2, "accumulation": 2, "lora": True, "precision": "bf16"},
    "three completions": {"micro_batch": 2},
    "mixture": {"micro_batch": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_side_computes_the_same(monkeypatch, tmp_path, folders, name):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    from dpo_fast import unpatch_trl

    completions = 3 if name == "three completions" else 2
    comparisons = completions * (completions - 1) // 2
    model = str(folders / ("mixtral" if name == "mixture" else "llama"))
    ours = Setting("dpo_fast", model, steps=2, max_length=60, **SETTINGS[name])
    groups = tiny_groups(ours.rows * ours.all_steps, completions)
    workloads.save_rows(groups, str(tmp_path))
    settings = {"dpo_fast": ours}
    for other in ("patch_trl", "trl", "plain"):
        settings[other] = replace(ours, provider=other, micro_batch=ours.micro_batch * comparisons)
    reports = {}
    for provider, setting in settings.items():
        try:
            reports[provider] = trained(setting, tmp_path, monkeypatch)
        finally:
            unpatch_trl()
    tolerance = loss_tolerance(ours.precision == "fp32", providers.BETA, ours.rows * comparisons)
    assert not summary.disagreements(reports, tolerance, summary.GRADIENT_TOLERANCE[ours.precision])
    result = summary.figures(reports, settings, groups, ours.rows, {"flops_per_second": 1e9})
    steps = [groups[start : start + ours.rows] for start in range(ours.rows, 3 * ours.rows, ours.rows)]
    assert result["unique_tokens"] == [sum(map(models.unique_tokens, step)) for step in steps]
    shared = {result["sides"][provider]["token_positions"] for provider in ("dpo_fast", "patch_trl")}
    if completions == 2:  # what runs is what is unique, no more
        assert shared == {sum(result["unique_tokens"])}
    assert result["sides"]["trl"]["token_positions"] == result["sides"]["plain"]["token_positions"] > max(shared)
    for found in result["sides"].values():
        assert len(found["losses"]) == len(found["gradient_norms"]) == 4 and len(found["seconds"]) == 2
        assert found["pairs_per_second"] == pytest.approx(2 * ours.rows * comparisons / sum(found["seconds"]))
        assert found["model_flop_utilisation"] > 0 and found["unique_tokens_per_second"] > 0
        assert found["peak_memory_gib"] > 0.1
        assert all(found["seconds_by_part"][part] > 0 for part in PARTS) and found["seconds_by_part"]["logging"] > 0
        assert found["attention"] in ("sdpa", "dpo_fast_prefix") and found["allocation_retries"] == 0
    assert result["sides"]["dpo_fast"]["host_syncs"] == 0 < result["sides"]["trl"]["host_syncs"]
    for found in result["against"].values():
        assert found["speedup"] > 0 and found["memory_ratio"] > 0


@pytest.mark.parametrize("changed", ["beta", "learning rate"])
def test_a_side_that_computes_something_else_is_told(monkeypatch, tmp_path, folders, changed):
    """Even where the loss hides it: in the first step it is ln 2 whatever β is."""
    setting = Setting("plain", str(folders / "llama"), micro_batch=2, steps=1, max_length=60)
    workloads.save_rows(tiny_groups(6), str(tmp_path))
    reports = {name: trained(setting, tmp_path, monkeypatch) for name in ("right", "again")}
    assert not summary.disagreements(reports, 1e-3, 5e-3)
    if changed == "beta":
        monkeypatch.setattr(providers, "BETA", 0.2)
    else:
        setting = replace(setting, learning_rate=0.1)
    reports["again"] = trained(setting, tmp_path, monkeypatch)
    assert summary.disagreements(reports, 1e-3, 5e-3)


def report(*losses: float, norm: float = 1.0, seconds: float = 1.0) -> Report:
    log = [{"loss": loss, "grad_norm": norm} for loss in losses]
    return Report(log, [seconds], [10], 2**30, 1.0, {})


def test_the_step_and_the_value_that_differ_are_named():
    ours = report(0.69, 0.5)
    assert not summary.disagreements({"dpo_fast": ours, "trl": report(0.69, 0.6)}, 0.2, 1e-3)
    for theirs, words in (
        (report(0.69, 0.6), "step 1: dpo_fast has loss 0.5, trl 0.6"),
        (report(0.69, 0.5, norm=1.1), "step 0: dpo_fast has gradient norm 1.0, trl 1.1"),
        (report(math.nan, 0.5), "step 0: dpo_fast has loss 0.69, trl nan"),
    ):
        assert summary.disagreements({"dpo_fast": ours, "trl": theirs}, 1e-3, 1e-3)[0] == words


def test_host_reads_are_counted():
    x = torch.arange(4.0)
    with CountHostReads() as reads:
        x[torch.tensor([0, 2])] + x.sum()
        assert reads.count == 0
        x.sum().item(), x.nonzero(), x[x > 1], bool(x[0] == 1)
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


def test_time_goes_to_the_part_that_takes_it():
    """Two micro-batches; half of the head's time is in the backward, before the body's."""
    model = _SlowModel()
    optimizer = _SlowOptimizer(model.parameters(), lr=0.1)
    stock = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_
    probe = StepProbe(model, logging_seconds=0.25)
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
    assert found["seconds_by_part"].pop("logging") == 0.25 and found["seconds_by_part"].keys() == least.keys()
    for part, seconds in least.items():  # what one part got wrongly, another lacks
        assert found["seconds_by_part"][part] >= seconds, part
    assert (torch.Tensor.backward, torch.nn.utils.clip_grad_norm_) == stock and not model._forward_hooks


# ---- memory ----


def test_the_fastest_setting_that_fits_is_taken(monkeypatch):
    """Seconds of a step grow with the square of the micro-batch."""
    asked, fits = [], lambda setting: setting.micro_batch < (4 if setting.checkpointing else 2)

    def measure(settings, folder):
        ((name, setting),) = settings.items()
        asked.append((setting.micro_batch, setting.accumulation, setting.checkpointing))
        if not fits(setting):
            return Comparison({}, {name: NO_MEMORY}, True)
        return Comparison({name: report(seconds=setting.accumulation * setting.micro_batch**2.0)}, {}, True)

    monkeypatch.setattr(speed, "measure", measure)
    trials = {}
    fastest = speed._fastest(Setting("trl", "model", micro_batch=8), "", trials)
    # 2 does not fit without checkpointing, so 4 and 8 are not tried without; nor 8 with, since 4 does not fit with
    assert asked == [(1, 8, False), (2, 4, False), (2, 4, True), (4, 2, True)]
    assert (fastest.micro_batch, fastest.accumulation, fastest.checkpointing) == (1, 8, False)
    assert fastest.steps == 6 and fastest.watched
    found = [trial.get("seconds", trial.get("does_not_fit")) for trial in trials["trl"]]
    assert found == [8.0, NO_MEMORY.message, 16.0, NO_MEMORY.message]
    fits = lambda setting: False  # noqa: E731
    assert speed._fastest(Setting("trl", "model", micro_batch=8), "", {}) is None


def test_a_side_without_memory_is_reported_and_stops_nothing(monkeypatch, tmp_path, capsys):
    """A real process, which may take 0.25 GiB: logits of all positions are 0.2 GiB in each of their forms."""
    tiny_model("llama", num_hidden_layers=1, vocab_size=100_000).save_pretrained(tmp_path / "wide")
    setting = Setting("plain", str(tmp_path / "wide"), micro_batch=8, steps=1, max_length=64, memory_gib=0.25)
    options = ["--synthetic", "hh", "--model", setting.model, "--max_length", "64", "--batch_size", "8", "--steps", "1"]
    measure = side.measure

    def measured(settings, folder):
        """Ours in a report that is made up, the plain loop in its process."""
        found = measure({"plain": replace(settings["plain"], memory_gib=0.25)}, folder)
        return Comparison({"dpo_fast": report(0.69, 0.69, 0.69)}, found.failures, found.in_turns)

    monkeypatch.setattr(speed, "measure", measured)
    result = speed.run(speed.parse([*options, "--against", "plain", "--no_result"]))
    assert set(result["sides"]) == {"dpo_fast"} and "allocate memory" in result["does_not_fit"]["plain"]
    assert not result["against"] and "plain     does not fit: RuntimeError" in capsys.readouterr().out


# ---- what is trained ----


@pytest.mark.parametrize("name", ["ultrafeedback", "hh", "tldr", "long-prompt"])
def test_lengths_have_the_published_medians(name):
    groups = workloads.synthetic_groups(name, 1000, group_size=2, max_length=100_000, vocab_size=50)
    published = workloads.PUBLISHED[name]
    lengths = zip(*([len(g["prompt_ids"]), *map(len, g["completion_ids"])] for g in groups), strict=True)
    for found, median in zip(lengths, (published.prompt, published.chosen, published.rejected), strict=True):
        # the standard error of a median of 1000 is 1.25 · 0.8 / √1000 of it
        assert statistics.median(found) == pytest.approx(median, rel=0.1)
        assert statistics.stdev(map(math.log, found)) == pytest.approx(0.8, rel=0.1)


def test_synthetic_groups_fit_and_are_the_same_again():
    groups = tiny_groups(50, group_size=4)
    assert groups == tiny_groups(50, group_size=4)
    for group in groups:
        assert max(map(len, group["completion_ids"])) + len(group["prompt_ids"]) <= 60
        ids = [*group["prompt_ids"], *(i for completion in group["completion_ids"] for i in completion)]
        assert min(ids) >= 3 and max(ids) < VOCAB
        assert group["comparisons"] == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    expanded = pairs_of(groups[:1])
    best, *_, worst = groups[0]["completion_ids"]
    assert len(expanded) == 6 and [expanded[2]["chosen_ids"], expanded[2]["rejected_ids"]] == [best, worst]
    with pytest.raises(ValueError, match="max_length=20 is too short for 'long-prompt'"):
        workloads.synthetic_groups("long-prompt", 50, group_size=2, max_length=20, vocab_size=50)


def test_groups_of_a_dataset(tmp_path):
    pairs(12).to_json(tmp_path / "pairs.jsonl")
    ranked(12).to_json(tmp_path / "ranked.jsonl")

    def groups(name: str, count: int, group_size: int) -> list[dict]:
        path = str(tmp_path / f"{name}.jsonl")
        options = {"max_length": 64, "tokenizer": tiny_tokenizer(), "vocab_size": VOCAB}
        return workloads.dataset_groups(path, count, group_size=group_size, **options)

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
def test_random_models_have_the_published_size(name, millions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.model_config(name))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.002)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "mixtral"])
def test_flops_are_those_of_the_model(family):
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
    found = models.step_flops(model.config, [group], frozen=False)
    # Before transformers 5.19 the angles of positions are a product too, of 320 FLOP.
    exact = 1e-6 if Version(transformers_version) >= Version("5.19") else 1e-4
    assert found == pytest.approx(body + head + attention, rel=exact)
    frozen = models.step_flops(model.config, [group], frozen=True)
    assert frozen == pytest.approx((body + head) * 4 / 6 + attention, rel=exact)
    # two completions attend to one prompt, which attends once: 3 + 2 · (2 · 3 + 6) pairs
    group = {"prompt_ids": [3, 4], "completion_ids": [[5, 6, 7], [8, 9, 10]]}
    assert models._attended_pairs(group) == 27 and models.unique_tokens(group) == 8


# ---- options and pictures ----


def test_a_grid_is_all_combinations():
    base = ["--synthetic", "hh"]
    points = speed.parse([*base, "--grid", "max_length=512,1024", "lora=no,yes", "model=llama-3.2-1b"]).points
    assert len(points) == 4
    assert points[1] == {"max_length": 512, "lora": True, "model": "llama-3.2-1b"}
    assert speed.parse(base).points == [{}]
    for wrong in ("steps=3", "lora=maybe", "max_length=0", "batch_size", "synthetic=mine"):
        with pytest.raises(SystemExit):
            speed.parse([*base, "--grid", wrong])


def test_a_line_is_fitted():
    # y = x² on 0, 1, 2, 3: slope 3, intercept −1, residuals 1, −1, −1, 1 of a variance of 49
    curved = plot.linear_fit([0, 1, 2, 3], [0, 1, 4, 9])
    assert curved == plot.Line(3, -1, pytest.approx(1 - 4 / 49))
    for few in ([1.0, 2.0], [3.0, 3.0, 3.0]):
        with pytest.raises(ValueError, match="too few different points"):
            plot.linear_fit(few, few)


def test_results_of_two_machines_are_not_drawn_together():
    def result(hardware: str) -> dict:
        environment = {"hardware": hardware, "date": "2026-11-22", "versions": {"torch": "2.13"}}
        return {"environment": environment, "settings": {"model": "tiny", "precision": "fp32"}, "against": {}}

    with pytest.raises(ValueError, match="of different hardware"):
        plot.caption([result("cpu"), result("h100")])
    with pytest.raises(ValueError, match="against='trl' is in none of the results"):
        plot.speedups([result("cpu")], "trl")
