"""One side of run.py speed, as a job for a process of its own: what the process may allocate, and who trains in it.

A process may take what the machine has to spare when it starts, or what it is given. What needs more fails in that
process alone, and is reported as a setting that does not fit.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from dpo_fast.commands.bench.turns import Comparison, TrainerError, compare, each_alone
from dpo_fast.commands.bench.worker import StepGate, TrainingLoop, TrainJob
from dpo_fast.machine import free_memory, process_memory
from suite.training.providers import PROVIDERS, Log
from suite.training.setting import Setting

_RESERVE = 2**30  # bytes that stay free for everything else


def measure(settings: Mapping[str, Setting], folder: str) -> Comparison:
    """Run all steps of every side: in turns on a CPU, one side after the other on a GPU.

    A GPU's clock is steady, and its allocator slow where memory is short: there each side has the memory to itself. A
    side that fails for another reason than memory ends the program.
    """
    jobs = {name: side_job(setting, folder) for name, setting in settings.items()}
    try:
        return (each_alone if torch.cuda.is_available() else compare)(jobs, required=jobs)
    except TrainerError as error:
        sys.exit(f"a side ended with an error: {error}")


def side_job(setting: Setting, folder: str) -> TrainJob:
    """Return the job of a side that trains the rows of `folder`."""
    watch = "suite.training.probe:StepProbe" if setting.watched else None
    return TrainJob("suite.training.side:build", (setting, folder), setting.steps, watch)


def build(setting: Setting, folder: str) -> TrainingLoop:
    """Bound this process, build its trainer, and return the loop."""
    limit_memory(setting.memory_gib)
    train = PROVIDERS[setting.provider](setting, folder, f"{folder}/output-{setting.provider}")

    def noted(gate: StepGate) -> Log:
        log = train(gate)
        gate.notes["attention"] = getattr(gate.model, "causal_lm", gate.model).config._attn_implementation
        retries = torch.cuda.memory_stats()["num_alloc_retries"] if torch.cuda.is_available() else 0
        gate.notes["allocation_retries"] = retries
        return log

    return noted


def limit_memory(gib: float | None) -> None:
    """Bound what this process may allocate from now on: to `gib`, or on a CPU to what is free."""
    if torch.cuda.is_available():
        if gib is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / torch.cuda.mem_get_info()[1]))
        return
    Path("/proc/self/oom_score_adj").write_text("1000")  # should it come to that, the kernel takes this process first
    spare = int(gib * 2**30) if gib is not None else free_memory(torch.device("cpu")) - _RESERVE
    limit = process_memory("VmData") + spare
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
