"""Which kernels does a training step of ours spend its time in?

    python benchmarks/run.py kernels --model llama-3.2-1b --batch_size 8 --out DIR

One step is traced after two that warm up. On a GPU the times are those of its kernels, and the step's own time stands
beside their sum: what is left is time in which the device waited. On a CPU they are those of PyTorch's operators.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from suite.harness.results import RESULTS, environment, write_result
from suite.training.models import RANDOM_MODELS, model_config
from suite.training.providers import PROVIDERS
from suite.training.setting import Setting
from suite.training.workloads import save_rows, synthetic_groups

_TOP = 25
_KINDS = {  # the first whose words are in a kernel's name
    "attention": "flash|fmha|prefix_attention|_attention",
    "products": "gemm|cutlass|nvjet|xmma|cublas|::mm|addmm|linear|bmm",
    "head and gather": "row_logps|sequence_sums|segment_sum|linear_logps",
    "optimizer": "multi_tensor|adam|foreach",
    "elementwise": "elementwise|reduce|copy|cat|vectorized|index|embedding|fill|softmax|triton_",
}


class _Gate:
    """Milestones of a training loop; traces its third step."""

    def __init__(self, device: torch.device):
        self.notes: dict[str, Any] = {}
        self._device, self._step, self.seconds = device, 0, 0.0
        cuda = device.type == "cuda"
        self.profile = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])

    def begin(self, model: torch.nn.Module) -> None:
        pass

    def runs(self, positions: int) -> None:
        pass

    def logged(self) -> None:
        pass

    def step_begins(self) -> None:
        if self._step == 2:
            self._wait()
            self.profile.start()
            self._began = time.perf_counter()

    def step_ends(self) -> None:
        if self._step == 2:
            self._wait()
            self.seconds = time.perf_counter() - self._began
            self.profile.stop()
        self._step += 1

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=RANDOM_MODELS, default="llama-3.2-1b")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(
        "dpo_fast",
        options.model,
        micro_batch=options.batch_size,
        precision="bf16",
        max_length=options.max_length,
        steps=2,
        watched=False,
    )
    groups = synthetic_groups(
        "ultrafeedback",
        setting.rows * setting.all_steps,
        group_size=2,
        max_length=options.max_length,
        vocab_size=model_config(options.model).vocab_size,
    )
    gate = _Gate(device)
    with tempfile.TemporaryDirectory() as folder:
        save_rows(groups, folder)
        PROVIDERS["dpo_fast"](setting, folder, f"{folder}/output")(gate)
    rows = kernel_times(gate.profile, device)
    result = {
        "question": "kernels of one training step",
        "step_ms": 1e3 * gate.seconds,
        "kernels": rows,
        "by_kind_ms": by_kind(rows),
        "settings": {name: str(value) for name, value in vars(options).items()},
        "environment": environment(),
    }
    result["summary"] = summary(result)
    print("\n".join(result["summary"]))
    print(write_result(f"kernels-{options.model}", result, options.out))


def kernel_times(found: profile, device: torch.device) -> list[dict[str, Any]]:
    """Return name, calls and milliseconds of every kernel, the longest first."""
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = [
        {"name": each.key, "calls": each.count, "ms": getattr(each, name) / 1e3}
        for each in found.key_averages()
        if getattr(each, name) > 0
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def kind_of(name: str) -> str:
    return next((kind for kind, words in _KINDS.items() if re.search(words, name, re.IGNORECASE)), "rest")


def by_kind(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the milliseconds of all kernels of a kind."""
    kinds = dict.fromkeys([*_KINDS, "rest"], 0.0)
    for row in rows:
        kinds[kind_of(row["name"])] += row["ms"]
    return kinds


def summary(result: dict[str, Any]) -> list[str]:
    total = sum(result["by_kind_ms"].values())
    kinds = ", ".join(f"{kind} {ms:.2f}" for kind, ms in result["by_kind_ms"].items())
    lines = [f"step {result['step_ms']:.1f} ms, kernels {total:.1f} ms: {kinds}"]
    for row in result["kernels"][:_TOP]:
        lines.append(f"{row['ms']:9.3f} ms {row['ms'] / total:6.1%} {row['calls']:6d}×  {row['name'][:70]}")
    return lines
