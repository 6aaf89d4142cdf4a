"""Every loss equals its formula in float64, value and gradient, and obeys the laws that preferences have."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dpo_fast.losses import (
    LOSSES,
    REFERENCE_FREE,
    SMOOTHED,
    SORTED,
    WITH_LENGTHS,
    WITH_OFFSETS,
    Comparisons,
    LossParameters,
    dpo_loss,
    named_loss,
    preference_loss,
)


def comparisons(count: int = 7, seed: int = 0) -> Comparisons:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.rand(count, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, 40, (2, count), generator=generator)
    policy = [-noise(20), -noise(20)]
    reference = [logps + noise(4) - 2 for logps in policy]
    logps = [tensor.requires_grad_() for tensor in (*policy, *reference)]
    return Comparisons(*logps, *lengths, mean_winner_tokens=lengths[0].double().mean())


def pairs_of(c: Comparisons) -> tuple[torch.Tensor, ...]:
    return c.winner_logps, c.loser_logps, c.winner_ref_logps, c.loser_ref_logps


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def log_odds(mean_logp: float) -> float:
    return math.log(math.exp(mean_logp) / (1 - math.exp(mean_logp)))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


DIVERGENCES = {
    "reverse_kl": lambda r: r,
    "forward_kl": lambda r: 1 - math.exp(-r),
    "js_divergence": lambda r: math.log(2) + log_sigmoid(r),
    "alpha_divergence": lambda r: (math.exp(-0.3 * r) - 1) / -0.3,  # α = 0.7
}


def formula(name: str, c: Comparisons, row: int, p: LossParameters) -> float:
    """What the papers write, in Python's floats."""
    w, lo, rw, rl = (x[row].item() for x in (c.winner_logps, c.loser_logps, c.winner_ref_logps, c.loser_ref_logps))
    nw, nl = int(c.winner_lengths[row]), int(c.loser_lengths[row])
    b, e, tau = p.beta, p.label_smoothing, p.discopop_tau
    sw, sl = (DIVERGENCES[p.f_divergence_type](ratio) for ratio in (w - rw, lo - rl))
    x = b * (sw - sl)

    rows = list(zip(*(column.tolist() for column in pairs_of(c)), strict=True))
    policy_margin, reference_margin = (lambda w, lo, rw, rl: w - lo), (lambda w, lo, rw, rl: rw - rl)
    divergence = DIVERGENCES[p.f_divergence_type]
    winner_score, loser_score = (lambda w, lo, rw, rl: divergence(w - rw)), (lambda w, lo, rw, rl: divergence(lo - rl))

    def ordered(value) -> list[float]:
        return sorted(value(*row) for row in rows)

    mean_margin = b * sum(winner_score(*row) - loser_score(*row) for row in rows) / len(rows)

    def logistic(x: float) -> float:
        return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)

    return {
        "sigmoid": lambda: logistic(x),
        "sigmoid_norm": lambda: logistic(b * (sw / nw - sl / nl)),
        "hinge": lambda: max(0.0, 1 - x),
        "ipo": lambda: (sw / nw - sl / nl - 1 / (2 * b)) ** 2,
        "exo_pair": lambda: sigma(x) * (log_sigmoid(x) - math.log(1 - e)) + sigma(-x) * (log_sigmoid(-x) - math.log(e)),
        "robust": lambda: (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e),
        "nca_pair": lambda: -log_sigmoid(b * sw) - 0.5 * log_sigmoid(-b * sw) - 0.5 * log_sigmoid(-b * sl),
        "bco_pair": lambda: -log_sigmoid(b * sw) - log_sigmoid(-b * sl),
        "sppo_hard": lambda: (sw - 0.5 / b) ** 2 + (sl + 0.5 / b) ** 2,
        "apo_zero": lambda: 1 - sigma(b * sw) + sigma(b * sl),
        "apo_down": lambda: sigma(b * sw) + 1 - sigma(x),
        "discopop": lambda: -log_sigmoid(x) * (1 - sigma(x / tau)) + math.exp(-x) * sigma(x / tau),
        "plackett_luce": lambda: -log_sigmoid(x),
        "beta_dpo": lambda: logistic(max(0.01, 1 + p.beta_dpo_alpha * mean_margin) * x),
        "aot": lambda: logistic(b * (ordered(policy_margin)[row] - ordered(reference_margin)[row])),
        "aot_unpaired": lambda: logistic(b * (ordered(winner_score)[row] - ordered(loser_score)[row])),
        "sft": lambda: -w / float(c.mean_winner_tokens),
        "nll": lambda: -w / nw,
        "simpo": lambda: logistic(b * (w / nw - lo / nl) - p.simpo_gamma),
        "cpo": lambda: logistic(b * (w - lo)) - w / nw,
        "orpo": lambda: -w / nw - b * log_sigmoid(log_odds(w / nw) - log_odds(lo / nl)),
    }[name]()


def parameters(name: str, **options) -> LossParameters:
    """Parameters that the loss can be evaluated with, α = 0.7."""
    smoothing = options.pop("label_smoothing", 0.1)
    smoothing = smoothing if name in SMOOTHED else 0.0
    return LossParameters(label_smoothing=smoothing, f_alpha_divergence_coef=0.7, **options)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.05), (0.7, 0.2)])
def test_value_equals_the_formula(name, divergence, beta, smoothing):
    c = comparisons()
    p = parameters(name, beta=beta, label_smoothing=smoothing, f_divergence_type=divergence, discopop_tau=0.5)
    expected = [formula(name, c, row, p) for row in range(7)]
    assert LOSSES[name](c, p).tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"beta_dpo"}))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_is_the_derivative(name, divergence):
    c = comparisons(seed=3)
    p = parameters(name, beta=0.3, f_divergence_type=divergence, discopop_tau=0.5)

    def loss(winner, loser):
        return LOSSES[name](dataclasses.replace(c, winner_logps=winner, loser_logps=loser), p)

    assert torch.autograd.gradcheck(loss, (c.winner_logps, c.loser_logps))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_beta_dpo_is_dpo_with_a_beta_of_the_whole_step(divergence):
    """β′ = [1 + α(M − M₀)]β carries no gradient, and M is weighted as the loss is."""
    weights, running = torch.linspace(1, 2, 7, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    c = dataclasses.replace(comparisons(seed=4), weights=weights, mean_margin=running)
    p = parameters("beta_dpo", beta=0.3, f_divergence_type=divergence, beta_dpo_alpha=0.5)
    divergence = DIVERGENCES[divergence]
    ratios = zip(c.winner_ratios.tolist(), c.loser_ratios.tolist(), strict=True)
    margins = [0.3 * (divergence(w) - divergence(lo)) for w, lo in ratios]
    mean = sum(m * w for m, w in zip(margins, weights.tolist(), strict=True)) / weights.sum().item()
    fixed = dataclasses.replace(p, beta=0.3 * max(0.01, 1 + 0.5 * (mean - 0.4)))
    values = [LOSSES["beta_dpo"](c, p), LOSSES["sigmoid"](c, fixed)]
    assert torch.allclose(*values, rtol=1e-10)
    sides = (c.winner_logps, c.loser_logps)
    for one, other in zip(*(torch.autograd.grad(value.sum(), sides) for value in values), strict=True):
        assert torch.allclose(one, other, rtol=1e-10)
    low = dataclasses.replace(c, mean_margin=torch.tensor(1e3))
    fixed = dataclasses.replace(p, beta=0.003)
    assert torch.allclose(LOSSES["beta_dpo"](low, p), LOSSES["sigmoid"](c, fixed), rtol=1e-10), "never turned around"


AT_THE_REFERENCE = {
    "sigmoid": math.log(2),
    "sigmoid_norm": math.log(2),
    "hinge": 1.0,
    "ipo": 25.0,
    "robust": math.log(2),
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": (math.log(2) + 1) / 2,
    "plackett_luce": math.log(2),
    "beta_dpo": math.log(2),
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "exo_pair": -math.log(2) - 0.5 * (math.log(0.9) + math.log(0.1)),
}


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"sft", *REFERENCE_FREE}))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_policy_equal_to_the_reference_gives_the_loss_of_no_preference(name, divergence):
    c = comparisons()
    c = dataclasses.replace(c, winner_ref_logps=c.winner_logps, loser_ref_logps=c.loser_logps)
    values = LOSSES[name](c, parameters(name, f_divergence_type=divergence))
    assert values.tolist() == pytest.approx([AT_THE_REFERENCE[name]] * 7, abs=1e-12)


def swapped(c: Comparisons) -> Comparisons:
    return Comparisons(
        c.loser_logps, c.winner_logps, c.loser_ref_logps, c.winner_ref_logps, c.loser_lengths, c.winner_lengths,
        c.mean_winner_tokens,
    )  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_who_looks_at_the_reference(name):
    c = comparisons()
    ref = (c.winner_ref_logps, c.loser_ref_logps)
    gradients = torch.autograd.grad(LOSSES[name](c, parameters(name)).sum(), ref, allow_unused=True)
    assert all((gradient is None) == (name in (*REFERENCE_FREE, "sft")) for gradient in gradients)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "exo_pair"])
def test_swapping_winner_and_loser_is_flipping_the_label(name):
    c = comparisons()
    right, flipped = (LOSSES[name](x, LossParameters(0.1, e)) for x, e in ((c, 0.3), (swapped(c), 0.7)))
    assert torch.allclose(right, flipped, rtol=1e-12)


def test_robust_is_the_clean_loss_in_expectation_over_flips():
    c, noisy, clean = comparisons(), LossParameters(0.1, 0.3), LossParameters(0.1)
    expected = 0.7 * LOSSES["robust"](c, noisy) + 0.3 * LOSSES["robust"](swapped(c), noisy)
    assert torch.allclose(expected, LOSSES["sigmoid"](c, clean), rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_permuting_comparisons_permutes_losses(name):
    c, order = comparisons(), torch.tensor([3, 0, 6, 1, 2, 5, 4])
    moved = Comparisons(
        *(getattr(c, field.name)[order] for field in dataclasses.fields(c)[:6]), mean_winner_tokens=c.mean_winner_tokens
    )
    p = parameters(name)
    expected = LOSSES[name](c, p)
    assert torch.allclose(LOSSES[name](moved, p), expected if name in SORTED else expected[order], rtol=1e-12)


def test_a_mix_is_the_weighted_sum_of_its_losses():
    c, p = comparisons(), LossParameters(0.2, 0.1)
    mixed = preference_loss(c, ["sigmoid", "sft"], [0.8, 0.3], p)
    assert torch.allclose(mixed, 0.8 * LOSSES["sigmoid"](c, p) + 0.3 * LOSSES["sft"](c, p))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("margin", [-1e6, 1e6, None])
def test_large_margins_stay_finite(name, divergence, margin):
    """Where TRL's discopop is 0·inf, and its forward KL inf − inf."""
    c = comparisons()
    winner = c.winner_logps * 0 if margin is None else c.winner_logps + margin  # a log-prob of 0 has infinite odds
    winner = winner.detach().float().requires_grad_()
    huge = dataclasses.replace(c, winner_logps=winner)
    values = LOSSES[name](huge, parameters(name, f_divergence_type=divergence))
    (gradient,) = torch.autograd.grad(values.sum(), winner)
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_dpo_loss_is_the_loss_and_the_rewards_of_the_original_code(name):
    c = comparisons()
    lengths = {"chosen_lengths": c.winner_lengths, "rejected_lengths": c.loser_lengths}
    options = {"beta": 0.3, "label_smoothing": 0.2 if name in SMOOTHED else 0.0, "discopop_tau": 0.5}
    losses, chosen, rejected = dpo_loss(*pairs_of(c), loss_type=name, **options, **lengths)
    assert torch.allclose(losses, LOSSES[name](c, LossParameters(**options)), rtol=1e-6)
    assert torch.equal(chosen, 0.3 * (c.winner_logps - c.winner_ref_logps).detach())
    assert torch.equal(rejected, 0.3 * (c.loser_logps - c.loser_ref_logps).detach())
    assert losses.requires_grad and not chosen.requires_grad and not rejected.requires_grad
    if name in WITH_LENGTHS:
        with pytest.raises(ValueError, match="^chosen_lengths is missing"):
            dpo_loss(*pairs_of(c), loss_type=name)
    else:
        assert torch.equal(dpo_loss(*pairs_of(c), loss_type=name, **options)[0], losses)
    if name not in SMOOTHED:
        with pytest.raises(ValueError, match="^label_smoothing=0.1 means nothing to"):
            dpo_loss(*pairs_of(c), loss_type=name, label_smoothing=0.1, **lengths)


def test_dpo_loss_names_bad_arguments():
    c = comparisons()
    with pytest.raises(ValueError, match="^policy_rejected_logps must have the shape"):
        dpo_loss(c.winner_logps, c.loser_logps[1:], c.winner_ref_logps, c.loser_ref_logps)
    with pytest.raises(ValueError, match="loss_type='dop' is not known"):
        dpo_loss(*pairs_of(c), loss_type="dop")


def test_a_function_of_ones_own_is_a_loss(monkeypatch):
    monkeypatch.setattr("dpo_fast.losses.catalogue.LOSSES", dict(LOSSES))

    def cauchy(c: Comparisons, p: LossParameters) -> torch.Tensor:
        return torch.log1p((1 - p.beta * (c.winner_ratios - c.loser_ratios)) ** 2)

    c = comparisons()
    offsets = torch.linspace(-1, 1, 7)
    assert dpo_loss(*pairs_of(c), loss_type=cauchy, offsets=offsets)[0].shape == (7,), "it may heed offsets"
    losses, _, _ = dpo_loss(*pairs_of(c), beta=0.2, loss_type=cauchy)
    assert torch.equal(losses, cauchy(c, LossParameters(0.2)))
    assert named_loss("cauchy") == named_loss(cauchy) == "cauchy"

    def again(c: Comparisons, p: LossParameters) -> torch.Tensor:
        return 2 * cauchy(c, p)

    again.__name__ = "cauchy"  # the cell of a notebook runs a second time
    assert torch.equal(dpo_loss(*pairs_of(c), beta=0.2, loss_type=again)[0], 2 * losses)
    cauchy.__name__ = "sigmoid"
    with pytest.raises(ValueError, match="sigmoid is the name of a loss of dpo_fast"):
        named_loss(cauchy)
    with pytest.raises(ValueError, match="is not known"):
        named_loss(7)


@pytest.mark.parametrize("name", LOSSES)
def test_an_offset_is_a_margin_that_the_comparison_lacks(name):
    """Where it means something, it acts as if the winner's β·score were so much lower."""
    c, p = comparisons(), parameters(name, beta=0.5, discopop_tau=0.5)
    offsets = torch.linspace(-1, 2, 7, dtype=torch.float64)
    with_offsets = LOSSES[name](dataclasses.replace(c, offsets=offsets), p)
    if name in WITH_OFFSETS:
        expected = LOSSES[name](dataclasses.replace(c, winner_logps=c.winner_logps - offsets / 0.5), p)
        assert torch.allclose(with_offsets, expected, rtol=1e-10)
    else:
        assert torch.equal(with_offsets, LOSSES[name](c, p))
        with pytest.raises(ValueError, match="^offsets mean nothing"):
            dpo_loss(*pairs_of(c), loss_type=name, offsets=offsets)


def test_plackett_luce_is_the_likelihood_of_a_ranking():
    """Of two groups, one of four completions and one of two: all pairs, every winner's losers below it."""
    scores = torch.tensor([2.0, 0.5, -1.0, 0.3, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    ranking = [[0, 1, 2, 3], [4, 5]]
    pairs = torch.tensor([(i, j) for order in ranking for k, i in enumerate(order) for j in order[k + 1 :]])
    zeros = torch.zeros(len(pairs), dtype=torch.float64)
    winners, losers = pairs.unbind(1)
    lengths = torch.ones(len(pairs))
    c = Comparisons(scores[winners], scores[losers], zeros, zeros, lengths, lengths, lengths.mean(), winners=winners)
    value = LOSSES["plackett_luce"](c, LossParameters(0.7)).sum()
    likelihood = sum((0.7 * scores[order[k:]]).log_softmax(0)[0] for order in ranking for k in range(len(order) - 1))
    assert value.item() == pytest.approx(-likelihood.item(), rel=1e-12)
    for one, other in zip(*(torch.autograd.grad(x, scores) for x in (value, -likelihood)), strict=True):
        assert torch.allclose(one, other, rtol=1e-10)
