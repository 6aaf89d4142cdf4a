"""Peak memory of this process: of PyTorch's allocator on a GPU, resident memory (VmHWM) on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak of resident memory starts anew


def peak_memory() -> int:
    """Bytes, since the last reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
