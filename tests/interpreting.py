"""Runs checks of Triton kernels in Triton's interpreter, on a CPU, in a process of its own.

The interpreter must be asked for before the first import of a kernel, and then nothing can be compiled any more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from repository import BENCHMARKS


def environment() -> dict[str, str]:
    """The environment of a process that imports test modules too, one thread for it."""
    tests = Path(__file__).parent
    folders = [tests, *(folder for folder in tests.iterdir() if folder.is_dir()), BENCHMARKS]
    path = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def interpreted(module: str, call: str, *flags: str) -> int:
    """Returns what `module.call`, an expression such as "checks()", counted; its errors fail the test.

    `flags` are Python's own, such as -W error::RuntimeWarning for kernels in which inf and NaN never meet.
    """
    pytest.importorskip("triton", reason="Triton does not exist on this platform")
    program = f"import torch; torch.set_num_threads(1); import {module}; print({module}.{call})"
    run = subprocess.run(
        [sys.executable, *flags, "-c", program],
        env={**environment(), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return int(run.stdout.split()[-1])


def let_liger_be_interpreted() -> None:
    """Gives kernels their float arguments as Triton does, and for libdevice's functions the formulas."""
    import liger_kernel.ops.geglu
    import liger_kernel.ops.rms_norm
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats_too(argument):
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = convert_floats_too
    liger_kernel.ops.rms_norm.rsqrt = lambda x: 1 / tl.sqrt(x)
    liger_kernel.ops.geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
