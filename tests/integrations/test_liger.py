"""FusedLinearDPOLoss returns what Liger returns, from scored rows only, and is as near the truth as eager PyTorch."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast import LOSSES, Comparisons, FusedLinearDPOLoss, LossParameters, dpo_loss
from dpo_fast.losses import COUPLED, SMOOTHED, WITH_LENGTHS
from dpo_fast_kernels.head import tiles
from dpo_fast_kernels.head.gemm import Gemm
from looking_inside import LargestTensor
from numerics import assert_close_to_truth

IGNORED = -100
SHAPES = {"odd": (3, 47, 31, 123), "larger": (4, 64, 96, 503)}  # pairs, positions, hidden, vocabulary
REPORTS = (
    *("chosen_logps", "rejected_logps", "chosen_logits_mean", "rejected_logits_mean"),
    *("chosen_nll_loss", "chosen_rewards", "rejected_rewards"),
)
GRADIENTS = ("d weight", "d hidden", "d bias")
SMOOTHING = {"exo_pair": 0.1, "robust": 0.2}  # of the losses that Liger has
LIGER_LOSSES = (
    *("sigmoid", "hinge", "exo_pair", "nca_pair", "robust"),
    *("bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"),
)
UNCOUPLED = [name for name in LOSSES if name not in COUPLED]


class Problem:
    """Hidden states of policy and reference with prompts and padding, one completion of a single token, and heads.

    Targets are likely, so that a loss, which lives on differences of sums of log-probs, does not lose its digits there.
    """

    def __init__(self, shape=SHAPES["odd"], dtype=torch.float32, biased=True, device="cpu", seed=0):
        pairs, positions, h, v = shape
        generator = torch.Generator().manual_seed(seed)

        def normal(*size, scale=1.0, mean=0.0):
            return (mean + scale * torch.randn(*size, generator=generator)).to(dtype).to(device)

        def near(tensor):
            return None if tensor is None else tensor + normal(*tensor.shape, scale=0.3 / h**0.5)

        prompts = torch.randint(positions // 3, (2 * pairs,), generator=generator)
        ends = torch.randint(positions // 2, positions + 1, (2 * pairs,), generator=generator)
        ends[0], ends[1] = positions, prompts[1] + 1
        place = torch.arange(positions)
        scored = (place >= prompts[:, None]) & (place < ends[:, None])
        target = torch.randint(v, scored.shape, generator=generator)
        self.target = torch.where(scored, target, IGNORED).to(device)
        self.weight = normal(v, h, scale=1.5 / h**0.5, mean=0.05)
        likely = (math.log(v) + 2) / 1.5**2
        self.hidden = normal(2 * pairs, positions, h, mean=0.2) + likely * self.weight[target.to(device)]
        self.bias = normal(v, mean=0.3) if biased else None
        self.ref_hidden, self.ref_weight, self.ref_bias = near(self.hidden), near(self.weight), near(self.bias)
        self.scored = scored.to(device)
        self.lengths = self.scored.sum(-1)

    def heads(self, dtype=None, trains=(True, True, True)) -> list[Tensor | None]:
        return [
            None if tensor is None else tensor.to(dtype or tensor.dtype, copy=True).requires_grad_(train)
            for tensor, train in zip((self.weight, self.hidden, self.bias), trains, strict=True)
        ]

    def reference(self, dtype=None) -> list[Tensor | None]:
        model = (self.ref_hidden, self.ref_weight, self.ref_bias)
        return [None if tensor is None else tensor.to(dtype or tensor.dtype) for tensor in model]

    def solve(self, module, reference=(), cached=None, dtype=None, trains=(True, True, True)) -> dict[str, Tensor]:
        """Returns loss, reports and gradients of a module that is called as Liger's is."""
        leaves = weight, hidden, bias = self.heads(dtype, trains)
        # Liger marks a dimension of target as dynamic, for good.
        loss, reports = module(weight, hidden, self.target.clone(), bias, *reference, **(cached or {}))
        assert not any(report.requires_grad for report in reports)
        (loss * 3).backward()
        gradients = {name: None if leaf is None else leaf.grad for name, leaf in zip(GRADIENTS, leaves, strict=True)}
        found = {"loss": loss.detach(), **dict(zip(REPORTS, reports, strict=True)), **gradients}
        return {name: value for name, value in found.items() if value is not None}


def plain(loss_type: str, average=False, nll=False, beta=0.1, alpha=1.0, smoothing=0.0):
    """The definition: all logits, in the dtype of the inputs' products and then in fp32, or float64 throughout."""

    def logps_of(hidden, weight, target, bias):
        logits = F.linear(hidden, weight, bias)
        scored = target != IGNORED
        wide = torch.promote_types(logits.dtype, torch.float32)
        logps = logits.to(wide).log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return logits.to(wide), torch.where(scored, logps, 0).sum(-1), scored.sum(-1)

    def module(weight, hidden, target, bias, *reference):
        logits, sums, lengths = logps_of(hidden, weight, target, bias)
        logps, ref_logps = sums, torch.zeros_like(sums)
        if reference:
            ref_logps = logps_of(reference[0], reference[1], target, reference[2])[1]
        if average:
            logps, ref_logps = logps / lengths, ref_logps / lengths
        parts = [half for values in (logps, ref_logps, lengths) for half in values.chunk(2)]
        comparisons = Comparisons(*parts, mean_winner_tokens=parts[4].to(logps.dtype).mean())
        loss = LOSSES[loss_type](comparisons, LossParameters(beta=beta, label_smoothing=smoothing)).mean()
        chosen_nll = -sums.chunk(2)[0].sum() / parts[4].sum() if nll else torch.zeros_like(loss)
        means = (half.mean() for half in logits.chunk(2))
        rewards = (beta * (logps - ref_logps)).chunk(2)
        reports = (*logps.chunk(2), *means, chosen_nll, *rewards)
        return loss + alpha * chosen_nll, tuple(report.detach() for report in reports)

    return module


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], beta: float, what: object) -> None:
    """Loss and reports to 1e-5, gradients to 1e-4, of the largest entry; rewards of the log-probs they are made of."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape and actual[name].dtype == value.dtype, (name, what)
        largest = value.abs().max()
        if name.endswith("rewards"):
            largest = beta * expected[name.replace("rewards", "logps")].abs().max()
        error = (actual[name] - value).abs().max()
        assert error <= (1e-4 if name in GRADIENTS else 1e-5) * largest, f"{name}: {error:.2e} of {largest:.2e}, {what}"


@pytest.fixture
def liger():
    """Liger's module, uncompiled, several pairs at a time."""
    module = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
    return lambda **options: module(compiled=False, chunk_size=2, **options)


@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("loss_type", LIGER_LOSSES)
def test_equal_to_liger(loss_type, shape, average, liger):
    """With and without bias, NLL, and a reference, which is a model or its cached log-probs."""
    smoothing, beta = SMOOTHING.get(loss_type, 0.0), 0.2
    common = {"loss_type": loss_type, "average_log_prob": average, "beta": beta, "label_smoothing": smoothing}
    common["discopop_tau"] = 0.3  # at its default of 0.05 the gradient is 20 times as steep, and so is rounding
    for biased, nll in itertools.product((False, True), repeat=2):
        problem = Problem(shape, biased=biased)
        options = {**common, "compute_nll_loss": nll, "alpha": 0.7}
        for use_ref_model in (False, True):
            reference = problem.reference() if use_ref_model else ()
            theirs = problem.solve(liger(use_ref_model=use_ref_model, **options), reference)
            ours = FusedLinearDPOLoss(use_ref_model=use_ref_model, **options)
            assert_same(problem.solve(ours, reference), theirs, beta, (biased, nll, use_ref_model))
        ref_weight, ref_hidden, ref_bias = problem.ref_weight, problem.ref_hidden, problem.ref_bias
        of_reference = liger(use_ref_model=False, average_log_prob=average)
        _, (chosen, rejected, *_) = of_reference(ref_weight, ref_hidden, problem.target.clone(), ref_bias)
        cached = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        assert_same(problem.solve(ours, cached=cached), theirs, beta, (biased, nll, "cached"))


def test_called_like_liger():
    """Same names, order and defaults, in the constructor and in the call."""
    theirs = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss

    def arguments(function) -> list[tuple]:
        return [(name, each.default) for name, each in inspect.signature(function).parameters.items()]

    wanted, found = arguments(theirs), arguments(FusedLinearDPOLoss)
    assert found[: len(wanted)] == wanted
    wanted, found = arguments(theirs.forward), arguments(FusedLinearDPOLoss.forward)
    assert found[: len(wanted)] == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("loss_type", "average"), [("sigmoid", False), ("sigmoid", True), ("sppo_hard", True), ("ipo", False)]
)
def test_as_near_the_truth_as_eager(loss_type, average, dtype):
    """Several problems together, so that a single number such as the loss does not depend on luck."""
    ours = FusedLinearDPOLoss(loss_type=loss_type, average_log_prob=average, compute_nll_loss=True)
    usual, found = plain(loss_type, average, nll=True), []
    for seed in range(6):
        problem = Problem(dtype=dtype, seed=seed)
        actual = problem.solve(ours, problem.reference())
        eager = problem.solve(usual, problem.reference())
        true = problem.solve(usual, problem.reference(torch.float64), dtype=torch.float64)
        assert actual.keys() == eager.keys() == true.keys()
        found.append([actual, eager, true])
    for name in true:
        assert_close_to_truth(*(torch.stack([each[name] for each in side]) for side in zip(*found, strict=True)), name)


def test_gradcheck():
    problem = Problem((2, 5, 3, 7), torch.float64)
    leaves = problem.heads()
    for average, loss_type in ((False, "sigmoid"), (True, "nca_pair"), (False, "ipo")):
        module = FusedLinearDPOLoss(
            loss_type=loss_type, average_log_prob=average, compute_nll_loss=True, use_ref_model=False
        )
        assert torch.autograd.gradcheck(
            lambda weight, hidden, bias: module(weight, hidden, problem.target, bias)[0],  # noqa: B023
            leaves,
        )


@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
def test_cached_references_are_those_of_the_model(average):
    """Bitwise, when they were made by this module."""
    problem = Problem()
    module = FusedLinearDPOLoss(average_log_prob=average, compute_nll_loss=True)
    of_model = problem.solve(module, problem.reference())
    of_reference = FusedLinearDPOLoss(average_log_prob=average, use_ref_model=False)
    _, (chosen, rejected, *_) = of_reference(problem.ref_weight, problem.ref_hidden, problem.target, problem.ref_bias)
    for wanted in (True, False):  # known log-probs need no reference model
        module.use_ref_model = wanted
        cached = {"ref_chosen_logps": chosen.double(), "ref_rejected_logps": rejected.clone().requires_grad_()}
        found = problem.solve(module, cached=cached)
        for name, value in of_model.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("loss_type", UNCOUPLED)
def test_every_loss_that_does_not_couple_pairs(loss_type):
    """The mean over pairs of what `dpo_loss` says of the log-probs that were returned."""
    problem = Problem()
    smoothing = 0.1 if loss_type in SMOOTHED else 0.0
    more = {"f_divergence_type": "js_divergence", "simpo_gamma": 0.9, "discopop_tau": 0.2}
    module = FusedLinearDPOLoss(beta=0.2, loss_type=loss_type, label_smoothing=smoothing, **more)
    found = problem.solve(module, problem.reference())
    none = FusedLinearDPOLoss(use_ref_model=False)
    _, references = none(problem.ref_weight, problem.ref_hidden, problem.target, problem.ref_bias)
    logps = found["chosen_logps"], found["rejected_logps"], *references[:2]
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), problem.lengths.chunk(2), strict=True))
    losses, *rewards = dpo_loss(*logps, 0.2, loss_type, smoothing, **lengths, **more)
    assert torch.allclose(found["loss"], losses.mean(), rtol=1e-6)
    assert torch.equal(torch.stack(rewards), torch.stack([found["chosen_rewards"], found["rejected_rewards"]]))


def test_a_loss_of_ones_own():
    def own_square(c: Comparisons, p: LossParameters) -> Tensor:
        return (p.beta * (c.winner_ratios - c.loser_ratios) - 1) ** 2

    def own_spread(c: Comparisons, p: LossParameters) -> Tensor:
        return (c.winner_ratios - c.winner_ratios.mean()) ** 2

    problem = Problem()
    try:
        found = problem.solve(FusedLinearDPOLoss(loss_type=own_square, label_smoothing=0.1), problem.reference())
        expected = problem.solve(plain("own_square"), problem.reference())
        assert_same(found, expected, 0.1, "own")
        with pytest.raises(ValueError, match="^loss: .*other groups"):
            problem.solve(FusedLinearDPOLoss(loss_type=own_spread), problem.reference())
    finally:
        for name in ("own_square", "own_spread"):
            LOSSES.pop(name, None)


def test_a_copy_has_a_loss_of_its_own():
    problem, loss = Problem(), FusedLinearDPOLoss(beta=0.3)
    expected = problem.solve(loss, problem.reference())
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        loss.beta = 0.7
        assert_same(problem.solve(copied, problem.reference()), expected, 0.3, "copy")
        loss.beta = 0.3


def test_what_is_ignored_has_no_say():
    """Not even NaN at a prompt or in padding; only the mean logit looks there, as Liger's does."""
    problem, other = Problem(), Problem()
    module = FusedLinearDPOLoss(compute_nll_loss=True)
    other.hidden[~other.scored], other.ref_hidden[~other.scored] = torch.nan, torch.inf
    found, again = (each.solve(module, each.reference()) for each in (problem, other))
    for name in found:
        assert torch.equal(found[name], again[name]) != name.endswith("logits_mean"), name
    assert torch.count_nonzero(found["d hidden"][~problem.scored]) == 0
    assert torch.count_nonzero(found["d hidden"].abs().sum(-1)) == problem.lengths.sum()


@pytest.mark.parametrize(("trains", "products"), [((True, True, True), 3), ((False, True, False), 2)])
def test_only_scored_rows_reach_the_head(trains, products, monkeypatch):
    flop = []
    for name in ("logits", "product", "accumulate"):
        original = getattr(Gemm, name)

        def counted(self, *arguments, original=original, name=name, **options):
            a, b = arguments[:2] if name != "accumulate" else (arguments[1].t(), arguments[2])
            flop.append(2 * a.shape[0] * a.shape[1] * (b.shape[0] if name == "logits" else b.shape[1]))
            return original(self, *arguments, **options)

        monkeypatch.setattr(Gemm, name, counted)
    problem = Problem(biased=False)
    problem.solve(FusedLinearDPOLoss(), problem.reference(), trains=trains)
    (_, h), rows = problem.weight.shape, int(problem.lengths.sum())
    assert sum(flop) == (products + 1) * 2 * rows * h * problem.weight.shape[0]


def test_nothing_of_the_size_of_all_logits(monkeypatch):
    rows = 30
    monkeypatch.setattr(tiles, "CPU_GROUP_ROWS", rows)
    monkeypatch.setattr(tiles, "CPU_ROWS", rows)
    problem = Problem((12, 11, 5, 507))
    sequences, positions = problem.target.shape
    with LargestTensor() as largest:
        problem.solve(FusedLinearDPOLoss(compute_nll_loss=True), problem.reference())
    assert rows // 2 * 507 <= largest.elements <= rows * 507 < sequences * positions * 507 / 8


def test_part_of_the_head_trains_and_the_reference_never():
    problem = Problem()
    module = FusedLinearDPOLoss(compute_nll_loss=True)
    reference = [tensor.requires_grad_() for tensor in problem.reference()]
    everything = problem.solve(module, reference)
    for trains in itertools.product((False, True), repeat=3):
        if any(trains):
            found = problem.solve(module, reference, trains=trains)
            assert set(GRADIENTS) & set(found) == {name for name, train in zip(GRADIENTS, trains, strict=True) if train}
            assert_same(found, {name: everything[name] for name in found}, 0.1, trains)
    loss, reports = module(problem.weight, problem.hidden, problem.target, problem.bias, *reference)
    assert not any(tensor.grad is not None for tensor in reference)
    assert not loss.requires_grad and torch.allclose(loss, everything["loss"])
    for name, report in zip(REPORTS, reports, strict=True):
        assert torch.allclose(report, everything[name], rtol=1e-5, atol=1e-5), name


def test_bitwise_the_same_however_it_is_called():
    """Again, from a copy, with options that have no effect, and from slices of longer hidden states."""
    problem = Problem()
    module = FusedLinearDPOLoss(compute_nll_loss=True)
    modules = [module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    modules.append(FusedLinearDPOLoss(compute_nll_loss=True, compiled=False, chunk_size=64))

    def sliced(weight, hidden, target, bias, ref_hidden, *reference):
        longer, ref_longer = (F.pad(states, (0, 0, 0, 1), value=9.0)[:, :-1] for states in (hidden, ref_hidden))
        return module(weight, longer, F.pad(target, (1, 0))[:, 1:], bias, ref_longer, *reference)

    expected = problem.solve(module, problem.reference())
    for each in (*modules, sliced):
        found = problem.solve(each, problem.reference())
        for name, value in expected.items():
            if each is sliced and name.endswith("logits_mean"):
                assert torch.allclose(found[name], value)  # a sum in another order
            else:
                assert torch.equal(found[name], value), name


def test_autocast_multiplies_in_its_dtype():
    """From inputs that bf16 holds: hidden states in bf16 or fp32 under an fp32 head, as a model under autocast has."""
    problem, half = Problem(), Problem(dtype=torch.bfloat16)
    for name, value in vars(half).items():
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            setattr(problem, name, value.float())
    module = FusedLinearDPOLoss(compute_nll_loss=True)
    expected = half.solve(module, half.reference())
    for dtype in (torch.float32, torch.bfloat16):
        problem.hidden, problem.ref_hidden = problem.hidden.to(dtype), problem.ref_hidden.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found = problem.solve(module, problem.reference())
        assert found["d weight"].dtype == torch.float32 and found["d hidden"].dtype == dtype
        for name, value in expected.items():
            assert torch.allclose(found[name].to(value.dtype), value, rtol=1e-2, atol=1e-6), name
        assert torch.equal(found["chosen_logps"], expected["chosen_logps"])


def test_a_target_in_which_nothing_is_ignored():
    problem = Problem()
    problem.target = torch.randint(123, problem.target.shape, generator=torch.Generator().manual_seed(1))
    expected = problem.solve(plain("sigmoid"), problem.reference())
    assert_same(problem.solve(FusedLinearDPOLoss(ignore_index=7**9), problem.reference()), expected, 0.1, "")


@pytest.mark.parametrize(("argument", "options"), [
    ("loss_type", {"loss_type": "dpo"}),
    ("loss_type", {"loss_type": "aot"}),
    *[("average_log_prob", {"loss_type": name, "average_log_prob": True}) for name in WITH_LENGTHS],
])  # fmt: skip
def test_bad_options_are_named(argument, options):
    with pytest.raises(ValueError, match=f"^{argument}"):
        FusedLinearDPOLoss(**options)


NO_SCORED = torch.tensor([[0, 1], [1, IGNORED], [IGNORED, IGNORED], [2, 3]])


@pytest.mark.parametrize(("argument", "change"), [
    ("target must have an even", {"target": torch.zeros(3, 2, dtype=torch.int64)}),
    ("target must have an even", {"target": torch.zeros(0, 2, dtype=torch.int64)}),
    ("target must be int64", {"target": torch.zeros(4, 2, dtype=torch.int32)}),
    ("target must be int64", {"target": torch.zeros(4, dtype=torch.int64)}),
    ("target must be on", {"target": torch.zeros(4, 2, dtype=torch.int64, device="meta")}),
    ("target has no scored position in sequence 2, .*pair 0", {"target": NO_SCORED}),
    ("target has no scored position in sequence 1, .*pair 1", {"target": NO_SCORED.roll(-1, 0)}),
    ("targets must lie", {"target": torch.full((4, 2), 7)}),
    ("_input", {"_input": torch.zeros(4, 3, 5)}),
    ("_input", {"_input": torch.zeros(8, 5)}),
    ("_input", {"_input": torch.zeros(4, 2, 5, dtype=torch.int64)}),
    ("lin_weight", {"lin_weight": torch.zeros(7, 4)}),
    ("lin_weight", {"lin_weight": torch.zeros(7, 5, dtype=torch.bfloat16)}),
    ("lin_weight", {"lin_weight": torch.zeros(7, 5, device="meta")}),
    ("bias", {"bias": torch.zeros(6)}),
    ("ref_input", {"ref_input": torch.zeros(2, 2, 5)}),
    ("ref_input", {"ref_input": torch.zeros(4, 2, 5, device="meta")}),
    ("ref_input is missing", {"ref_input": None}),
    ("ref_input is missing", {"ref_input": None, "ref_weight": None}),
    ("ref_weight", {"ref_weight": torch.zeros(7, 6)}),
    ("ref_weight must have ref_input's dtype", {"ref_weight": torch.zeros(7, 5).double()}),
    ("ref_weight is missing", {"ref_weight": None}),
    ("ref_bias", {"ref_bias": torch.zeros(8)}),
    ("ref_input is given", {"ref_chosen_logps": torch.zeros(2)}),
    ("ref_input is given", {"use_ref_model": False}),
    ("ref_weight is given", {"use_ref_model": False, "ref_input": None}),
])  # fmt: skip
def test_bad_input_is_named(argument, change):
    arguments = {
        "lin_weight": torch.zeros(7, 5),
        "_input": torch.zeros(4, 2, 5),
        "target": torch.zeros(4, 2, dtype=torch.int64),
        "ref_input": torch.zeros(4, 2, 5),
        "ref_weight": torch.zeros(7, 5),
        **change,
    }
    module = FusedLinearDPOLoss(use_ref_model=arguments.pop("use_ref_model", True))
    with pytest.raises(ValueError, match=f"^{argument}"):
        module(**arguments)


@pytest.mark.parametrize(("argument", "change"), [
    ("ref_rejected_logps is missing", {"ref_rejected_logps": None}),
    ("ref_chosen_logps is missing", {"ref_chosen_logps": None}),
    ("ref_chosen_logps", {"ref_chosen_logps": torch.zeros(4)}),
    ("ref_rejected_logps", {"ref_rejected_logps": torch.zeros(2, dtype=torch.int64)}),
    ("ref_rejected_logps", {"ref_rejected_logps": torch.zeros(2, device="meta")}),
    ("ref_bias is given", {"ref_bias": torch.zeros(7)}),
])  # fmt: skip
def test_bad_cached_references_are_named(argument, change):
    cached = {"ref_chosen_logps": torch.zeros(2), "ref_rejected_logps": torch.zeros(2), **change}
    for use_ref_model in (True, False):
        module = FusedLinearDPOLoss(use_ref_model=use_ref_model)
        with pytest.raises(ValueError, match=f"^{argument}"):
            module(torch.zeros(7, 5), torch.zeros(4, 2, 5), torch.zeros(4, 2, dtype=torch.int64), **cached)


LARGE = (8, 301, 576, 32003)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trains", [(True, True, True), (False, True, False)], ids=["all", "frozen"])
def test_on_gpu(trains, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    problem = Problem(LARGE, dtype, device="cuda")
    module, usual = FusedLinearDPOLoss(compute_nll_loss=True), plain("sigmoid", nll=True)
    actual = problem.solve(module, problem.reference(), trains=trains)
    eager = problem.solve(usual, problem.reference(), trains=trains)
    true = problem.solve(usual, problem.reference(torch.float64), dtype=torch.float64, trains=trains)
    for name in true:
        if true[name].numel() > 1:  # how near eager's single numbers are is luck
            assert_close_to_truth(actual[name], eager[name], true[name], name)
        else:
            assert torch.allclose(actual[name].double(), true[name], rtol=1e-3, atol=1e-3), name


@pytest.mark.gpu
@pytest.mark.parametrize("loss_type", LIGER_LOSSES)
def test_on_gpu_equal_to_liger(loss_type, liger):
    torch.backends.cuda.matmul.allow_tf32 = False
    options = {"loss_type": loss_type, "label_smoothing": SMOOTHING.get(loss_type, 0.0), "compute_nll_loss": True}
    options["discopop_tau"] = 0.3
    problem = Problem((8, 128, 1024, 4096), device="cuda")
    theirs, ours = (problem.solve(make(**options), problem.reference()) for make in (liger, FusedLinearDPOLoss))
    assert_same(ours, theirs, 0.1, loss_type)


@pytest.mark.gpu
def test_on_gpu_bitwise_the_same_and_without_waiting_where_target_is_on_the_cpu():
    problem = Problem(LARGE, torch.bfloat16, device="cuda")
    module = FusedLinearDPOLoss(compute_nll_loss=True)
    first = problem.solve(module, problem.reference())
    problem.target = problem.target.cpu()
    problem.solve(module, problem.reference())
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = problem.solve(module, problem.reference())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in first.items():
        assert torch.equal(second[name], value), name
