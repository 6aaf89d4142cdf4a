"""Several processes go on from a checkpoint as if nothing had stopped them: killed at any moment, on other ranks too.

What a resumed run logs in every step, the order of its data included, and its weights are those of the undisturbed run:
to the last bit on as many ranks under DDP, within 1e-4 of one process's under an engine or on other ranks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import load_file, save_file
from test_distributed import assert_same, engine_environment, engine_file, launch, leave, make, run

from dpo_fast.training.checkpoints import find_checkpoint
from families import tiny_model
from interpreting import environment
from preferences import make_trainer

SAVE = {"save_strategy": "steps", "save_steps": 5}
PARTS = ("model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth", "dpo_fast_run.json")
PARTS += ("dpo_fast_checksums.json", "trainer_state.json")


def test_incomplete_checkpoints_are_skipped_with_a_warning(tmp_path, caplog):
    """Whatever a kill or a loss of power leaves, the run goes on from the checkpoint before, and touches nothing."""
    make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2).train()
    out = str(tmp_path / "out")
    complete, last = tmp_path / "out" / "checkpoint-1", tmp_path / "out" / "checkpoint-2"
    assert find_checkpoint(True, out) == find_checkpoint(str(last), out) == str(last)
    for part in ("trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"):
        whole = (last / part).read_bytes()
        for end in (0, len(whole) // 2, len(whole) - 2):
            (last / part).write_bytes(whole[:end])
            caplog.clear()
            assert find_checkpoint(True, out) == str(complete)
            assert str(last) in caplog.text and part in caplog.text
            with pytest.raises(ValueError, match=f"checkpoint-2.*no complete {part}"):
                find_checkpoint(str(last), out)
            assert (last / part).read_bytes() == whole[:end]
        (last / part).write_bytes(whole)
    assert find_checkpoint(True, out) == str(last)
    for folder in (complete, last):
        (folder / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint-… folder that is complete, of 2"):
        find_checkpoint(True, out)


def test_a_checkpoint_is_complete_only_when_all_ranks_have_written_it(tmp_path, monkeypatch):
    """Also where an earlier run left a complete one: its state says nothing of the weights that are written now."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(tmp_path, **options).train()
    again, out, seen = make_trainer(tmp_path, **options), tmp_path / "out", []

    def wait_for_other_ranks() -> None:
        written = {path.name for path in (out / "checkpoint-2").iterdir()}
        seen.append(
            (written >= {"model.safetensors", "optimizer.pt", "rng_state.pth"}, find_checkpoint(True, str(out)))
        )

    monkeypatch.setattr(again.accelerator, "wait_for_everyone", wait_for_other_ranks)
    again.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    assert seen == [(True, str(out / "checkpoint-1"))] * 2, "before a file is written again, and when all are written"
    assert find_checkpoint(True, str(out)) == str(out / "checkpoint-2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "before", "after"),
    [("ddp", 2, 2), ("ddp", 2, 1), ("ddp", 1, 2), ("ddp", 2, 4), ("ddp", 4, 2)]
    + [("fsdp2", 2, 2), ("fsdp2", 2, 4), ("fsdp2", 4, 2), ("zero2", 2, 2), ("zero3", 2, 2)],
)
def test_ranks_go_on_from_a_checkpoint(tmp_path, engine, before, after):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    names, step = ["packs", "adapter"], 5
    tiny_model("llama").save_pretrained(tmp_path / "model")
    for folder in ("one", "stopped", "resumed"):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
    for name in names:
        run(name, tmp_path / "one" / name, 1)
    checkpoint = str(tmp_path / "stopped" / "{}" / "out" / f"checkpoint-{step}")
    _run(engine, before, tmp_path / "stopped", names, **SAVE)
    _run(engine, after, tmp_path / "resumed", names, resume=checkpoint)
    for name in names:
        assert_same(tmp_path / "one" / name, tmp_path / "resumed" / name, alone=step if 1 in (before, after) else 0)
        logs = json.loads((tmp_path / "resumed" / name / "logs.json").read_text())
        (mean,) = [row["train_loss"] for row in logs if "train_loss" in row]
        losses = [row["loss"] for row in logs if row.get("step", 0) > step and "loss" in row]
        assert mean == pytest.approx(sum(losses) / len(losses)) and len(losses) == 10 - step


def _run(engine: str, ranks: int, folder: Path, names: list[str], **options) -> None:
    """Under `engine`, or in this process where there is one."""
    if ranks > 1:
        call = f"on_a_rank({engine!r}, {str(folder)!r}, *{names}, **{options})"
        launch(ranks, call, **engine_environment(engine))
        return
    for name in names:
        run(name, folder / name, 1, **options)


def _train_on_a_rank(folder: Path, rank: int, port: int, steps: int, resume: bool) -> None:
    """In a process of its own; what it logs goes to a file."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()} | {"MASTER_ADDR": "127.0.0.1"})
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # transformers before 5.18 cannot resume on the cpu:0 of ranks
    log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = {"optim": "adamw_torch", "max_steps": steps, "save_strategy": "steps", "save_steps": 1}
    trainer = make("packs", folder, 2, save_total_limit=3, **options)
    assert trainer.accelerator.distributed_type == DistributedType.MULTI_CPU
    trainer.train(resume_from_checkpoint=resume)
    if rank == 0:
        save_file({name: p.detach().clone() for name, p in trainer.model.named_parameters()}, folder / "trained")
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        (folder / "losses.json").write_text(json.dumps(losses))
    leave()
    os._exit(0)  # threads of libraries, which the fork left without their owners, may wait for ever at an ordinary end


def _start(folder: Path, steps: int, resume: bool) -> list[BaseProcess]:
    """Two ranks, forked from this process, which has imported everything and run nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_train_on_a_rank, args=(folder, rank, port, steps, resume)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    return ranks


def _kill(ranks: list[BaseProcess], folder: Path, done: int, chance: random.Random) -> None:
    """SIGKILLs one rank or both while a checkpoint after `done` is written, or a little later; then the rest ends."""
    start = time.time()
    file = folder / "out" / f"checkpoint-{done + chance.randint(1, 3)}" / chance.choice(PARTS)
    victims, late = chance.choice([[0], [1], [0, 1]]), chance.choice([0, 0, 0.003, 0.03, 0.1])
    while not file.exists() or file.stat().st_mtime < start:
        assert all(process.is_alive() for process in ranks), "a rank ended before it was killed"
        assert time.time() < start + 60, f"{file} was not written"
        time.sleep(0.0002)
    time.sleep(late * chance.random())
    for victim in victims:
        os.kill(ranks[victim].pid, signal.SIGKILL)
    time.sleep(0.1)  # until the launcher sees it, the other rank goes on
    for process in ranks:
        process.terminate()
        process.join(30)
        assert process.exitcode is not None, "a rank hangs"


def cycles(folder: str, steps: int, kills: int, seed: int = 0) -> None:
    """Trains undisturbed in one folder and killed again and again in another; prints what became of it."""
    undisturbed, disturbed = Path(folder) / "a" / "undisturbed", Path(folder) / "a" / "disturbed"
    chance, incomplete, done, references = random.Random(seed), 0, 1, set()
    for path in (undisturbed, disturbed):
        path.mkdir(parents=True)
    _end(_start(undisturbed, steps, resume=False))
    for cycle in range(kills):
        _kill(_start(disturbed, steps, resume=cycle > 0), disturbed, done, chance)
        found = find_checkpoint(True, str(disturbed / "out"))
        done = int(found.rpartition("-")[2])
        incomplete += Path(found) != max(
            (disturbed / "out").iterdir(), key=lambda path: int(path.name.rpartition("-")[2])
        )
        references.add(_stored(disturbed))
    _end(_start(disturbed, steps, resume=True))
    references.add(_stored(disturbed))
    print(json.dumps({"kills": kills, "incomplete": incomplete, "step": done, "references": len(references)}))


def _end(ranks: list[BaseProcess]) -> None:
    for process in ranks:
        process.join(300)
        assert process.exitcode == 0


def _stored(folder: Path) -> tuple:
    """Every file of the reference store, and when it was written."""
    files = sorted(path for path in (folder / "reference").rglob("*.parquet"))
    assert files
    return tuple((str(path), path.stat().st_mtime_ns) for path in files)


def check_cycles(tmp_path: Path, steps: int, kills: int) -> dict[str, int]:
    """Runs `cycles` and holds its end to the undisturbed run, bit by bit; returns its figures."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    call = f"import test_distributed_resume; test_distributed_resume.cycles({str(tmp_path)!r}, {steps}, {kills})"
    program = [sys.executable, "-c", call]
    ran = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=1800)
    undisturbed, disturbed = tmp_path / "a" / "undisturbed", tmp_path / "a" / "disturbed"
    logs = "".join(path.read_text()[-3000:] for path in disturbed.glob("rank_*.log"))
    assert ran.returncode == 0, ran.stderr[-3000:] + logs
    weights, trained = load_file(disturbed / "trained"), load_file(undisturbed / "trained")
    assert weights.keys() == trained.keys() and trained
    assert all(torch.equal(weights[name], trained[name]) for name in trained)
    losses = json.loads((disturbed / "losses.json").read_text())
    assert len(losses) == steps and losses == json.loads((undisturbed / "losses.json").read_text())
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures["references"] == 1, "the reference store was written again"
    return figures


def test_killed_ranks_end_with_the_weights_of_an_undisturbed_run(tmp_path):
    check_cycles(tmp_path, steps=10, kills=2)


@pytest.mark.slow
def test_ranks_killed_fifty_times_end_with_the_weights_of_an_undisturbed_run(tmp_path):
    figures = check_cycles(tmp_path, steps=120, kills=50)
    print(figures)
    assert figures["kills"] == 50 and figures["incomplete"] > 5, "too few kills hit a checkpoint that was written"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "ranks", "after", "words"),
    [
        ("zero2", 4, "zero2", "cut for 2 ranks, and this run has 4; resume"),
        ("zero3", 4, "zero3", "cut for 2 ranks, and this run has 4; resume"),
        ("zero2", 2, "ddp", "only DeepSpeed's ZeRO can read"),
        ("zero3", 1, "ddp", "only DeepSpeed's ZeRO can read"),
    ],
)
def test_a_checkpoint_of_zero_is_refused_on_other_ranks_and_without_deepspeed(tmp_path, engine, ranks, after, words):
    pytest.importorskip("deepspeed")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    for folder in ("stopped", "resumed"):
        (tmp_path / folder / "packs").mkdir(parents=True)
    _run(engine, 2, tmp_path / "stopped", ["packs"], **SAVE)
    checkpoint = str(tmp_path / "stopped" / "packs" / "out" / "checkpoint-5")
    with pytest.raises((ValueError, AssertionError), match=words):
        _run(after, ranks, tmp_path / "resumed", ["packs"], resume=checkpoint)


def train_on(folder: str) -> None:
    """Trains until it is stopped; leaves the number of this process."""
    Path(folder, f"rank_{os.environ['RANK']}").write_text(str(os.getpid()))
    make("packs", Path(folder), 2, max_steps=10**6, save_total_limit=1, **{**SAVE, "save_steps": 1}).train()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_a_killed_rank_ends_the_job_with_a_message(tmp_path, launcher, killed):
    """Not with a hang: the launcher names the rank and the signal, and stops the other rank."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    folder, program, errors = tmp_path / "a" / "job", tmp_path / "program.py", tmp_path / "errors"
    folder.mkdir(parents=True)
    program.write_text(f"import test_distributed_resume\ntest_distributed_resume.train_on({str(folder)!r})\n")
    modules = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
        "accelerate launch": ["accelerate.commands.launch", "--config_file", str(engine_file("ddp"))]
        + ["--num_processes=2", "--mixed_precision=no", "--main_process_port=0"],
    }
    command = [sys.executable, "-m", *modules[launcher], str(program)]
    with errors.open("w") as stderr, subprocess.Popen(command, env=environment(), stderr=stderr) as job:
        try:
            _await(lambda: list(folder.glob("out/checkpoint-*/trainer_state.json")), job)
            pids = [int((folder / f"rank_{rank}").read_text()) for rank in (0, 1)]
            os.kill(pids[killed], signal.SIGKILL)
            assert job.wait(60) != 0
        finally:
            job.terminate()
    message = errors.read_text()
    assert f"local_rank: {killed} (pid: {pids[killed]})" in message and "Signal 9 (SIGKILL)" in message, message[-3000:]
    assert not any(Path("/proc", str(pid)).exists() for pid in pids)
    assert Path(find_checkpoint(True, str(folder / "out"))).name.startswith("checkpoint-")


def _await(condition: Callable[[], object], job: subprocess.Popen) -> None:
    start = time.time()
    while not condition():
        assert job.poll() is None and time.time() < start + 120
        time.sleep(0.05)
