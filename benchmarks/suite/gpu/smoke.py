"""Does everything run that a GPU may do otherwise than a CPU, riskiest first? One process, a line per check.

    python benchmarks/run.py smoke --out DIR

First the two ceilings: a matrix product and a copy on the device. Then the checks of `smoke_checks`, PASS or FAIL each,
and SKIP where the machine has nothing to check. The result is written after every check. Where an error leaves the
device unusable, this process starts itself again behind the check that caused it. The exit status is 1 when one fails.
Without a GPU sizes are tiny, and Triton kernels need TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from suite.gpu.smoke_checks import CHECKS, NotHere
from suite.harness.results import RESULTS, environment, write_result

_REPEATS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--skip", type=int, default=0, help="checks that an earlier process made")
    parser.add_argument("--failed", type=int, default=0, help="how many of these failed")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not options.skip:
        print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'none, a CPU at tiny sizes'}")
        measure_ceilings(device, options.out)
    lines, failed = [], options.failed
    for index, (name, check) in list(enumerate(CHECKS.items()))[options.skip :]:
        began = time.monotonic()
        status, note = run(check, device)
        lines.append(f"{status} {time.monotonic() - began:5.1f} s  {name}{note and ': ' + note}")
        print(lines[-1], flush=True)
        failed += status == "FAIL"
        bad = [line for line in lines if line.startswith("FAIL")]
        counted = f"{index + 1} of {len(CHECKS)} checks made, {failed} failed"
        part = f"smoke-from-{options.skip}" if options.skip else "smoke"
        write_result(part, {"summary": [counted, *bad], "lines": lines, "environment": environment()}, options.out)
        if status == "FAIL" and not usable(device):
            again = [sys.executable, *sys.orig_argv[1:2], "smoke", "--out", str(options.out)]
            os.execv(sys.executable, [*again, "--skip", str(index + 1), "--failed", str(failed)])
    if failed:
        sys.exit(1)


def run(check: Any, device: torch.device) -> tuple[str, str]:
    """Return PASS, FAIL or SKIP, and what there is to say."""
    try:
        note = check(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except NotHere as reason:
        return "SKIP", str(reason)
    except Exception as error:  # whatever a first run on a GPU may raise
        return "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "PASS", note or ""


def usable(device: torch.device) -> bool:
    """Return whether the device still computes after an error."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.set_sync_debug_mode("default")
        return torch.ones(8, device=device).sum().item() == 8
    except Exception:
        return False


def measure_ceilings(device: torch.device, out: Path) -> None:
    """Measure the bf16 product of 8192³ and a copy of 8 GB, and write what they took."""
    cuda = device.type == "cuda"
    size, copied = (8192, 8 * 10**9) if cuda else (256, 10**7)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_ms = median_ms(lambda: torch.mm(a, b), device)
    source = torch.randint(256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), device)
    tflops, rate = 2 * size**3 / product_ms / 1e9, 2 * copied / copy_ms / 1e9
    line = f"product {size}³ bf16 {tflops:.4g} TFLOP/s ({product_ms:.4g} ms), copy {rate:.4g} TB/s ({copy_ms:.4g} ms)"
    print(line, flush=True)
    result = {"product_ms": product_ms, "copy_ms": copy_ms, "tflops": tflops, "tb_per_second": rate}
    write_result("ceilings", {**result, "summary": [line], "environment": environment()}, out)


def median_ms(function: Any, device: torch.device) -> float:
    """Return the median milliseconds of a call."""
    times = []
    for _ in range(_REPEATS + 3):  # the first three warm up
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - began))
    return sorted(times[3:])[_REPEATS // 2]
