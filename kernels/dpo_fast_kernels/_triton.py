"""What the Triton kernels share: exact elementwise functions, and the choice of a configuration.

A configuration is a dictionary of block sizes, `num_warps` and `num_stages`, as a launch takes them. Each kernel keeps
a table of one per architecture (major compute capability). With `DPO_FAST_AUTOTUNE=1` the kernel's candidates are timed
instead, once for every kind of input, and the winner is printed as a row to paste into the table. It is not the
default: ranks that tune apart would sum in different orders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

Config = dict[str, Any]

_tuned: dict[tuple, Config] = {}


@triton.jit
def expm1_nonpositive(x):
    """e^x − 1 for x ≤ 0 to a few ulp: the series where 1 would cancel."""
    series = 1.0 + x * (1.0 / 6.0) * (1.0 + x * (1.0 / 7.0))
    series = 1.0 + x * 0.5 * (1.0 + x * (1.0 / 3.0) * (1.0 + x * 0.25 * (1.0 + x * 0.2 * series)))
    return tl.where(x > -0.35, x * series, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    t = expm1_nonpositive(-2.0 * tl.abs(x))
    magnitude = -t / (2.0 + t)
    return tl.where(x < 0, -magnitude, magnitude)


def major_capability(device: torch.device) -> int:
    """Major compute capability of a CUDA device; 9 for the interpreter, which runs on a CPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def pick_config(
    kernel: str,
    kind: Hashable,
    table: Mapping[int, Config],
    candidates: Sequence[Config],
    device: torch.device,
    run: Callable[[Config], object],
) -> Config:
    """Returns the configuration of a kernel on a device: from its table, or the fastest candidate when tuning.

    Args:
        kernel: its name, for the printed row.
        kind: what the choice may depend on beside the device: dtype, sizes, flags.
        table: major compute capability → configuration; newer architectures take the last row.
        candidates: what tuning tries beside the table's row.
        device: where the kernel will run.
        run: launches the kernel with a configuration, any number of times: on scratch outputs if it works in place.
    """
    major = major_capability(device)
    default = table.get(major, table[max(table)])
    if os.environ.get("DPO_FAST_AUTOTUNE") != "1" or device.type != "cuda":
        return default
    key = (kernel, kind, major)
    if key not in _tuned:
        timed = []
        for config in [default, *(config for config in candidates if config != default)]:
            try:
                timed.append((triton.testing.do_bench(lambda config=config: run(config)), config))
            except triton.runtime.errors.OutOfResources:
                continue
        milliseconds, _tuned[key] = min(timed, key=lambda pair: pair[0])
        print(f"{kernel} {kind}: {major}: {_tuned[key]},  # {milliseconds:.3f} ms", flush=True)
    return _tuned[key]
