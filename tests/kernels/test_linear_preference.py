"""The head with the loss inside: loss, reports and gradients are as near the truth as with the loss outside."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from dpo_fast_kernels import ScoreLayout, SequenceLoss, linear_logps, linear_preference_loss
from dpo_fast_kernels.head import tiles
from dpo_fast_kernels.head.gemm import Gemm
from dpo_fast_kernels.head.logits import STATISTICS, LogitTransform
from dpo_fast_kernels.head.score_layout import group_tiles
from dpo_fast_kernels.specification import linear_logps_reference
from interpreting import interpreted
from looking_inside import LargestTensor
from numerics import assert_close_to_truth

H, V = 23, 507
TILE = 40
# Several small groups, one of one token each, one exactly a tile, one larger than a tile, four completions.
GROUPS = [(5, 9), (1, 1), (17, 3), (20, 20), (60, 51), (2, 30, 4, 1)]
TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=0.3, temperature=0.7),
    "capped": LogitTransform(scale=1.5, softcap=5.0, temperature=1.3),
}
TRAINS = {
    "all": (True, True, True),
    "frozen": (True, False, False),
    "weight": (False, True, False),
    "bias": (False, False, True),
}
NAMES = ("loss", "sequence_logps", "d hidden", "d weight", "d bias")


def dpo(logps: Tensor, ref_logps: Tensor, pairs: Tensor, weights: Tensor) -> Tensor:
    """Sigmoid loss of weighted comparisons, divided by their number."""
    winners, losers = pairs.unbind(1)
    ratios = logps - ref_logps
    return -(F.logsigmoid(0.5 * (ratios[winners] - ratios[losers])) * weights).sum() / len(pairs)


class Problem:
    """Leaves, targets and what the loss takes besides, for groups of completions."""

    def __init__(self, dtype=torch.float32, groups=GROUPS, h=H, v=V, biased=True, device="cpu"):
        generator = torch.Generator().manual_seed(0)
        n = sum(map(sum, groups))

        def normal(*shape, scale=1.0):
            return (scale * torch.randn(*shape, generator=generator)).to(dtype).to(device)

        self.layout = ScoreLayout.build(groups).to(device)
        self.hidden, self.weight = normal(n, h), normal(v, h, scale=2 / h**0.5)
        self.bias = normal(v) if biased else None
        self.targets = torch.randint(v, (n,), generator=generator).to(device)
        first, pairs = 0, []
        for group in groups:
            pairs += [(first + i, first + j) for i in range(len(group)) for j in range(i + 1, len(group))]
            first += len(group)
        lengths = self.layout.cu_scores.diff().to(device)
        ref = -lengths * 7 + torch.randn(len(lengths), generator=generator).to(device)
        weights = torch.rand(len(pairs), generator=generator).to(device)
        weights[len(pairs) // 2 :][:1] = 0
        self.loss_inputs = [ref, torch.tensor(pairs, device=device), weights]

    def solve(self, function, dtype=None, trains=TRAINS["all"]) -> dict[str, Tensor]:
        """Returns loss, sums and gradients of `function(hidden, weight, bias) → (loss, sums)`."""
        leaves = [
            None if tensor is None else tensor.to(dtype or tensor.dtype, copy=True).requires_grad_(train)
            for tensor, train in zip((self.hidden, self.weight, self.bias), trains, strict=True)
        ]
        loss, sums = function(*leaves)
        (loss * 3).backward()
        values = (loss, sums, *(None if leaf is None else leaf.grad for leaf in leaves))
        return {name: value.detach() for name, value in zip(NAMES, values, strict=True) if value is not None}

    def ours(self, loss=dpo, **options):
        def function(hidden, weight, bias):
            result = linear_preference_loss(
                hidden, weight, self.targets, self.layout, loss, self.loss_inputs, bias, **options
            )
            return result.loss, result.rows.sequence_logps

        return function

    def outside(self, token_logps):
        """The loss of token log-probs `token_logps(hidden, weight, bias)`."""

        def function(*leaves):
            logps = token_logps(*leaves)
            sums = torch.stack([part.sum() for part in logps.split(self.layout.host_cu_scores.diff().tolist())])
            ref, pairs, weights = self.loss_inputs
            return dpo(sums, ref.to(sums.dtype), pairs, weights.to(sums.dtype)), sums

        return function

    def eager(self, transform):
        def token_logps(hidden, weight, bias):
            logits = transform(linear(hidden, weight, bias).float())
            return logits.log_softmax(-1).gather(1, self.targets[:, None])[:, 0]

        return self.outside(token_logps)

    def truth(self, transform):
        return self.outside(
            lambda hidden, weight, bias: linear_logps_reference(hidden, weight, self.targets, bias, transform).logps
        )


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "CPU_GROUP_ROWS", TILE)


def assert_solution(problem: Problem, transform=LogitTransform(), trains=TRAINS["all"], **options):  # noqa: B008
    actual = problem.solve(problem.ours(transform=transform, **options), trains=trains)
    usual = problem.solve(problem.eager(transform), trains=trains)
    true = problem.solve(problem.truth(transform), dtype=torch.float64, trains=trains)
    assert actual.keys() == true.keys(), "gradients of what is trained, and of nothing else"
    for name in actual:
        assert_close_to_truth(actual[name], usual[name], true[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("budget", [0, 2**31], ids=["split", "whole"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_trainable_head(transform, biased, budget, dtype):
    assert_solution(Problem(dtype, biased=biased), transform, budget_bytes=budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trains", TRAINS.values(), ids=TRAINS)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_part_of_the_head_trains(transform, trains, dtype):
    assert_solution(Problem(dtype), transform, trains, budget_bytes=0)


@pytest.mark.parametrize("budget", [0, 2**31], ids=["split", "whole"])
@pytest.mark.parametrize("tile", [1, 7, 10_000])
def test_any_number_of_tiles(tile, budget, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_GROUP_ROWS", tile)
    for dtype in (torch.float32, torch.bfloat16):
        assert_solution(Problem(dtype), budget_bytes=budget)


@pytest.mark.parametrize("v", [1, 8, 1003])
def test_vocabulary_sizes(v):
    assert_solution(Problem(v=v), budget_bytes=0)


def test_gradcheck():
    problem = Problem(torch.float64, groups=[(2, 3), (9, 8), (1, 1)], h=3, v=5)
    leaves = [tensor.requires_grad_() for tensor in (problem.hidden, problem.weight, problem.bias)]
    problem.loss_inputs[0] = problem.loss_inputs[0].double()
    for transform in TRANSFORMS.values():
        function = problem.ours(transform=transform, budget_bytes=0)
        assert torch.autograd.gradcheck(lambda *leaves: function(*leaves)[0], leaves)  # noqa: B023


@given(
    st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=4), min_size=1, max_size=12),
    st.integers(1, 100),
    st.integers(0, 100),
)
def test_tiles_hold_whole_groups(groups, tile_rows, extra):
    """Every row and completion is in one tile, in order; only a single group passes the tile's size."""
    layout = ScoreLayout.build(groups)
    cut = list(group_tiles(layout.host_cu_scores, layout.cu_groups, tile_rows, tile_rows + extra))
    assert [(tile.rows.start, tile.completions.start) for tile in cut] == [
        (0, 0),
        *((tile.rows.stop, tile.completions.stop) for tile in cut[:-1]),
    ]
    assert (cut[-1].rows.stop, cut[-1].completions.stop) == (sum(map(sum, groups)), sum(map(len, groups)))
    bounds = set(layout.cu_groups.tolist())
    for tile in cut:
        size = tile.rows.stop - tile.rows.start
        single = not bounds & set(range(tile.completions.start + 1, tile.completions.stop))
        assert {tile.completions.start, tile.completions.stop} <= bounds
        assert size <= tile_rows or single
        assert tile.split == (size > tile_rows + extra)
    for one, other in zip(cut, cut[1:], strict=False):
        following = next(bound for bound in sorted(bounds) if bound > other.completions.start)
        assert int(layout.host_cu_scores[following]) - one.rows.start > tile_rows, "two tiles that would fit in one"


def test_the_order_of_groups_and_completions_changes_nothing():
    problem, other = Problem(), Problem(groups=GROUPS[::-1])
    rows = problem.hidden.split(problem.layout.host_cu_scores[problem.layout.cu_groups].diff().tolist())
    targets = problem.targets.split([len(part) for part in rows])
    other.hidden, other.targets = torch.cat(rows[::-1]), torch.cat(targets[::-1])
    counts = [len(group) for group in GROUPS]
    completions = torch.cat(torch.arange(sum(counts)).split(counts)[::-1])  # of the other → of this problem
    place = completions.argsort()
    ref, pairs, weights = problem.loss_inputs
    other.loss_inputs = [ref[completions], place[pairs], weights]
    one, two = (each.solve(each.ours(budget_bytes=0)) for each in (problem, other))
    assert torch.allclose(one["loss"], two["loss"], rtol=1e-6)
    assert torch.allclose(one["d weight"], two["d weight"], atol=1e-6)
    swapped = torch.cat(one["d hidden"].split([len(part) for part in rows])[::-1])
    assert torch.allclose(swapped, two["d hidden"], atol=1e-6)


def test_a_comparison_of_no_weight_pulls_nothing():
    problem = Problem(groups=[(5, 9), (17, 3)])
    problem.loss_inputs[2] = torch.tensor([1.0, 0.0])
    solution = problem.solve(problem.ours())
    assert torch.count_nonzero(solution["d hidden"][14:]) == 0
    assert torch.count_nonzero(solution["d hidden"][:14]) > 0


def test_equal_to_linear_logps_and_bitwise_the_same_again():
    problem = Problem()
    with torch.no_grad():
        expected = linear_logps(
            problem.hidden, problem.weight, problem.targets, problem.bias,
            cu_scores=problem.layout.cu_scores, statistics=STATISTICS,
        )  # fmt: skip
    leaves = [tensor.clone().requires_grad_() for tensor in (problem.hidden, problem.weight, problem.bias)]

    def run():
        result = linear_preference_loss(
            *leaves[:2], problem.targets, problem.layout, dpo, problem.loss_inputs, leaves[2], statistics=STATISTICS
        )
        return result, torch.autograd.grad(result.loss, leaves)

    (result, gradients), (again, gradients_again) = run(), run()
    for actual, name in zip(result.rows, result.rows._fields, strict=True):
        assert torch.allclose(actual, getattr(expected, name), atol=2e-5), name
        assert torch.equal(actual, getattr(again.rows, name)) and not actual.requires_grad, name
    for one, other in zip(gradients, gradients_again, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        evaluated = linear_preference_loss(
            *leaves[:2], problem.targets, problem.layout, dpo, problem.loss_inputs, leaves[2]
        )
    assert torch.allclose(evaluated.loss, result.loss, atol=1e-6) and not evaluated.loss.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(reentrant):
    problem = Problem()
    plain = problem.solve(problem.ours())
    again = problem.solve(lambda *leaves: checkpoint(problem.ours(), *leaves, use_reentrant=reentrant))
    for name in NAMES:
        assert torch.equal(plain[name], again[name]), name


def test_autocast_multiplies_in_its_dtype():
    """From inputs that bf16 holds, so that a single number such as the loss does not depend on luck."""
    problem = Problem()
    unrounded = problem.hidden, problem.weight, problem.bias
    problem.hidden, problem.weight, problem.bias = (tensor.bfloat16().float() for tensor in unrounded)

    def under_autocast(function):
        def run(*arguments):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*arguments)

        return run

    actual = problem.solve(under_autocast(problem.ours()))
    usual = problem.solve(under_autocast(problem.eager(LogitTransform())))
    true = problem.solve(problem.truth(LogitTransform()), dtype=torch.float64)
    for name in NAMES:
        assert actual[name].dtype == torch.float32, name
        assert_close_to_truth(actual[name], usual[name], true[name], name)
    problem.hidden, problem.weight, problem.bias = unrounded
    exact, rounded = problem.solve(problem.ours()), problem.solve(under_autocast(problem.ours()))
    for name in NAMES:
        assert not torch.equal(rounded[name], exact[name]), f"{name} ignored autocast"


def test_fp16_gradients_below_its_range_survive_until_the_loss_is_scaled():
    problem = Problem(torch.float16)
    problem.loss_inputs[2] = problem.loss_inputs[2] * 1e-6
    leaves = [tensor.requires_grad_() for tensor in (problem.hidden, problem.weight, problem.bias)]
    loss, _ = problem.ours()(*leaves)
    gradients = torch.autograd.grad(loss * 2.0**16, leaves)
    true = problem.truth(LogitTransform())
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(true(*doubles)[0] * 2.0**16, doubles)
    for gradient, value in zip(gradients, expected, strict=True):
        assert (gradient.double() - value).norm() < 2e-3 * value.norm()


@pytest.mark.parametrize("trains, products", [("all", 3), ("frozen", 2), ("weight", 2)])
@pytest.mark.parametrize("budget", [0, 2**31], ids=["split", "whole"])
def test_products_are_taken_as_often_as_promised(trains, products, budget, monkeypatch):
    """6·NHV FLOP trainable, 4 frozen: forward and backward together."""
    flop = []
    for name in ("logits", "product", "accumulate"):
        original = getattr(Gemm, name)

        def counted(self, *arguments, original=original, name=name, **options):
            a, b = arguments[:2] if name != "accumulate" else (arguments[1].t(), arguments[2])
            flop.append(2 * a.shape[0] * a.shape[1] * (b.shape[0] if name == "logits" else b.shape[1]))
            return original(self, *arguments, **options)

        monkeypatch.setattr(Gemm, name, counted)
    problem = Problem(biased=False)
    problem.solve(problem.ours(budget_bytes=budget), trains=TRAINS[trains])
    assert sum(flop) == 2 * products * len(problem.hidden) * H * V


def test_nothing_larger_than_a_tile():
    problem = Problem(groups=[(11, 9)] * 30)
    with LargestTensor() as largest:
        problem.solve(problem.ours())
    assert TILE * V <= largest.elements <= max(TILE * V, V * H)


# How margins of several groups may be mixed up.
COUPLED = {
    "mean": lambda margins: margins - margins.mean(),
    "mean without gradient": lambda margins: margins - margins.detach().mean(),
    "sort": lambda margins: margins.sort().values * torch.linspace(0.1, 1, len(margins)),
    "softmax": lambda margins: margins.log_softmax(0),
    "neighbours": lambda margins: margins * margins.roll(1),
    "two apart": lambda margins: margins * margins.roll(2) if len(margins) > 2 else margins * margins.roll(1),
}


class TestTheLoss:
    """What may be handed over as a loss, and what may not."""

    def test_a_closure_needs_no_inputs(self):
        problem = Problem()
        ref, pairs, weights = problem.loss_inputs
        expected = problem.solve(problem.ours())
        problem.loss_inputs = []
        actual = problem.solve(problem.ours(loss=lambda logps: dpo(logps, ref, pairs, weights)))
        for name in NAMES:
            assert torch.equal(actual[name], expected[name]), name

    def test_one_object_serves_many_steps_and_is_forgotten_with_its_owner(self):
        loss = SequenceLoss(dpo)
        problem = Problem()
        first, second = (problem.solve(problem.ours(loss=loss))["loss"] for _ in range(2))
        assert torch.equal(first, second)
        handle = loss.handle
        del loss
        gc.collect()
        with pytest.raises(KeyError):
            SequenceLoss.of(handle)

    @pytest.mark.parametrize("groups", [GROUPS, GROUPS[:2], [(2, 3)] * 7], ids=["tiles", "two", "a tile"])
    @pytest.mark.parametrize("couple", COUPLED)
    def test_one_that_couples_groups_is_refused_whatever_the_size_of_the_batch(self, couple, groups):
        def coupled(logps, ref, pairs, weights):
            margins = (logps - ref)[pairs[:, 0]] - (logps - ref)[pairs[:, 1]]
            return -F.logsigmoid(COUPLED[couple](margins)).sum()

        problem = Problem(groups=groups)
        loss = SequenceLoss(coupled)
        for _ in range(2):
            with pytest.raises(ValueError, match="^loss: .*other groups"):
                problem.solve(problem.ours(loss=loss))

    def test_one_that_says_that_it_couples_groups_is_refused_at_once(self):
        class Coupled:
            couples_groups = True

            def __call__(self, logps):
                return logps.sum()

            def __repr__(self):
                return "all of them"

        with pytest.raises(ValueError, match="^loss: all of them couples groups; .*linear_logps"):
            SequenceLoss(Coupled())

    def test_a_batch_of_one_group_couples_nothing(self):
        loss = SequenceLoss(lambda logps, *_: logps.sum() ** 2)
        problem = Problem(groups=[(2, 3, 4)])
        assert torch.isfinite(problem.solve(problem.ours(loss=loss))["loss"])
        problem = Problem()
        with pytest.raises(ValueError, match="^loss: .*other groups"):
            problem.solve(problem.ours(loss=loss))

    def test_what_is_found_is_found_once(self):
        calls = []

        def counted(*arguments):
            calls.append(arguments)
            return dpo(*arguments)

        problem, loss = Problem(groups=GROUPS[:2]), SequenceLoss(counted)
        counts = []
        for _ in range(3):
            problem.solve(problem.ours(loss=loss))
            counts.append(len(calls))
        assert counts == [3, 4, 5]

    @pytest.mark.parametrize("budget", [0, 2**31], ids=["split", "whole"])
    def test_one_that_weighs_by_sums_of_statistics(self, budget):
        """WPO's weights: how likely the policy is to write a completion, of no gradient."""

        def weigh(logps, log_sum_sq_probs, pairs, ref, weights):
            with torch.no_grad():
                likely = torch.exp((logps - log_sum_sq_probs) * 0.05)
            return dpo(logps, ref, pairs, weights * likely[pairs].prod(1))

        def loss(logps, squares, mean_logits, ref, pairs, weights):
            return weigh(logps, squares, pairs, ref, weights) + mean_logits.sum()

        def outside(dtype):
            def function(hidden, weight, bias):
                rows = linear_logps_reference(hidden, weight, problem.targets, bias, statistics=True)
                lengths = problem.layout.host_cu_scores.diff().tolist()
                sums, squares, mean_logits = (
                    torch.stack([part.sum() for part in values.split(lengths)])
                    for values in (rows.logps, rows.log_sum_sq_probs, rows.mean_logit)
                )
                ref, pairs, weights = problem.loss_inputs
                return weigh(sums, squares, pairs, ref.to(dtype), weights.to(dtype)) + mean_logits.sum(), sums

            return function

        problem = Problem()
        weighted = SequenceLoss(loss, statistics=("log_sum_sq_probs", "mean_logit"))
        actual = problem.solve(problem.ours(loss=weighted, budget_bytes=budget))
        usual, true = problem.solve(outside(torch.float32)), problem.solve(outside(torch.float64), dtype=torch.float64)
        for name in NAMES:
            assert_close_to_truth(actual[name], usual[name], true[name], name)
        with torch.no_grad():
            evaluated, _ = problem.ours(loss=weighted)(problem.hidden, problem.weight, problem.bias)
        assert torch.allclose(evaluated, actual["loss"], rtol=1e-5)

    def test_one_that_is_no_scalar_is_refused(self):
        problem = Problem()
        with pytest.raises(ValueError, match="^loss must return a scalar"):
            problem.solve(problem.ours(loss=lambda logps, *_: logps))

    def test_one_that_looks_at_nothing(self):
        problem = Problem()
        solution = problem.solve(problem.ours(loss=lambda logps, *_: torch.tensor(2.0)))
        assert solution["loss"] == 2
        assert all(torch.count_nonzero(solution[name]) == 0 for name in NAMES[2:])


def test_no_rows():
    problem = Problem(groups=[])
    problem.loss_inputs = []
    solution = problem.solve(problem.ours(loss=lambda logps: logps.sum()))
    assert solution["loss"] == 0
    assert solution["d hidden"].shape == (0, H)
    assert torch.count_nonzero(solution["d weight"]) == 0 and solution["d weight"].shape == (V, H)


@pytest.mark.parametrize("argument, change", [
    ("hidden", {"hidden": torch.zeros(3, 2, 4)}),
    ("weight", {"weight": torch.zeros(5, 3)}),
    ("weight", {"weight": torch.zeros(5, 4, device="meta")}),
    ("targets", {"targets": torch.tensor([0, 5, 1])}),
    ("layout", {"layout": ScoreLayout.build([(1, 1)])}),
    ("layout", {"layout": ScoreLayout.build([(1, 2)]).to("meta")}),
    ("bias", {"bias": torch.zeros(4)}),
    ("loss_inputs", {"loss_inputs": [torch.zeros(2, requires_grad=True)]}),
    ("backend", {"backend": "fused"}),
    ("backend", {"backend": "triton"}),
    ("budget_bytes", {"budget_bytes": -1}),
    ("statistics", {"statistics": ("perplexity",)}),
])  # fmt: skip
def test_bad_arguments_are_named(argument, change, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {
        "hidden": torch.zeros(3, 4, requires_grad=True),
        "weight": torch.zeros(5, 4),
        "targets": torch.tensor([0, 4, 1]),
        "layout": ScoreLayout.build([(1, 2)]),
        "loss": lambda logps, *_: logps.sum(),
    }
    if argument == "hidden":
        change["hidden"].requires_grad_()
    with pytest.raises(ValueError, match=f"^{argument}"):
        linear_preference_loss(**{**arguments, **change})


@pytest.mark.parametrize("groups", [[(1, 0)], [()], [(1, 2), (3, -1)]])
def test_groups_without_rows_are_refused(groups):
    with pytest.raises(ValueError, match="^groups: group"):
        ScoreLayout.build(groups)


def interpreted_checks() -> int:
    """Runs the op on the Triton kernels; returns how many problems were solved."""
    tiles.CPU_GROUP_ROWS = 6
    count = 0
    for dtype in (torch.float32, torch.float16):
        for transform in TRANSFORMS.values():
            for trains in ("all", "frozen"):
                problem = Problem(dtype, groups=[(1, 2), (2, 1), (5, 4)], h=3)
                assert_solution(problem, transform, TRAINS[trains], budget_bytes=0, backend="triton")
                count += 1
    return count


def test_triton_backend_interpreted():
    assert interpreted("test_linear_preference", "interpreted_checks()") == 12


LARGE = [(700, 512), (90, 300), (2600, 1900), (1, 40), (800, 10, 99, 333)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("budget", [0, 2**31], ids=["split", "whole"])
@pytest.mark.parametrize("trains", ["all", "frozen"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_on_gpu(transform, trains, budget, dtype):
    """One group of 4500 rows is split when the budget is small, at a hidden size below half of it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    problem = Problem(dtype, groups=LARGE, h=576, v=32003, device="cuda")
    assert_solution(problem, transform, TRAINS[trains], budget_bytes=budget)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [0, 2**31], ids=["split", "whole"])
def test_on_gpu_runs_are_bitwise_equal_and_never_synchronise(budget):
    problem = Problem(torch.bfloat16, groups=LARGE, h=576, v=32003, device="cuda")
    first = problem.solve(problem.ours(budget_bytes=budget, statistics=STATISTICS))
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = problem.solve(problem.ours(budget_bytes=budget, statistics=STATISTICS))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [LARGE, GROUPS[:2]], ids=["tiles", "a tile"])
def test_on_gpu_a_loss_that_couples_groups_is_nan(groups):
    problem, loss = (
        Problem(groups=groups, h=64, v=1003, device="cuda"),
        SequenceLoss(lambda logps, *_: logps.sum() ** 2),
    )
    for _ in range(2):
        result = linear_preference_loss(
            problem.hidden.requires_grad_(), problem.weight, problem.targets, problem.layout, loss,
            problem.loss_inputs, budget_bytes=0,
        )  # fmt: skip
        assert result.loss.isnan()
