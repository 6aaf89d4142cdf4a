"""The fused LM head: as near the truth as eager PyTorch, however the vocabulary is split; every output is written,
equal runs are bitwise equal, and what is not a number stays so.

The same checks run under Triton's interpreter, in a process of its own and in small blocks, and on a GPU with `-m gpu`.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from math import ceil

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

pytest.importorskip("triton", reason="Triton does not exist on this platform")

from dpo_fast_kernels.head import linear_logps_fused as module
from dpo_fast_kernels.head.linear_logps_fused import linear_logps_fused
from dpo_fast_kernels.head.logits import STATISTICS, LogitTransform
from dpo_fast_kernels.specification import linear_logps_reference, row_logps_reference
from interpreting import interpreted
from numerics import assert_close_to_truth

TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=-0.3, temperature=0.7),
    "capped": LogitTransform(scale=1.5, softcap=5.0, temperature=1.3),
}
PLAIN = TRANSFORMS["plain"]
TRUTH_ROWS = 256  # whose logits are held in float64 at a time


class Problem:
    """Arguments of the head, on `device`; a third of the targets are the most likely word."""

    def __init__(self, n: int, h: int, v: int, dtype=torch.float32, biased=False, device="cpu"):
        generator = torch.Generator(device).manual_seed(1000 * n + v)

        def normal(*shape, scale=1.0):
            return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

        self.hidden, self.weight = normal(n, h), normal(v, h, scale=3 / h**0.5)
        self.bias = normal(v) if biased else None
        self.targets = torch.randint(v, (n,), generator=generator, device=device)
        self.targets[::3] = linear(self.hidden[::3], self.weight, self.bias).argmax(-1)

    def solve(self, transform=PLAIN, names=STATISTICS) -> dict[str, Tensor]:
        statistics = {name: torch.full_like(self.targets, torch.nan, dtype=torch.float32) for name in names}
        arguments = (self.hidden, self.weight, self.targets, self.bias)
        logps, lse = linear_logps_fused(*arguments, transform=transform, statistics=statistics)
        return {"logps": logps, "lse": lse, **statistics}

    def expected(self, transform=PLAIN, true=False) -> dict[str, Tensor]:
        """Returns what eager PyTorch makes of it in the same dtype, or the truth in float64."""
        weight, bias = (t.double() if true and t is not None else t for t in (self.weight, self.bias))
        parts = []
        for hidden, targets in zip(self.hidden.split(TRUTH_ROWS), self.targets.split(TRUTH_ROWS), strict=True):
            if true:
                result = linear_logps_reference(hidden.double(), weight, targets, bias, transform, statistics=True)
                z = linear(hidden.double(), weight, bias)
            else:
                z = linear(hidden, weight, bias).float()
                result = row_logps_reference(z, targets, transform, statistics=True)
            logits = transform(z)
            others = logits.scatter(1, targets[:, None], -torch.inf).amax(-1)
            margin = logits.gather(1, targets[:, None])[:, 0] - others
            values = {name: getattr(result, name) for name in ("logps", *STATISTICS)}
            parts.append({**values, "lse": logits.logsumexp(-1), "margin": margin})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def assert_solution(problem: Problem, transform: LogitTransform = PLAIN) -> dict[str, Tensor]:
    """Asserts values, and returns them."""
    actual, eager, truth = problem.solve(transform), problem.expected(transform), problem.expected(transform, true=True)
    for name in ("logps", "lse", "entropy", "mean_logit", "log_sum_sq_probs"):
        assert_close_to_truth(actual[name], eager[name], truth[name], name)
    clear = truth["margin"].abs() > 1e-3  # no tie within rounding
    assert torch.equal(actual["is_top1"][clear], truth["is_top1"].float()[clear])
    return actual


@contextmanager
def blocks_per_split(blocks: int):
    before, module._blocks_per_split = module._blocks_per_split, lambda *_: blocks
    try:
        yield
    finally:
        module._blocks_per_split = before


def check_values(n, h, v, dtype, transform, biased, device="cpu") -> None:
    assert_solution(Problem(n, h, v, dtype, biased, device), transform)


def check_splits(device="cpu") -> None:
    """One split, one for every block, and between them with a short last one."""
    problem = Problem(63, 40, 507, torch.float16, device=device)
    solutions = []
    for blocks in (1000, 1, 2):
        with blocks_per_split(blocks):
            solutions.append(assert_solution(problem, TRANSFORMS["scaled"]))
    for solution in solutions[1:]:
        for name in solution:
            assert torch.allclose(solution[name], solutions[0][name], rtol=1e-5, atol=1e-5), name


def check_statistics_change_nothing(device="cpu") -> None:
    """The pass for the reference and the one for training must give the same log-probs, whatever is measured beside."""
    problem = Problem(30, 40, 200, torch.float16, biased=True, device=device)
    every = problem.solve()
    for names in ((), *((name,) for name in STATISTICS)):
        some = problem.solve(names=names)
        assert set(some) == {"logps", "lse", *names}
        for name in some:
            assert torch.equal(some[name], every[name]), f"{name} with {names}"


def check_no_rows(device="cpu") -> None:
    for values in Problem(3, 40, 50, device=device).solve().values():
        assert values.shape == (3,)
    empty = Problem(3, 40, 50, device=device)
    empty.hidden, empty.targets = empty.hidden[:0], empty.targets[:0]
    assert all(values.shape == (0,) for values in empty.solve().values())


def check_strides(device="cpu") -> None:
    """Rows far apart, rows at odd addresses, columns for rows: all give what contiguous tensors give."""
    for dtype in (torch.float16, torch.float32):
        problem = Problem(20, 40, 90, dtype, device=device)
        expected = problem.solve()
        hidden, weight = problem.hidden, problem.weight
        wide = torch.full((90, 81), torch.nan, dtype=dtype, device=device)
        for columns in (slice(0, 40), slice(1, 41), slice(1, 81, 2)):
            problem.weight = wide[:, columns].copy_(weight)
            for name, values in problem.solve().items():
                assert torch.allclose(values, expected[name], rtol=1e-5, atol=1e-5), f"{name} with columns {columns}"
        problem.weight, problem.hidden = weight.t().contiguous().t(), hidden.t().contiguous().t()
        for name, values in problem.solve().items():
            assert torch.allclose(values, expected[name], rtol=1e-5, atol=1e-5), f"{name} with columns for rows"


def check_bad_targets(device="cpu") -> None:
    """NaN, and for that row alone; also a target that is one within 32 bits."""
    problem = Problem(20, 40, 90, device=device)
    expected = problem.solve()
    problem.targets[[2, 5, 7, 11]] = torch.tensor([-1, 90, 2**32 + 5, -(2**63)], device=device)
    actual = problem.solve()
    bad = torch.zeros(20, dtype=torch.bool, device=device)
    bad[[2, 5, 7, 11]] = True
    assert torch.equal(actual["logps"].isnan(), bad)
    assert torch.equal(actual["logps"][~bad], expected["logps"][~bad])
    assert (actual["is_top1"][bad] == 0).all()
    for name in ("lse", "entropy", "mean_logit", "log_sum_sq_probs"):
        assert torch.equal(actual[name], expected[name]), name


def check_not_a_number(device="cpu") -> None:
    for dtype, value in itertools.product((torch.float32, torch.float16), (torch.nan, torch.inf, -torch.inf)):
        problem = Problem(20, 40, 90, dtype, device=device)
        expected = problem.solve()
        problem.hidden[3, 39] = value
        actual = problem.solve()
        others = torch.arange(20, device=device) != 3
        for name in actual:
            assert torch.equal(actual[name][others], expected[name][others]), f"{name} beside a row with {value}"
        for name in ("logps", "entropy", "log_sum_sq_probs", "mean_logit"):
            assert actual[name][3].isnan(), f"{name} of a row with {value}"
        assert actual["is_top1"][3] == 0
    problem = Problem(20, 40, 90, device=device)
    problem.weight[70, 0] = torch.nan  # one word, which a maximum alone would pass over
    actual = problem.solve()
    for name in ("logps", "lse", "entropy", "mean_logit", "log_sum_sq_probs"):
        assert actual[name].isnan().all(), f"{name} beside a word that is not a number"


def check_masked_vocabulary(device="cpu") -> None:
    """A bias of −inf takes words out of the vocabulary, whole blocks and splits of them too."""
    problem = Problem(5, 40, 403, device=device)
    eager, truth = problem.expected(), problem.expected(true=True)
    masked = Problem(5, 40, 403, device=device)
    masked.weight = torch.cat([torch.ones(600, 40, device=device), problem.weight, torch.ones(300, 40, device=device)])
    masked.bias = torch.zeros(1303, device=device)
    masked.bias[:600] = masked.bias[1003:] = -torch.inf
    masked.targets = problem.targets + 600
    for blocks in (1, 3, 1000):
        with blocks_per_split(blocks):
            actual = masked.solve()
        for name in ("logps", "lse", "entropy", "log_sum_sq_probs"):
            assert_close_to_truth(actual[name], eager[name], truth[name], name)
        assert torch.equal(actual["mean_logit"], torch.full((5,), -torch.inf, device=device))
        assert torch.equal(actual["is_top1"], truth["is_top1"].float())
    masked.targets[0] = 0
    assert masked.solve()["logps"][0] == -torch.inf


def check_sum_of_a_sequence(dtype=torch.float16, device="cpu") -> None:
    """Rounding must not add up: 512 token log-probs of one completion."""
    for transform in (PLAIN, TRANSFORMS["capped"]):
        problem = Problem(512, 64, 1003, dtype, device=device)
        truth = problem.expected(transform, true=True)["logps"].sum()
        assert (problem.solve(transform)["logps"].double().sum() - truth).abs() <= 1e-3


def check_bitwise_repeat(device="cpu", n=63, h=40, v=507, dtype=torch.float16) -> None:
    problem = Problem(n, h, v, dtype, biased=True, device=device)
    first, second = problem.solve(TRANSFORMS["capped"]), problem.solve(TRANSFORMS["capped"])
    for name in first:
        assert torch.equal(first[name], second[name]), name


def check_far_rows(device="cpu") -> None:
    """Rows and words that begin 2³¹ elements into their tensors, which neither number nor stride tells."""
    near = Problem(3, 40, 3, torch.float16, device=device)
    memory = torch.empty(2**31 + 41, dtype=torch.float16, device=device)  # three rows of it are ever touched
    for offset, where in itertools.product((0, 1), ("hidden", "weight")):
        far = Problem(3, 40, 3, torch.float16, device=device)
        rows = memory[offset:].as_strided((3, 40), (2**30, 1), memory[offset:].storage_offset())
        setattr(far, where, rows.copy_(getattr(near, where)))
        for (name, values), expected in zip(far.solve().items(), near.solve().values(), strict=True):
            assert torch.allclose(values, expected, rtol=1e-5, atol=1e-5), f"{name} of far {where} at offset {offset}"


CHECKS = (
    check_splits,
    check_statistics_change_nothing,
    check_no_rows,
    check_strides,
    check_bad_targets,
    check_not_a_number,
    check_masked_vocabulary,
    check_sum_of_a_sequence,
    check_bitwise_repeat,
)
ODD_SIZES = ((1, 40, 507), (5, 40, 1), (7, 1, 90), (33, 63, 100))


def interpreted_checks() -> int:
    """Runs the checks under the interpreter, in blocks small enough that there are several of all; returns how many."""
    check_far_rows()
    launch, loads = module._launch, set()
    module._launch = lambda *arguments: loads.add(arguments[6]) or launch(*arguments)
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN, so that what is not written is seen
    module._MERGED_ROWS, module._MERGED_SPLITS = 16, 4
    count = 1

    def sizes(rows: int, words: int, hidden: int, multiprocessors: int, l2_bytes: int) -> None:
        module._CONFIGS = module._SMALL_CONFIGS = {9: module._config(rows, words, hidden, 8, 3)}
        module._INTERPRETED_DEVICE = (multiprocessors, l2_bytes)
        module._blocks_per_split.cache_clear()

    sizes(16, 64, 32, 6, 40000)  # 63 rows: 4 row blocks in 2 groups, 8 vocabulary blocks in several splits
    for dtype, transform in itertools.product((torch.float32, torch.float16), TRANSFORMS.values()):
        for biased in (False, True):
            check_values(63, 40, 507, dtype, transform, biased)
            count += 1
    sizes(16, 32, 16, 132, 10000)  # more multiprocessors than programs; groups of one row block, 5 blocks in the last
    for (n, h, v), dtype in itertools.product(ODD_SIZES, (torch.float32, torch.float16)):
        check_values(n, h, v, dtype, TRANSFORMS["capped"], True)
        count += 1
    sizes(16, 32, 32, 2, 24000)  # 70 rows: 5 row blocks in groups of 2, 2 and 1, several programs a multiprocessor
    check_values(70, 40, 200, torch.float16, PLAIN, False)
    sizes(32, 64, 64, 6, 40000)
    for check in CHECKS:
        check()
    assert loads == {True, False}, "rows come through descriptors and through pointers"
    return count + 1 + len(CHECKS)


def test_interpreted():
    assert interpreted("test_linear_logps_fused", "interpreted_checks()") == 31


@pytest.mark.parametrize("multiprocessors", [58, 108, 132, 148])
@pytest.mark.parametrize("row_blocks, vocabulary_blocks", [(1, 501), (16, 192), (40, 126), (128, 501), (512, 1188)])
def test_splits_keep_every_multiprocessor_busy(row_blocks, vocabulary_blocks, multiprocessors):
    blocks = module._blocks_per_split(row_blocks, vocabulary_blocks, multiprocessors)
    splits = ceil(vocabulary_blocks / blocks)
    assert splits >= min(vocabulary_blocks, multiprocessors / 8)
    time = ceil(row_blocks * splits / multiprocessors) * blocks
    assert time <= 1.1 * row_blocks * vocabulary_blocks / multiprocessors + 1


def test_splits_of_few_blocks():
    assert module._blocks_per_split(1, 1, 132) == 1
    assert module._blocks_per_split(10_000, 3, 132) == 1


@pytest.mark.parametrize("row_blocks, fitting, size", [(1, 12, 1), (16, 12, 8), (128, 12, 12), (5, 0, 1), (40, 99, 40)])
def test_groups_fill_a_quarter_of_the_cache(row_blocks, fitting, size):
    assert module._group_size(row_blocks, 1000, 4000 * fitting + 999) == size


def test_unknown_statistic_is_named():
    with pytest.raises(ValueError, match="median"):
        Problem(2, 3, 4).solve(names=("median",))


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, h, v", [*ODD_SIZES, (63, 40, 507), (700, 576, 32003)])
def test_on_gpu(n, h, v, dtype, transform, biased):
    check_values(n, h, v, dtype, transform, biased, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, h, v", [(5000, 576, 32003), (5000, 4096, 128256)])
def test_large_on_gpu(n, h, v, dtype):
    check_values(n, h, v, dtype, TRANSFORMS["capped"], True, "cuda")
    check_bitwise_repeat("cuda", n, h, v, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("check", [*CHECKS, check_far_rows])
def test_edges_on_gpu(check):
    check(device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sum_of_a_sequence_on_gpu(dtype):
    check_sum_of_a_sequence(dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("first_column", [0, 1], ids=["descriptors", "pointers"])
def test_vocabulary_past_32_bits_on_gpu(first_column):
    problem = Problem(20, 4096, 600_000, torch.bfloat16, device="cuda")
    problem.hidden, problem.weight = problem.hidden[:, first_column:], problem.weight[:, first_column:]
    problem.targets[1::3] = 599_999 - torch.arange(len(problem.targets[1::3]), device="cuda")
    assert_solution(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("h", [576, 577], ids=["descriptors", "pointers"])
def test_no_host_sync_on_gpu(h):
    problem = Problem(300, h, 32003, torch.bfloat16, biased=True, device="cuda")
    expected = problem.solve()  # compiles
    statistics = {name: torch.empty_like(expected[name]) for name in STATISTICS}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logps, _ = linear_logps_fused(
            problem.hidden, problem.weight, problem.targets, problem.bias, transform=PLAIN, statistics=statistics
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(logps, expected["logps"])
