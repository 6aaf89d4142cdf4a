"""Compiles Triton kernels for GPUs that are not there, and reads what the machine code needs."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple

import pytest

CAPABILITIES = (80, 90, 100)
# For tests of seconds a chip: the quick run takes one of them.
ONE_CHIP = [90, *(pytest.param(capability, marks=pytest.mark.slow) for capability in (80, 100))]
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
# Release of Triton → kernel and capability → bytes spilled and registers used beyond the bound, as compiled there.
WORSE_THAN_LOCKED = {
    "3.9": {
        ("_linear_logps_fused_kernel", 90): (24, 0),
        ("_prefix_attention_dkv_kernel", 90): (48, 0),
        ("_merge_splits_kernel", 100): (8, 0),
        ("_row_logps_fwd_kernel", 100): (0, 1),
    },
}
TENSOR_CORE_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel.

    Attributes:
        module, kernel: where the `@triton.jit` function is found.
        types: Triton type of every argument that is neither a constant nor absent: "*bf16", "i64", "fp32",
            "tensordesc<bf16[128,64]>".
        constants: values of constexpr arguments, and None for pointers that are left out.
        options: num_warps, num_stages.
        aligned: whether pointers, and integers whose name starts with `stride`, are multiples of 16.
    """

    module: str
    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)
    aligned: bool = True


class Resources(NamedTuple):
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    tensor_cores: bool
    wide_loads: bool  # 16 bytes a thread
    waits_in_loop: bool  # threads for one another


def compile_all(cases: Sequence[Case], capability: int, workers: int = 2) -> list[Resources]:
    """Compiles every case, in processes of their own: kernels imported under the interpreter cannot be compiled."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        context = multiprocessing.get_context("spawn")
        with (
            tempfile.TemporaryDirectory() as cache,
            ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(cache,)) as pool,
        ):
            return list(pool.map(_compile, cases, [capability] * len(cases)))
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def assert_within_limits(case: Case, resources: Resources, capability: int, registers: int = 255) -> None:
    """No spills, at most `registers` registers, shared memory that the chip has.

    Configurations are chosen with the locked release of Triton. `WORSE_THAN_LOCKED` lists what is known of others.
    """
    release = ".".join(version("triton").split(".")[:2])
    spilled, more = WORSE_THAN_LOCKED.get(release, {}).get((case.kernel, capability), (0, 0))
    name = f"{case.kernel} for sm_{capability} with {dict(case.types)} {dict(case.constants)}"
    assert resources.spilled <= spilled, f"{name} spills {resources.spilled} bytes a thread"
    assert 0 < resources.registers <= min(registers + more, 255), f"{name} takes {resources.registers} registers"
    assert resources.shared <= SHARED_LIMIT[capability], f"{name} takes {resources.shared} bytes of shared memory"


def _start_worker(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache


def _compile(case: Case, capability: int) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler as nvidia
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(case.module), case.kernel)
    signature = {name: case.types.get(name, "constexpr") for name in kernel.arg_names}
    missing = {name for name, kind in signature.items() if kind == "constexpr"} - set(case.constants)
    assert not missing, f"{case.kernel} has arguments without a type or a value: {sorted(missing)}"
    divisible = [
        case.aligned and (signature[name].startswith("*") or name.startswith("stride")) and name in case.types
        for name in kernel.arg_names
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i, is_divisible in enumerate(divisible) if is_divisible}
    source = ASTSource(kernel, signature, dict(case.constants), attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(case.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return Resources(
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_cores=any(name in compiled.asm["ptx"] for name in TENSOR_CORE_INSTRUCTIONS),
        wide_loads=re.search(r"ld\.global\.[.\w]*v4\.b32", compiled.asm["ptx"]) is not None,
        waits_in_loop=any("bar" in loop for loop in _loops(compiled.asm["ptx"])),
    )


def _loops(ptx: str) -> list[str]:
    """Returns the text of every loop: from a label to a later jump to it."""
    labels = {match[1]: match.end() for match in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)}
    jumps = [(labels[match[1]], match.start()) for match in re.finditer(r"\bbra[.\w]*\s+(\$\w+)", ptx)]
    return [ptx[start:end] for start, end in jumps if start < end]
