"""The kernels on rows of logits compile for sm_80, sm_90 and sm_100 in every dtype, without spills, within the chip.

They load 16 bytes a thread whatever V is, and their threads wait for one another once a row, not once a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton, which this platform lacks")

from compiling import ONE_CHIP, Case, assert_within_limits, compile_all

MODULE = "dpo_fast_kernels.head.rows_triton"
REGISTER_LIMIT = 48  # of 8 warps: five programs fit a multiprocessor and keep 40 KiB of loads in flight
STATISTICS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
ROWS = {f"{name}_ptr": "*fp32" for name in ("logps", "lse")} | {"targets_ptr": "*i64"}
TRANSFORM = {"V": "i32", "stride_zn": "i64", "inner": "fp32", "outer": "fp32"}


def forward(dtype: str, rich: bool, config: dict) -> tuple[dict, dict]:
    types = {"z_ptr": f"*{dtype}", **ROWS, **TRANSFORM}
    optional = {f"{name}_ptr": "*fp32" for name in STATISTICS} | {"bias_ptr": f"*{dtype}"}
    flags = dict.fromkeys(("HAS_BIAS", "HAS_SOFTCAP", *(f"HAS_{name.upper()}" for name in STATISTICS)), rich)
    return types | (optional if rich else {}), flags | ({} if rich else dict.fromkeys(optional))


def backward(dtype: str, rich: bool, config: dict) -> tuple[dict, dict]:
    types = {"z_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", **ROWS, **TRANSFORM, "stride_on": "i64"}
    optional = {"bias_ptr": f"*{dtype}", "coefficient_ptr": "*fp32"}
    flags = dict.fromkeys(("HAS_BIAS", "HAS_SOFTCAP", "HAS_COEFFICIENT"), rich)
    return types | (optional if rich else {}), flags | ({} if rich else dict.fromkeys(optional))


def cases(capability: int) -> Iterator[Case]:
    """Every dtype, leanest and richest, rows aligned or not."""
    from dpo_fast_kernels.head import rows_triton

    config = rows_triton._CONFIGS[capability // 10]
    options = {"num_warps": config["num_warps"]}
    for kernel, arguments in (("_row_logps_fwd_kernel", forward), ("_row_logps_bwd_kernel", backward)):
        for dtype in ("fp32", "bf16", "fp16"):
            for rich in (False, True):
                types, constants = arguments(dtype, rich, config)
                for aligned in (False, True):
                    blocks = {"BLOCK_V": config["BLOCK_V"]}
                    if kernel == "_row_logps_fwd_kernel":
                        blocks |= rows_triton.lanes(4 if dtype == "fp32" else 2, aligned, config)
                    yield Case(MODULE, kernel, types, {**constants, **blocks}, options, aligned=aligned)
    for offsets in ("*i32", "*i64"):
        types = {"logps_ptr": "*fp32", "cu_scores_ptr": offsets, "sums_ptr": "*fp32", "N": "i32", "S": "i32"}
        yield Case(MODULE, "_sequence_sums_kernel", types, {"BLOCK_N": rows_triton._SUM_BLOCK}, {"num_warps": 4})


@pytest.mark.parametrize("capability", ONE_CHIP)
def test_row_kernels_compile_within_limits(capability):
    every = list(cases(capability))
    assert len(every) == 26
    for case, resources in zip(every, compile_all(every, capability), strict=True):
        assert_within_limits(case, resources, capability, registers=REGISTER_LIMIT)
        if "V" in case.types:  # of which nothing is known: only the last block has a mask
            assert resources.wide_loads == case.aligned, case
            assert not resources.waits_in_loop, case
