"""Result files: hardware and versions, medians with their spread."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_fast.commands.bench import measurement

RESULTS = Path(__file__).parents[2] / "results"
PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "datasets", "peft"),
    *("trl", "flash-attn", "liger-kernel", "cut-cross-entropy"),
)


def hardware() -> str:
    """Return a short name of the machine, fit for a file name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{os.cpu_count()}-{_cpu_features()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu_features() -> str:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    return next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), platform.machine())


def environment() -> dict[str, Any]:
    """Return versions, device, commit and command line, which a figure must be quoted with."""
    try:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # a machine without git
        commit = ""
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "commit": commit,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": measurement.versions(PACKAGES),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median with the 20th and 80th percentile, and the number of values."""
    return {**measurement.spread(values), "count": len(values)}


def write_result(question: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `<date>_<hardware>_<question>.json` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.date.today().isoformat()}_{hardware()}_{question}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
