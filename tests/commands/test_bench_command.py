"""`dpo-fast bench` times only what computes the same, and names settings that train the same steps."""

from __future__ import annotations

import faulthandler
import json
import math
import multiprocessing
import os
import signal
import threading
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import Connection

import pytest
import torch
from datasets import Dataset, load_from_disk
from test_bench_positions import GROUPS, prepared

from dpo_fast import cli
from dpo_fast.commands.arguments import parse_train_arguments
from dpo_fast.commands.bench import command, peers, turns, worker
from dpo_fast.commands.bench.figures import settings_figures
from dpo_fast.commands.bench.positions import count_positions, lengths_only
from dpo_fast.commands.bench.settings import Setting, Trial, fastest, try_settings
from dpo_fast.commands.bench.turns import (
    TrainerError,
    TrainerProcess,
    check_losses,
    compare,
    each_alone,
    loss_tolerance,
)
from dpo_fast.commands.bench.worker import Failure, Report, TrainJob
from dpo_fast.config import DPOConfig
from dpo_fast.data.prepare import prepare_dataset
from families import tiny_model, tiny_tokenizer
from preferences import pairs

OURS = "dpo_fast.commands.bench.trainers:dpo_fast"
OWN = Setting(2, 2, None, True)
NO_MEMORY = Failure("OutOfMemoryError: gone", out_of_memory=True)


# ---- taking turns ----


def report(losses=(0.7, 0.6), seconds=(1.0,), memory=2**30) -> Report:
    log = [{"loss": loss} for loss in losses]
    return Report(log, list(seconds), [10] * len(seconds), memory, 1.0, {"layout": "shared"})


class FakeProcess:
    """Stands in for a process: a job's only argument says what becomes of it; `together` is how many fit the memory."""

    log: list[str] = []
    running = 0
    together = 9

    def __enter__(self):
        return self

    def __exit__(self, *error):
        FakeProcess.running -= self.started

    started = False

    def start(self, job):
        (self.what,), self.started = job.arguments, True
        FakeProcess.running += 1
        self.log.append(f"start {self.what}")
        if FakeProcess.running > FakeProcess.together:
            raise TrainerError(NO_MEMORY)
        if self.what == "refused":
            raise TrainerError(Failure("ValueError: not this one", refused=True))

    def step(self):
        self.log.append(self.what)
        if self.what == "huge":
            raise TrainerError(NO_MEMORY)

    def finish(self):
        return report()


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(turns, "TrainerProcess", FakeProcess)
    for name, value in (("log", []), ("running", 0), ("together", 9)):
        monkeypatch.setattr(FakeProcess, name, value)
    return FakeProcess


def jobs(*names: str, steps: int = 1) -> dict[str, TrainJob]:
    return {name: TrainJob("", (name,), steps) for name in names}


def test_jobs_take_turns_and_one_that_refuses_stays_out(processes):
    tried = jobs("a", "refused", "b", steps=2)
    found = compare(tried, required=["a"])
    assert processes.log == ["start a", "start refused", "start b", *["a", "b"] * 3]
    assert list(found.reports) == ["a", "b"] and found.failures["refused"].refused and found.in_turns
    processes.log.clear()
    with pytest.raises(TrainerError, match="^refused: ValueError: not this one$"):
        compare(tried, required=tried)
    assert processes.log == ["start a", "start refused"], "nothing runs for nothing"


def test_jobs_that_do_not_fit_together_run_alone(processes):
    processes.together = 1
    found = compare(jobs("a", "b"))
    assert processes.log == ["start a", "start b", *["start b", "b", "b"], *["start a", "a", "a"]]
    assert list(found.reports) == ["a", "b"] and not found.failures and not found.in_turns


def test_the_others_take_turns_without_a_job_that_does_not_even_fit_alone(processes):
    found = compare(jobs("a", "huge", "b"), required=["huge"])
    assert processes.log[-6:] == ["start a", "start b", "a", "b", "a", "b"] and found.in_turns
    assert list(found.reports) == ["a", "b"] and found.failures == {"huge": NO_MEMORY}
    assert compare(jobs("huge")).failures == {"huge": NO_MEMORY}
    apart = each_alone(jobs("a", "huge", "b"))
    assert processes.log[-8:] == ["start a", "a", "a", "start huge", "huge", "start b", "b", "b"]
    assert list(apart.reports) == ["a", "b"] and apart.failures == {"huge": NO_MEMORY} and not apart.in_turns


def test_losses_that_differ_are_refused():
    same = {"ours": [0.7, 0.1], "padded": [0.7, 0.1002], "trl": [0.7, 0.1004]}
    assert check_losses(same, 1e-3) == pytest.approx(0.0004 / 0.7)
    for wrong in (0.102, float("nan")):
        with pytest.raises(ValueError, match="in step 1 ours has 0.1 and trl") as refusal:
            check_losses({**same, "trl": [0.7, wrong]}, 1e-3)
    assert "is not timed" in str(refusal.value)


def test_losses_in_half_precision_may_differ_by_its_noise():
    assert loss_tolerance(True, 0.1, 1) == loss_tolerance(True, 9.0, 64) == 1e-3
    one, eight = (loss_tolerance(False, 0.1, comparisons) for comparisons in (1, 8))
    assert one == pytest.approx(8**0.5 * eight) and one > 0.0573, "as far as two sides were seen apart"
    assert loss_tolerance(False, 0.2, 8) == pytest.approx(2 * eight)
    assert loss_tolerance(False, 0.1, 10**6) == 0.02 and loss_tolerance(False, 9.0, 1) == 0.5


@pytest.mark.parametrize(
    ("signal_number", "no_memory"), [(signal.SIGKILL, True), (signal.SIGABRT, True), (signal.SIGTERM, False)]
)
def test_a_process_that_the_machine_kills_ran_out_of_memory(monkeypatch, signal_number, no_memory):
    """A forked process, which need not import anything."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(turns.multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(
        turns, "work", lambda pipe: (pipe.recv(), faulthandler.disable(), os.kill(os.getpid(), signal_number))
    )
    with TrainerProcess() as process, pytest.raises(TrainerError, match=signal_number.name) as error:
        process.start(TrainJob("", (), 1))
    assert error.value.failure.out_of_memory is no_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("shape '[3]' is invalid"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_errors(error, expected):
    assert worker.out_of_memory(error) is expected


def test_trials_share_a_process_until_the_memory_ends(processes, monkeypatch):
    made = []
    monkeypatch.setattr(turns, "TrainerProcess", lambda: made.append(FakeProcess()) or made[-1])
    tried = list(turns.one_after_another([*jobs("a", "b", "huge", "c").values()]))
    assert [isinstance(found, Report) for found in tried] == [True, True, False, True] and len(made) == 2
    assert processes.log == ["start a", "a", "a", "start b", "b", "b", "start huge", "huge", "start c", "c", "c"]
    with pytest.raises(TrainerError, match="not this one"):
        list(turns.one_after_another([*jobs("refused").values()]))


def test_a_process_trains_and_goes_on_after_a_job_that_fails(folder):
    """A real process: refused flags cost it a job; the next one trains."""
    rows, _ = prepare_dataset(pairs(8), tiny_tokenizer(), max_length=24)
    rows.save_to_disk("rows")
    flags = [*FLAGS, "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no", "--output_dir", "out"]
    flags += ["--train_sampling_strategy", "sequential"]
    with TrainerProcess() as process:
        with pytest.raises(TrainerError, match="beta=-1") as error:
            process.start(TrainJob(OURS, ([*flags, "--beta", "-1"], "rows"), 1))
        assert error.value.failure.refused and not error.value.failure.out_of_memory
        process.start(TrainJob(OURS, (flags, "rows"), 1))
        seconds = [process.step(), process.step()]
        found = process.finish()
    assert found.losses[0] == pytest.approx(math.log(2), abs=1e-6) and found.losses[1] != found.losses[0]
    assert found.positions == [sum(group.num_tokens() for group in lengths_only(rows)[4:])]
    assert found.seconds == seconds[1:] and found.notes == {"layout": "shared"} and found.peak_memory > 2**27
    with pytest.raises(OSError):
        process.step()


# ---- settings ----


def trying(fits):
    """A run of settings that fail where `fits` says so, and asks of each one that it is wanted."""
    asked = []

    def run(settings):
        for setting in settings:
            asked.append(setting)
            tokens = setting.max_tokens_per_micro_batch or 9999
            yield report(seconds=[1000 / tokens], memory=tokens) if fits(setting) else NO_MEMORY

    return run, asked


def test_cuts_grow_until_one_does_not_fit_and_keep_the_step():
    run, asked = trying(lambda setting: (setting.max_tokens_per_micro_batch or 0) < 1100)
    trials = try_settings(OWN, step_tokens=4000, group_tokens=700, run=run)
    assert [setting.max_tokens_per_micro_batch for setting in asked] == [None, 768, 1024, 2048]
    assert all(setting.groups == OWN.groups == 4 for setting in asked)
    assert [trial.fits for trial in trials] == [True, True, True, False]
    assert not any(setting.gradient_checkpointing for setting in asked[1:])


def test_activations_are_recomputed_only_where_nothing_fits_otherwise():
    run, asked = trying(lambda setting: setting.gradient_checkpointing and setting.max_tokens_per_micro_batch)
    trials = try_settings(OWN, step_tokens=256, group_tokens=100, run=run)
    assert [(s.max_tokens_per_micro_batch, s.gradient_checkpointing) for s in asked] == [
        (None, True), (128, False), (128, True), (256, True),
    ]  # fmt: skip
    assert fastest(trials).setting == asked[-1]
    run, _ = trying(lambda setting: False)
    assert fastest(try_settings(OWN, 256, 100, run)) is None


def test_of_equal_speed_the_smaller_memory_is_taken():
    trials = [Trial(OWN, report(seconds=[t], memory=m)) for t, m in ((1.02, 5), (1.0, 7), (1.5, 1))]
    assert fastest(trials) is trials[0]


def test_expected_speed_up_is_the_measured_one_times_the_gain(tmp_path):
    rows = prepared([{**GROUPS[0], "comparison_weights": [1.0]}] * 3)
    epoch = count_positions(rows, lengths_only(rows), [[0, 1, 2]])
    better = replace(OWN, gradient_checkpointing=False)
    trials = [Trial(OWN, report(seconds=[3.0])), Trial(better, report(seconds=[1.5]))]
    config = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    found = settings_figures(trials, {"trl": {"speedup": 2.5, "memory": 1.0}}, epoch, config)
    assert found["expected_speedup"] == {"trl": 5.0} and found["flags"] == better.flags()
    assert found["group_by_prompt"] and found["saved_by_merging"] == pytest.approx(2 / 3)
    assert not found["gradient_checkpointing_needed"]
    alone = settings_figures([trials[0], Trial(better, NO_MEMORY)], {}, epoch, replace(config, group_by_prompt=True))
    nothing = settings_figures([Trial(OWN, NO_MEMORY)], {}, epoch, config)
    assert nothing["flags"] is None and not nothing["gradient_checkpointing_needed"]
    assert alone["gradient_checkpointing_needed"] and not alone["group_by_prompt"] and alone["flags"] == OWN.flags()


# ---- TRL's part ----


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ({}, {}, None),
        ({"comparison_weights": [2.0]}, {}, "no weights"),
        ({"comparison_offsets": [1.0]}, {}, "no offsets"),
        ({"context_lengths": [1, 0]}, {}, "keep_end"),
        ({}, {"rpo_alpha": 1.0}, "rpo_alpha"),
        ({}, {"label_smoothing": 0.1}, "ignores label_smoothing"),
        ({}, {"label_smoothing": 0.1, "loss_type": "robust"}, None),
        ({}, {"loss_type": "aot", "gradient_accumulation_steps": 2}, "micro-batch"),
    ],
)
def test_trl_takes_part_where_it_computes_the_same(tmp_path, monkeypatch, rows, options, words):
    monkeypatch.setattr(peers, "version", lambda name: "1.16.0")
    row = {"prompt_ids": [4], "completion_ids": [[5, 6], [7]], "comparisons": [[0, 1]]}
    row |= {"comparison_weights": [1.0], "context_lengths": [0, 0], **rows}
    config = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **options)
    obstacle = peers.trl_obstacle(config, Dataset.from_list([row]))
    assert obstacle is None if words is None else words in obstacle
    monkeypatch.setattr(peers, "version", lambda name: "1.17.0")
    assert "release 1.17.0" in peers.trl_obstacle(config, Dataset.from_list([row]))


def test_groups_of_different_sizes_are_no_batches_of_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "version", lambda name: "1.16.0")
    config = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    rows = prepared([{**row, "comparison_weights": [1.0] * len(row["comparisons"])} for row in GROUPS[1:3]])
    assert "different numbers of comparisons" in peers.trl_obstacle(config, rows)


# ---- the command ----

FLAGS = ["--model", "model", "--dataset", "rows.jsonl", "--use_cpu", "--max_length", "24", "--report_to", "none"]
FLAGS += ["--per_device_train_batch_size", "4", "--learning_rate", "1e-3"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, its tokenizer and eight pairs on disk, in the working directory."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    pairs(8).to_json("rows.jsonl")
    four = [{"prompt": "w3 w4 w5", "completions": [f" w{10 + i} w{20 + k}" for k in range(4)]} for i in range(8)]
    Dataset.from_list([{**row, "scores": [4, 3, 2, 1]} for row in four]).to_json("four.jsonl")
    return tmp_path


@pytest.fixture
def measured(monkeypatch):
    """Stands in for the processes: reports of every side, and of every trial."""
    reports = {name: report([0.7, 0.6, 0.5], [t, t]) for name, t in (("dpo_fast", 1.0), ("padded", 2.0), ("trl", 3.0))}
    asked = {}

    def fake_compare(jobs, required):
        asked.update(jobs)
        reports["rows"] = load_from_disk(jobs["dpo_fast"].arguments[1]).to_list()
        failures = {name: reports[name] for name in jobs if isinstance(reports[name], Failure)}
        for name in required:
            if name in failures and not failures[name].out_of_memory:
                raise TrainerError(failures[name], name)
        return turns.Comparison({name: reports[name] for name in jobs if name not in failures}, failures, True)

    monkeypatch.setattr(command, "compare", fake_compare)

    def fake_trials(jobs):
        for job in jobs:
            reports["tried"] = load_from_disk(job.arguments[1]).to_list()
            yield report([0.7] * job.all_steps, [1.0] * job.steps)

    monkeypatch.setattr(command, "one_after_another", fake_trials)
    reports["asked"] = asked
    return reports


class ThreadContext:
    """Runs the sides in threads of this process: all is real but the memory, and nothing has to be imported again."""

    Pipe = staticmethod(multiprocessing.Pipe)

    class Process(threading.Thread):
        exitcode = None

        def __init__(self, target, args, daemon):
            (pipe,) = args  # a process would have its own end of the pipe, which the other one can close at its side
            super().__init__(target=target, args=(Connection(os.dup(pipe.fileno())),), daemon=daemon)

        def terminate(self):
            assert not self.is_alive(), "a side ends with its pipe"


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(turns.multiprocessing, "get_context", lambda kind: ThreadContext)
    monkeypatch.setattr(worker, "_be_quiet", lambda: None)


def run_bench(capsys, *flags: str) -> tuple[str, dict]:
    assert cli.main(["bench", *FLAGS, *flags]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    return out, json.loads(out.strip().split("\n")[-1])


@pytest.mark.parametrize("where", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_the_comparison_end_to_end(folder, capsys, request, where):
    """Two steps are an epoch of these rows: what ran is what was counted, padded and packed."""
    pytest.importorskip("trl")
    if where == "threads":
        request.getfixturevalue("threads")
    out, result = run_bench(capsys, "--max_steps", "2", "--no_gradient_checkpointing", "--out", "bench.json")
    assert json.loads((folder / "bench.json").read_text()) == result
    data, sides = result["data"], result["measured"]["sides"]
    assert (data["groups"], data["comparisons"], data["rows"]) == (8, 8, 8)
    assert list(sides) == ["dpo_fast", "padded", "trl"] and result["measured"]["in_turns"]
    ran = {name: 2 * side["positions_per_step"] for name, side in sides.items()}
    assert ran == {"dpo_fast": data["packed"], "padded": data["usual"], "trl": data["usual"]}
    for side in sides.values():
        assert side["losses"] == pytest.approx(sides["dpo_fast"]["losses"], rel=1e-4) and len(side["losses"]) == 3
        assert side["epoch_seconds"] == pytest.approx(8 / side["pairs_per_second"])
        assert side["peak_memory_bytes"] > 2**27
    speeds = [sides[name]["pairs_per_second"] for name in ("dpo_fast", "trl")]
    assert result["measured"]["against"]["trl"]["speedup"] == pytest.approx(speeds[0] / speeds[1])
    assert f"{data['ratio']:.2f}× as many positions padded as packed" in out
    flags = result["settings"]["flags"]
    pasted = parse_train_arguments([*FLAGS, *flags]).config
    assert pasted.per_device_train_batch_size * pasted.gradient_accumulation_steps == 4
    assert not pasted.gradient_checkpointing and all(f"{a} {b}" in out for a, b in pairwise(flags) if a[:2] == "--")
    assert not (folder / "model-DPO").exists() and not (folder / "cache" / "reference").exists(), "nothing stays"


@pytest.mark.parametrize(
    ("flags", "trl"),
    [(["--dataset", "four.jsonl", "--use_peft", "--bf16"], True), (["--gradient_accumulation_steps", "2"], False)],
)
def test_the_comparison_end_to_end_in_other_settings(folder, capsys, threads, monkeypatch, flags, trl):
    """An adapter on four ranked completions, which TRL trains as six pairs; accumulation, without TRL."""
    pytest.importorskip("trl" if trl else "torch")
    monkeypatch.setattr(peers, "_installed_release", lambda: "1.16.0" if trl else None)
    out, result = run_bench(capsys, "--max_steps", "2", *flags)
    sides = result["measured"]["sides"]
    assert ("trl" in sides) == trl and "TRL 1.16 takes no part" not in out.split("\n{")[0] or not trl
    assert 0 <= result["measured"]["largest_loss_difference"] < 2e-2
    ran = {name: 2 * side["positions_per_step"] for name, side in sides.items()}
    if trl:
        assert ran["dpo_fast"] == result["data"]["packed"] and ran["trl"] == result["data"]["usual"]


def test_without_trl_the_padded_layout_is_the_other_side(folder, capsys, monkeypatch, measured):
    monkeypatch.setattr(peers, "_installed_release", lambda: None)
    out, result = run_bench(capsys)
    assert set(measured["asked"]) == {"dpo_fast", "padded"} == set(result["measured"]["sides"])
    assert out[: out.index("\n{")].count("TRL 1.16 takes no part, because trl is not installed") == 1
    assert result["measured"]["against"] == {"padded": {"speedup": 2.0, "memory": 1.0}}


def test_nothing_that_fits_is_said(folder, capsys, monkeypatch, measured):
    measured |= dict.fromkeys(("dpo_fast", "padded", "trl"), NO_MEMORY)
    monkeypatch.setattr(command, "one_after_another", lambda jobs: (NO_MEMORY for _ in jobs))
    out, result = run_bench(capsys)
    assert "None of these settings fits" in out and out.count("does not fit") == 3, "own, and each smallest cut"
    assert result["settings"]["flags"] is None and result["settings"]["expected_speedup"] == {}


def test_every_side_gets_the_rows_and_the_settings(folder, capsys, monkeypatch, measured):
    monkeypatch.setattr(peers, "_installed_release", lambda: "1.16.0")
    _, result = run_bench(capsys, "--beta", "0.3", "--max_steps", "3", "--group_by_prompt")
    asked = measured["asked"]
    assert len({job.arguments[1] for job in asked.values()}) == 1 and asked["trl"].trainer.endswith("trainers:trl")
    for name, job in asked.items():
        config = parse_train_arguments(list(job.arguments[0])).config
        assert (config.beta, config.max_steps, config.group_by_prompt) == (0.3, 4, False)
        assert config.layout == ("padded" if name == "padded" else "auto")
    assert result["measured"]["steps"] == 3


def test_trials_begin_with_the_heaviest_step(folder, capsys, measured):
    """What fits then fits all of the epoch; the steps after it are the measured ones."""
    rows = [{"prompt": "w3", "chosen": " w4" * (1 + i), "rejected": " w5"} for i in range(12)]
    Dataset.from_list([{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows]).to_json("a.json")
    flags = ["--dataset", "a.json", "--train_sampling_strategy", "sequential", "--max_steps", "1"]
    _, result = run_bench(capsys, *flags)
    found = {name: [len(row["completion_ids"][0]) - 1 for row in measured[name]] for name in ("rows", "tried")}
    assert found == {"rows": [1, 2, 3, 4, 5, 6, 7, 8], "tried": [9, 10, 11, 12, 5, 6, 7, 8]}
    assert "ref_logps" not in measured["rows"][0], "everybody computes them"
    bounds = {trial["max_tokens_per_micro_batch"] for trial in result["settings"]["trials"]}
    assert bounds == {2048, 128} and result["measured"]["steps"] == 1


def test_no_time_is_told_of_what_computes_something_else(folder, capsys, monkeypatch, measured):
    monkeypatch.setattr(peers, "_installed_release", lambda: "1.16.0")
    measured["trl"] = report([0.7, 0.6, 0.4], [9.0, 9.0])
    assert cli.main(["bench", *FLAGS]) == 2
    out, error = capsys.readouterr()
    assert "in step 2 dpo_fast has 0.5 and trl 0.4" in error and "Traceback" not in error
    assert "pairs/s" not in out and "padded rows, batch 4" in out


def test_a_side_without_a_report_is_one_line(folder, capsys, monkeypatch, measured):
    monkeypatch.setattr(peers, "_installed_release", lambda: "1.16.0")
    measured["trl"], measured["dpo_fast"] = Failure("ValueError: no such loss", refused=True), NO_MEMORY
    out, result = run_bench(capsys)
    assert out.count("TRL 1.16 takes no part, because ValueError: no such loss") == 1
    assert out.count("dpo_fast takes no part, because it needs more memory") == 1
    assert result["measured"]["against"] == {} and result["settings"]["flags"]
    measured["dpo_fast"] = Failure("ValueError: loss_type is odd", refused=True)
    assert cli.main(["bench", *FLAGS]) == 2 and "loss_type is odd" in capsys.readouterr().err
    measured["dpo_fast"] = Failure("KeyError: 'bug'")
    with pytest.raises(TrainerError, match="bug"):
        cli.main(["bench", *FLAGS])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max_steps", "0"], "--max_steps 0 must be at least 1"),
        (["--out", "figures.txt"], "ends in .json"),
        (["--out", "nowhere/figures.json"], "in a folder that exists"),
        (["--dataset_streaming"], "counts the whole dataset"),
        (["--num_processes", "2"], "--num_processes is for several processes"),
        (["--dataset", "gone.jsonl"], "no such file"),
        (["--dataset_train_split", "best"], "only ['train']"),
        (["--stepz", "3"], "unknown flag --stepz"),
        (["--max_length", "1"], "max_length='1' must be"),
    ],
)
def test_mistakes_cost_one_line(folder, capsys, measured, flags, words):
    assert cli.main(["bench", *FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.split("\n")[-2].startswith("dpo-fast: error:") and "Traceback" not in error
    assert not measured["asked"]
