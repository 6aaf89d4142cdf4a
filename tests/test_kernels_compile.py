"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 in every dtype, without spills, within the hardware."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton, which this platform lacks")

PROGRAM = """
import itertools, os, re, subprocess, sys, tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.backends.nvidia import compiler as nvidia
from dpo_fast_kernels import row_logps

capability = int(sys.argv[1])
block, warps = row_logps._CONFIGS[capability // 10]
POINTERS = {"targets_ptr": "*i64", "is_top1_ptr": "*i1"}
FLOATS = ("logps_ptr", "lse_ptr", "entropy_ptr", "mean_logit_ptr", "coefficient_ptr")
ABSENT = {
    "bias_ptr": "HAS_BIAS", "coefficient_ptr": "HAS_COEFFICIENT",
    "entropy_ptr": "STATISTICS", "mean_logit_ptr": "STATISTICS", "is_top1_ptr": "STATISTICS",
}


def resources(kernel, dtype, flags, even):
    constants = {**flags, "BLOCK_V": block}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif not flags.get(ABSENT.get(name), True):
            signature[name], constants[name] = "constexpr", None
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name) or ("*fp32" if name in FLOATS else f"*{dtype}")
        elif name == "V" or name.startswith("stride"):
            signature[name] = "i64" if name.startswith("stride") else "i32"
        else:
            signature[name] = "fp32"
    aligned = [name.endswith("_ptr") or (name.startswith("stride") and even) for name in kernel.arg_names]
    attributes = {(i,): [["tt.divisibility", 16]] for i, divisible in enumerate(aligned) if divisible}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    figures = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage.stdout)}
    return figures, compiled.metadata.shared


for dtype in ("fp32", "bf16", "fp16"):
    for kernel, names in (
        (row_logps._row_logps_fwd_kernel, ("HAS_BIAS", "HAS_SOFTCAP", "STATISTICS")),
        (row_logps._row_logps_bwd_kernel, ("HAS_BIAS", "HAS_SOFTCAP", "HAS_COEFFICIENT")),
    ):
        for on, even in itertools.product((False, True), repeat=2):  # leanest and richest; rows aligned or not
            figures, shared = resources(kernel, dtype, dict.fromkeys(names, on), even)
            spilled = figures["STACK"] + figures["LOCAL"]
            print("kernel", kernel.__name__, dtype, f"{on=},{even=}", figures["REG"], spilled, shared)
"""
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
REGISTER_LIMIT = 80  # of 8 warps: three programs fit a multiprocessor and keep 48 KiB of loads in flight


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_row_kernels_compile_within_limits(capability, tmp_path):
    # A process of its own: kernels imported under the interpreter cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(capability)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines() if line.startswith("kernel ")]
    assert len(lines) == 24, "every kernel, dtype and variant reports once"
    for _, kernel, dtype, variant, registers, spilled, shared in lines:
        name = f"{kernel} {dtype} variant {variant} sm_{capability}"
        assert int(spilled) == 0, f"{name} spills {spilled} bytes"
        assert 0 < int(registers) <= REGISTER_LIMIT, f"{name} takes {registers} registers"
        assert int(shared) <= SHARED_LIMIT[capability], f"{name} takes {shared} bytes of shared memory"
