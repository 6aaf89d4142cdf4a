"""The fused LM head compiles for every GPU that it has a configuration for: on tensor cores, no spills, in bounds."""

from __future__ import annotations

from itertools import product

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton, which this platform lacks")

from compiling import CAPABILITIES, ONE_CHIP, Case, Resources, assert_within_limits, compile_all
from dpo_fast_kernels.head import linear_logps_fused as module
from dpo_fast_kernels.head.logits import STATISTICS

SMALL_SHARED_MEMORY = 101376  # of sm_86, sm_89 and sm_120, which take the rows of 8 and 12
MODULE = "dpo_fast_kernels.head.linear_logps_fused"
PARTIAL_SUMS = ("moment_ptr", "square_ptr", "logit_sum_ptr")
OPTIONAL = ("bias_ptr", *PARTIAL_SUMS)
OUTPUTS = tuple(f"{name}_ptr" for name in STATISTICS)
DTYPES = ("bf16", "fp16", "fp32")
LEAN, EVERYTHING = ((), False), (OPTIONAL, True)


def pointers(kinds: dict[str, str], given: tuple[str, ...], optional: tuple[str, ...]):
    """Returns types of the pointers that are always there and of those in `given`, and None for the others."""
    types = {name: kind for name, kind in kinds.items() if name not in optional or name in given}
    return types, {name: None for name in optional if name not in given}


def fused(
    dtype: str,
    config: dict,
    descriptors: bool,
    given: tuple[str, ...] = (),  # of OPTIONAL
    softcap: bool = False,
    aligned: bool = True,
    hidden: int = 4096,
) -> Case:
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    blocks = {name: value for name, value in config.items() if name not in options}
    kinds = dict.fromkeys(("target_logit_ptr", "peak_ptr", "total_ptr", *PARTIAL_SUMS), "*fp32")
    types, absent = pointers({**kinds, "targets_ptr": "*i64", "bias_ptr": f"*{dtype}"}, given, OPTIONAL)
    for name, rows in (("hidden", blocks["BLOCK_N"]), ("weight", blocks["BLOCK_V"])):
        types[name] = f"tensordesc<{dtype}[{rows},{blocks['BLOCK_H']}]>" if descriptors else f"*{dtype}"
    types |= dict.fromkeys(("N", "V", "stride_xn", "stride_wv", "splits", "blocks_per_split", "group_size"), "i32")
    types |= {"inner": "fp32", "outer": "fp32"}
    constants = {**absent, **blocks, "stride_xh": 1, "stride_wh": 1, "H": hidden}
    constants |= {"HAS_SOFTCAP": softcap, "DESCRIPTORS": descriptors}
    return Case(MODULE, "_linear_logps_fused_kernel", types, constants, options, aligned)


def merge(given: tuple[str, ...]) -> Case:
    optional = (*PARTIAL_SUMS, *OUTPUTS)
    kinds = dict.fromkeys(("target_logit_ptr", "peak_ptr", "total_ptr", "logps_ptr", "lse_ptr", *optional), "*fp32")
    types, absent = pointers({**kinds, "targets_ptr": "*i64"}, given, optional)
    types |= dict.fromkeys(("N", "V", "splits"), "i32")
    constants = {**absent, "BLOCK_N": module._MERGED_ROWS, "BLOCK_S": module._MERGED_SPLITS}
    return Case(MODULE, "_merge_splits_kernel", types, constants)


def table(capability: int, dtypes: tuple[str, ...], variants: tuple[tuple[tuple[str, ...], bool], ...]) -> list[Case]:
    """What the tables make: descriptors or pointers to aligned rows, and pointers to rows that are not aligned."""
    large = module._CONFIGS[capability // 10]
    (small,) = module._SMALL_CONFIGS.values()
    cases = []
    for dtype, (given, softcap) in product(dtypes, variants):
        if dtype == "fp32":
            cases.append(fused(dtype, small, False, given, softcap))
        else:
            cases.append(fused(dtype, large, capability >= 90, given, softcap))
        cases.append(fused(dtype, small, False, given, softcap, aligned=False, hidden=577))
    return cases


def assert_compiles(cases: list[Case], capability: int, chip: int | None = None) -> list[Resources]:
    """Asserts bounds of `capability`, for code that is compiled for `chip`."""
    found = compile_all(cases, chip or capability)
    for case, resources in zip(cases, found, strict=True):
        assert_within_limits(case, resources, capability)
        halves = "16" in case.types.get("hidden", "")
        assert not halves or resources.tensor_cores, f"{case.types['hidden']} on sm_{capability} without tensor cores"
    return found


@pytest.mark.parametrize("dtypes", [("bf16", "fp32"), pytest.param(("fp16",), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("capability", ONE_CHIP)
def test_compiles_within_limits(capability, dtypes):
    cases = [*table(capability, dtypes, (LEAN, EVERYTHING)), merge(()), merge((*PARTIAL_SUMS, *OUTPUTS))]
    assert len(cases) == 4 * len(dtypes) + 2
    assert_compiles(cases, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_single_option_compiles(capability):
    variants = (*(((name,), False) for name in OPTIONAL), ((), True), (PARTIAL_SUMS, False), (PARTIAL_SUMS, True))
    assert_compiles(table(capability, DTYPES, variants), capability)


@pytest.mark.slow
@pytest.mark.parametrize("chip, capability", [(86, 80), (89, 80), (120, 90)])
def test_compiles_for_chips_with_little_shared_memory(chip, capability):
    for resources in assert_compiles(table(chip, DTYPES, (LEAN, EVERYTHING)), capability, chip):
        assert resources.shared <= SMALL_SHARED_MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_candidates_compile(capability):
    """Tuning may find one slow, or too large for the chip; it must not fail to compile."""
    cases = [fused("bf16", config, capability >= 90, *EVERYTHING) for config in module._CANDIDATES]
    cases += [fused("fp32", config, False, *EVERYTHING) for config in module._SMALL_CANDIDATES]
    for case, resources in zip(cases, compile_all(cases, capability), strict=True):
        assert resources.registers <= 255, case
        assert resources.tensor_cores == (case.types["hidden"] != "*fp32"), case


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [1, 40, 64, 576])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_short_rows_compile(capability, hidden):
    """Rows of one block and of part of one, where the loop over H goes."""
    (small,) = module._SMALL_CONFIGS.values()
    cases = [fused(dtype, small, False, *EVERYTHING, aligned=False, hidden=hidden) for dtype in DTYPES]
    if hidden > 1:
        cases.append(fused("bf16", module._CONFIGS[capability // 10], capability >= 90, *EVERYTHING, hidden=hidden))
    assert_compiles(cases, capability)
