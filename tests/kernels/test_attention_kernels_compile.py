"""Every kernel of shared-prefix attention compiles for sm_80, sm_90 and sm_100 in every configuration of its tables:
nothing spills, shared memory fits the chip, and 16-bit products run on tensor cores.

By default the configurations of the commonest models, and those that need rows of their own under Triton 3.6; `-m slow`
compiles all of them. Run with Triton 3.6 and with 3.7.
"""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton, which this platform lacks")

from compiling import CAPABILITIES, ONE_CHIP, Case, assert_within_limits, compile_all
from dpo_fast_kernels.attention import triton_configs as configs

# Kernel → its table with or without a window and a softcap, what has the inputs' dtype, and whose strides it takes.
KERNELS = {
    "fwd": (lambda window, softcap: configs.fwd_table(softcap), "q k v out", "qkv"),
    "dq": (lambda window, softcap: configs.DQ, "q k v out dout dq", "qkvod"),
    "dkv": (configs.dkv_table, "q k v dout dk dv", "qkvd"),
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
HEAD_DIMS = (64, 128, 256)
FLAGS = list(itertools.product((False, True), repeat=2))
SMALL_CHIP = 101376  # bytes of shared memory a program has on sm_86, sm_89 and sm_120, which take the row of sm_80


def case(kernel: str, dtype: str, head_dim: int, window: bool, softcap: bool, capability: int) -> Case:
    """One configuration; with both options the head does not fill its block."""
    table, names, strides = KERNELS[kernel]
    config = dict(table(window, softcap)[head_dim, ITEMSIZE[dtype]][capability // 10])
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    types = {f"{name}_ptr": f"*{dtype}" for name in names.split()}
    types |= {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "spans_ptr": "*i32", "T": "i32", "window": "i32"}
    types |= dict.fromkeys(("scale", "inner", "outer"), "fp32")
    types |= {f"stride_{x}{axis}": "i32" for x in strides for axis in "th"}
    constants = {
        "GROUP": 4,
        "HAS_WINDOW": window,
        "HAS_SOFTCAP": softcap,
        "D": head_dim - 16 if window and softcap else head_dim,
        "BLOCK_D": head_dim,
        **config,
    }
    module, function = f"dpo_fast_kernels.attention.triton_{kernel}", f"_prefix_attention_{kernel}_kernel"
    return Case(module, function, types, constants, options)


def assert_all(cases: list[Case], capability: int) -> None:
    for case, resources in zip(cases, compile_all(cases, capability), strict=True):
        assert_within_limits(case, resources, capability)
        assert resources.registers > 16, f"{case.kernel} was compiled to nothing: {dict(case.constants)}"
        halves = case.types["q_ptr"] != "*fp32"
        assert resources.tensor_cores == halves, f"{case.kernel}: tensor cores are {resources.tensor_cores}"
        if capability == 80:
            assert resources.shared <= SMALL_CHIP, f"{case.kernel} takes {resources.shared} bytes of shared memory"


@pytest.mark.parametrize(
    ("capability", "head_dims"),
    [(90, (64, 128)), *(pytest.param(chip, (128,), marks=pytest.mark.slow) for chip in (80, 100))],
)
def test_common_configurations_compile_within_limits(capability, head_dims):
    assert_all(
        [case(kernel, "bf16", head_dim, False, False, capability) for kernel in KERNELS for head_dim in head_dims],
        capability,
    )


# Kernel, dtype, head size, window, softcap: what Triton 3.6 spills with the blocks that 3.7 does not spill with.
TIGHT = {
    80: [
        *(("dkv", "bf16", 64, window, True) for window in (False, True)),
        ("fwd", "fp32", 64, True, True),
        ("fwd", "fp32", 128, True, False),
    ],
    90: [("dkv", "bf16", 128, *flags) for flags in FLAGS if any(flags)],
    100: [("fwd", "bf16", 64, False, True), *(("fwd", "fp32", 128, window, True) for window in (False, True))],
}


@pytest.mark.parametrize("capability", ONE_CHIP)
def test_the_tightest_configurations_compile_within_limits(capability):
    assert_all([case(*tight, capability) for tight in TIGHT[capability]], capability)


def test_every_row_of_a_table_is_compiled():
    for table_of, *_ in KERNELS.values():
        for table in (table_of(*flags) for flags in FLAGS):
            assert set(table) == set(itertools.product(HEAD_DIMS, set(ITEMSIZE.values())))
            for rows in table.values():
                assert set(rows) == {*(capability // 10 for capability in CAPABILITIES), 12} and rows[12] == rows[8]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration_compiles_within_limits(kernel, capability, dtype):
    cases = [case(kernel, dtype, head_dim, *flags, capability) for head_dim in HEAD_DIMS for flags in FLAGS]
    assert_all(cases, capability)
