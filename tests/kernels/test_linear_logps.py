"""The LM head without whole logits: values, statistics and gradients near the truth, whatever is trained and kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from dpo_fast_kernels.head import gemm, tiles
from dpo_fast_kernels.head.gemm import Gemm
from dpo_fast_kernels.head.linear_logps import linear_logps
from dpo_fast_kernels.head.logits import STATISTICS, LogitTransform
from dpo_fast_kernels.specification import linear_logps_reference
from interpreting import interpreted
from looking_inside import LargestTensor
from numerics import assert_close_to_truth

N, H, V = 100, 63, 507
TILE = 32  # rows, so that N makes four tiles, the last one short
TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=0.3, temperature=0.7),
    "capped": LogitTransform(scale=1.5, softcap=5.0, temperature=1.3),
}
BUDGETS = {"kept": 2**31, "half kept": TILE * 2 * V * 4, "recomputed": 0}
NAMES = ("logps", "d hidden", "d weight", "d bias")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "CPU_ROWS", TILE)


class Problem:
    """Leaves, targets and the coefficient of every row's log-prob in the loss."""

    def __init__(self, dtype=torch.float32, n=N, h=H, v=V, biased=True, device="cpu"):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, scale=1.0):
            return (scale * torch.randn(*shape, generator=generator)).to(dtype).to(device)

        self.hidden = normal(n, h)
        self.hidden[n // 2 :] = self.hidden[: n - n // 2].clone()  # the last token of a prompt predicts several tokens
        self.weight = normal(v, h, scale=2 / h**0.5)
        self.bias = normal(v) if biased else None
        self.targets = torch.randint(v, (n,), generator=generator).to(device)
        self.coefficient = torch.randn(n, generator=generator).to(device)

    def leaves(self, dtype=None, trains=(True, True, True)) -> list[Tensor | None]:
        return [
            None if tensor is None else tensor.to(dtype or tensor.dtype, copy=True).requires_grad_(train)
            for tensor, train in zip((self.hidden, self.weight, self.bias), trains, strict=True)
        ]

    def solve(self, function, dtype=None, trains=(True, True, True)) -> dict[str, Tensor]:
        """Returns the log-probs and gradients of `function(hidden, weight, targets, bias)`."""
        hidden, weight, bias = self.leaves(dtype, trains)
        logps = function(hidden, weight, self.targets, bias)
        logps.backward(self.coefficient.to(logps.dtype))
        values = (logps, *(None if leaf is None else leaf.grad for leaf in (hidden, weight, bias)))
        return {name: value.detach() for name, value in zip(NAMES, values, strict=True) if value is not None}


def ours(**options):
    return lambda hidden, weight, targets, bias: linear_logps(hidden, weight, targets, bias, **options).logps


def eager(transform):
    def function(hidden, weight, targets, bias):
        logits = transform(linear(hidden, weight, bias).float())
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    return function


def truth(transform):
    return lambda hidden, weight, targets, bias: linear_logps_reference(hidden, weight, targets, bias, transform).logps


def assert_solution(problem: Problem, transform: LogitTransform, trains=(True, True, True), **options):
    actual = problem.solve(ours(transform=transform, **options), trains=trains)
    usual = problem.solve(eager(transform), trains=trains)
    true = problem.solve(truth(transform), dtype=torch.float64, trains=trains)
    assert actual.keys() == true.keys(), "gradients of what is trained, and of nothing else"
    for name in actual:
        assert_close_to_truth(actual[name], usual[name], true[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_trainable_head(transform, biased, budget, dtype):
    assert_solution(Problem(dtype, biased=biased), transform, budget_bytes=budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trains", [(True, False, False), (False, True, False), (False, False, True)], ids=NAMES[1:])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_part_of_the_head_trains(transform, trains, dtype):
    assert_solution(Problem(dtype), transform, trains, budget_bytes=BUDGETS["half kept"])


@pytest.mark.parametrize("v", [1, 8, 1003])
def test_vocabulary_sizes(v, monkeypatch):
    monkeypatch.setattr(gemm, "_CPU_BLOCK", 5000)  # casts take several blocks of columns, the last one short
    for dtype in (torch.float32, torch.bfloat16):
        assert_solution(Problem(dtype, n=37, v=v), LogitTransform(), budget_bytes=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_log_probs_do_not_depend_on_the_strategy(transform, dtype):
    problem = Problem(dtype)
    solutions = [problem.solve(ours(transform=transform, budget_bytes=budget)) for budget in BUDGETS.values()]
    frozen = problem.solve(ours(transform=transform), trains=(True, False, False))
    hidden, weight, bias = problem.leaves()
    with torch.no_grad():
        without_gradient = ours(transform=transform)(hidden, weight, problem.targets, bias)
    for logps in (without_gradient, frozen["logps"], *(solution["logps"] for solution in solutions)):
        assert torch.equal(logps, solutions[0]["logps"]), "equal weights must give a margin of exactly 0"
    assert not without_gradient.requires_grad


@pytest.mark.parametrize("trains, budget, logit_rows", [
    ((True, True, True), "kept", N),
    ((True, True, True), "half kept", 2 * N - 2 * TILE),
    ((True, True, True), "recomputed", 2 * N),
    ((True, False, False), "recomputed", N),
])  # fmt: skip
def test_logits_are_made_as_often_as_promised(trains, budget, logit_rows, monkeypatch):
    rows = []
    logits = Gemm.logits
    monkeypatch.setattr(Gemm, "logits", lambda self, x, w, out: rows.append(len(x)) or logits(self, x, w, out))
    Problem().solve(ours(budget_bytes=BUDGETS[budget]), trains=trains)
    assert sum(rows) == logit_rows
    assert max(rows) == TILE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trains", [(True, True, True), (True, False, False)], ids=["trainable", "frozen"])
def test_nothing_larger_than_a_tile(trains, dtype):
    problem = Problem(dtype)
    with LargestTensor() as largest:
        problem.solve(ours(transform=TRANSFORMS["capped"], budget_bytes=0), trains=trains)
    assert TILE * V <= largest.elements <= max(TILE * V, V * H)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_statistics(transform, needs_grad):
    problem = Problem()
    hidden, weight, bias = problem.leaves(trains=(needs_grad,) * 3)
    with torch.no_grad():
        problem.targets[::2] = transform(linear(hidden, weight, bias)).argmax(-1)[::2]
    actual = linear_logps(hidden, weight, problem.targets, bias, transform=transform, statistics=STATISTICS)
    usual, true = (
        linear_logps_reference(*(x.detach().to(dtype) for x in (hidden, weight)), problem.targets,
                               bias.detach().to(dtype), transform, statistics=True)
        for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
    for name in ("logps", "entropy", "mean_logit", "log_sum_sq_probs"):
        assert_close_to_truth(getattr(actual, name), getattr(usual, name), getattr(true, name), name)
    assert torch.equal(actual.is_top1, true.is_top1)
    assert actual.is_top1[::2].all()
    assert not actual.is_top1.all()
    assert actual.sequence_logps is None
    assert actual.logps.requires_grad == needs_grad
    assert not any(getattr(actual, name).requires_grad for name in STATISTICS)
    for name in STATISTICS:  # alone
        lean = linear_logps(hidden, weight, problem.targets, bias, transform=transform, statistics=[name])
        assert torch.equal(getattr(lean, name), getattr(actual, name))
        assert sum(value is not None for value in lean) == 2


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_sequence_sums(budget):
    """Sums over completions, alone in the loss and beside token log-probs, and in float64 for their gradient."""
    problem = Problem()
    cu_scores = torch.tensor([0, 1, 40, 41, N], dtype=torch.int32)
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7])

    def loss(function, dtype, token_part):
        leaves = problem.leaves(dtype)
        logps, sums = function(*leaves)
        (sums @ weights.to(sums.dtype) + token_part * (logps @ problem.coefficient.to(logps.dtype))).backward()
        return {"sums": sums.detach(), **dict(zip(NAMES[1:], (leaf.grad for leaf in leaves), strict=True))}

    def fused(hidden, weight, bias):
        return linear_logps(hidden, weight, problem.targets, bias, cu_scores=cu_scores, budget_bytes=budget)[:2]

    def composed(hidden, weight, bias):
        logps = linear_logps_reference(hidden, weight, problem.targets, bias).logps
        return logps, torch.stack([part.sum() for part in logps.split(cu_scores.diff().tolist())])

    for token_part in (0.0, 1.0):
        actual, usual = loss(fused, None, token_part), loss(composed, None, token_part)
        true = loss(composed, torch.float64, token_part)
        for name in actual:
            assert_close_to_truth(actual[name], usual[name], true[name], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sum_of_512_tokens_is_exact_to_a_thousandth_nat(dtype):
    """From the same low-precision inputs. TRL's head rounds the logits to bf16 first, and is off by hundredths."""
    trl = pytest.importorskip("trl.kernels", reason="TRL is an extra")
    problem = Problem(dtype, n=512, h=256, v=4001, biased=False)
    arguments = (problem.hidden, problem.weight, problem.targets)
    true = linear_logps_reference(*(x.double() for x in arguments[:2]), problem.targets).logps.sum()
    cu_scores = torch.tensor([0, 512])
    ours_ = linear_logps(*arguments, cu_scores=cu_scores).sequence_logps
    theirs = trl.ChunkedLogProbFunction.apply(*arguments[:2], None, problem.targets, 1.0, 2048, None, 1.0, ())[0].sum()
    print(f"{dtype}: sum {true:.3f} nat, off by {ours_.item() - true:.2e}, TRL's by {theirs.item() - true:.2e}")
    assert abs(ours_.item() - true) < 1e-3
    assert abs(theirs.item() - true) > 1e-3


@pytest.mark.parametrize("budget", [2**20, 4 * 7 * 8, 0])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradcheck(transform, budget, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_ROWS", 2)
    problem = Problem(torch.float64, n=5, h=4, v=7)
    function = ours(transform=transform, budget_bytes=budget)
    assert torch.autograd.gradcheck(lambda h, w, b: function(h, w, problem.targets, b), problem.leaves())
    hidden, weight, bias = problem.leaves(trains=(True, False, False))
    assert torch.autograd.gradcheck(lambda h: function(h, weight, problem.targets, bias), hidden)
    reference = truth(transform)
    assert torch.autograd.gradcheck(lambda h, w, b: reference(h, w, problem.targets, b), problem.leaves())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bitwise_equal(dtype):
    problem = Problem(dtype)
    first, second = (problem.solve(ours(budget_bytes=BUDGETS["half kept"])) for _ in range(2))
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("tile", [7, 64, N])
@pytest.mark.parametrize("budget", [2**31, 0])
def test_tile_size_changes_nothing(tile, budget, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_ROWS", tile)
    for dtype in (torch.float32, torch.bfloat16):
        assert_solution(Problem(dtype), LogitTransform(), budget_bytes=budget)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(reentrant):
    problem = Problem()
    plain = problem.solve(ours())
    again = problem.solve(lambda *arguments: checkpoint(ours(), *arguments, use_reentrant=reentrant))
    for name in NAMES:
        assert torch.equal(plain[name], again[name]), name


def test_backward_twice_gives_the_same():
    problem = Problem()
    hidden, weight, bias = leaves = problem.leaves()
    logps = ours(budget_bytes=BUDGETS["half kept"])(hidden, weight, problem.targets, bias)
    first, second = (torch.autograd.grad(logps, leaves, problem.coefficient, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_multiplies_in_its_dtype(hidden_dtype, budget):
    problem = Problem()
    problem.hidden = problem.hidden.to(hidden_dtype)

    def under_autocast(function):
        def run(*arguments):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*arguments)

        return run

    actual = problem.solve(under_autocast(ours(budget_bytes=budget)))
    usual = problem.solve(under_autocast(eager(LogitTransform())))
    true = problem.solve(truth(LogitTransform()), dtype=torch.float64)
    exact = problem.solve(ours(budget_bytes=budget)) if hidden_dtype == torch.float32 else None
    for name, dtype in zip(NAMES, (torch.float32, hidden_dtype, torch.float32, torch.float32), strict=True):
        assert actual[name].dtype == dtype, name
        assert_close_to_truth(actual[name], usual[name], true[name], name)
        assert exact is None or not torch.equal(actual[name], exact[name]), f"{name} ignored autocast"


def test_bf16_products_on_a_cpu_keep_fp32_sums(monkeypatch):
    monkeypatch.setattr(gemm, "_CPU_BLOCK", 100_000)
    products = Gemm(torch.bfloat16, "cpu")
    generator = torch.Generator().manual_seed(0)
    x, w, d = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((300, 63), (4099, 63), (300, 4099)))
    before = torch.backends.mkldnn.matmul.fp32_precision
    logits = products.logits(x, w, torch.full((300, 4099), torch.nan))
    assert_close_to_truth(logits, x.float() @ w.float().t(), x.double() @ w.double().t(), "logits")
    total = torch.zeros(4099, 63)
    for rows in range(0, 300, 10):
        products.accumulate(total, d[rows : rows + 10], x[rows : rows + 10])
    assert_close_to_truth(total, d.float().t() @ x.float(), d.double().t() @ x.double(), "sum of 30 products")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        products.logits(x, w[:, :5], logits)
    assert torch.backends.mkldnn.matmul.fp32_precision == before, "an error must not leave the process in bf16"


@pytest.mark.parametrize("trains", [(True, True, True), (True, False, False)], ids=["trainable", "frozen"])
def test_no_rows(trains):
    problem = Problem(n=0)
    solution = problem.solve(ours(transform=TRANSFORMS["capped"]), trains=trains)
    assert solution["logps"].shape == (0,)
    assert solution["d hidden"].shape == (0, H)
    for name in NAMES[2:] if trains[1] else ():
        assert torch.count_nonzero(solution[name]) == 0
        assert solution[name].shape[0] == V
    statistics = linear_logps(problem.hidden, problem.weight, problem.targets, problem.bias, statistics=STATISTICS)
    assert [value.shape for value in statistics if value is not None] == [(0,)] * 5


@pytest.mark.parametrize("argument, change", [
    ("hidden", {"hidden": torch.zeros(3, 2, 4)}),
    ("hidden", {"hidden": torch.zeros(3, 4, dtype=torch.int64)}),
    ("hidden", {"hidden": torch.zeros(3, 4).double(), "weight": torch.zeros(5, 4).double(), "backend": "triton"}),
    ("weight", {"weight": torch.zeros(5, 3)}),
    ("weight", {"weight": torch.zeros(0, 4)}),
    ("weight", {"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}),
    ("weight", {"weight": torch.zeros(5, 4, device="meta")}),
    ("targets", {"targets": torch.zeros(4, dtype=torch.int64)}),
    ("targets", {"targets": torch.zeros(3, dtype=torch.int32)}),
    ("targets", {"targets": torch.tensor([0, 5, 1])}),
    ("targets", {"targets": torch.tensor([0, -100, 1])}),
    ("bias", {"bias": torch.zeros(4)}),
    ("bias", {"bias": torch.zeros(5, dtype=torch.int64)}),
    ("cu_scores", {"cu_scores": torch.tensor([0, 2])}),
    ("cu_scores", {"cu_scores": torch.tensor([1, 3])}),
    ("cu_scores", {"cu_scores": torch.tensor([0, 2, 2, 3])}),
    ("cu_scores", {"cu_scores": torch.tensor([0.0, 3.0])}),
    ("cu_scores", {"cu_scores": torch.tensor([0, 3], device="meta")}),
    ("statistics", {"statistics": "entropy"}),
    ("statistics", {"statistics": ["entropie"]}),
    ("backend", {"backend": "cuda"}),
    ("backend", {"backend": "fused"}),
    ("backend", {"backend": "triton"}),
    ("budget_bytes", {"budget_bytes": -1}),
])  # fmt: skip
def test_bad_arguments_are_named(argument, change, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.tensor([0, 4, 1])}
    with pytest.raises(ValueError, match=f"^{argument}"):
        linear_logps(**{**arguments, **change})


def test_a_row_that_is_not_finite_leaves_the_others_alone():
    """On a CPU as on a GPU: a run that diverges goes on, and whoever watches its loss decides."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 8, generator=generator), torch.randn(9, 8, generator=generator)
    targets = torch.tensor([0, 8, 3, 4])
    good = linear_logps(hidden, weight, targets).logps
    hidden[1, 2], hidden[3] = torch.nan, torch.inf
    found = linear_logps(hidden, weight, targets).logps
    assert found.isfinite().tolist() == [True, False, True, False]
    assert torch.equal(found[::2], good[::2])


def interpreted_checks() -> int:
    """Runs the head on the Triton kernels; returns how many problems were solved."""
    tiles.CPU_ROWS = 5
    count = 0
    for transform in TRANSFORMS.values():
        for budget, trains in ((2**31, (True,) * 3), (5 * 507 * 4, (True,) * 3), (0, (True, False, False))):
            problem = Problem(n=8, h=16)
            assert_solution(problem, transform, trains, budget_bytes=budget, backend="triton")
            count += 1
        for trains in ((True,) * 3, (True, False, False)):
            assert_solution(Problem(n=8, h=16, v=101), transform, trains, backend="fused")
            count += 1
    problem = Problem(n=8, h=16, v=101)
    arguments = (problem.hidden, problem.weight, problem.targets, problem.bias)
    fused, tiled = (linear_logps(*arguments, statistics=STATISTICS, backend=name) for name in ("fused", "torch"))
    for name in STATISTICS:
        assert torch.allclose(getattr(fused, name), getattr(tiled, name), atol=1e-5), name
    return count + 1


def test_triton_backend_interpreted():
    assert interpreted("test_linear_logps", "interpreted_checks()") == 16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("budget", [2**32, 2**28], ids=["kept", "recomputed"])
@pytest.mark.parametrize("trains", [(True, True, True), (True, False, False)], ids=["trainable", "frozen"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_on_gpu(transform, trains, budget, dtype):
    """5000 rows are three tiles of 2048; without the TF32 that the user may have allowed."""
    torch.backends.cuda.matmul.allow_tf32 = False
    problem = Problem(dtype, n=5000, h=576, v=32003, device="cuda")
    assert_solution(problem, transform, trains, budget_bytes=budget)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trains", [(True, True, True), (True, False, False)], ids=["trainable", "frozen"])
def test_fused_forward_on_gpu(trains, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    assert_solution(
        Problem(dtype, n=5000, h=576, v=32003, device="cuda"), TRANSFORMS["capped"], trains, backend="fused"
    )


@pytest.mark.gpu
def test_on_gpu_a_small_budget_takes_the_fused_forward(monkeypatch):
    """Without gradient and with a budget below a tile, no logits are made."""
    problem = Problem(torch.bfloat16, n=5000, h=576, v=32003, device="cuda")
    monkeypatch.setattr(Gemm, "logits", lambda *_: pytest.fail("logits were made"))
    fused = linear_logps(problem.hidden, problem.weight, problem.targets, problem.bias, budget_bytes=2**20)
    true = linear_logps_reference(
        *(x.double() for x in (problem.hidden, problem.weight)), problem.targets, problem.bias.double()
    )
    assert (fused.logps - true.logps).abs().max() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [2**32, 2**28], ids=["kept", "recomputed"])
def test_on_gpu_runs_are_bitwise_equal_and_never_synchronise(budget):
    problem = Problem(torch.bfloat16, n=5000, h=576, v=32003, device="cuda")
    first = problem.solve(ours(budget_bytes=budget, statistics=STATISTICS))
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = problem.solve(ours(budget_bytes=budget, statistics=STATISTICS))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_gpu_no_rows(dtype):
    solution = Problem(dtype, n=0, device="cuda").solve(ours(statistics=STATISTICS))
    assert solution["d hidden"].shape == (0, H)
    assert torch.count_nonzero(solution["d weight"]) == 0


@pytest.mark.gpu
def test_on_gpu_backends_agree_on_statistics():
    problem = Problem(n=5000, h=576, v=32003, device="cuda")
    arguments = (problem.hidden, problem.weight, problem.targets, problem.bias)
    ours_, torchs = (
        linear_logps(*arguments, statistics=STATISTICS, backend=backend) for backend in ("triton", "torch")
    )
    true = linear_logps_reference(
        *(x.double() for x in arguments[:2]), problem.targets, problem.bias.double(), statistics=True
    )
    for name in ("logps", "entropy", "mean_logit"):
        assert_close_to_truth(getattr(ours_, name), getattr(torchs, name), getattr(true, name), name)
    assert torch.equal(ours_.is_top1, torchs.is_top1)
