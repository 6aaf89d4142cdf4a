"""Every loss equals its formula in float64, value and gradient, and obeys the laws that preferences have."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dpo_fast.losses import LOSSES, Comparisons, LossParameters, preference_loss


def comparisons(count: int = 7, seed: int = 0) -> Comparisons:
    generator = torch.Generator().manual_seed(seed)

    def logps() -> torch.Tensor:
        return (-20 * torch.rand(count, generator=generator, dtype=torch.float64)).requires_grad_()

    lengths = torch.randint(1, 40, (2, count), generator=generator)
    return Comparisons(logps(), logps(), logps(), logps(), *lengths, mean_winner_tokens=lengths[0].double().mean())


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def formula(name: str, w: float, lo: float, rw: float, rl: float, nw: int, nl: int, mean: float, b: float, e: float):
    delta = (w - rw) - (lo - rl)
    return {
        "sigmoid": -(1 - e) * log_sigmoid(b * delta) - e * log_sigmoid(-b * delta),
        "hinge": max(0.0, 1 - b * delta),
        "ipo": ((w - rw) / nw - (lo - rl) / nl - 1 / (2 * b)) ** 2,
        "sft": -w / mean,
    }[name]


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.7, 0.2)])
def test_value_equals_the_formula(name, beta, smoothing):
    c = comparisons()
    values = LOSSES[name](c, LossParameters(beta, smoothing))
    columns = (c.winner_logps, c.loser_logps, c.winner_ref_logps, c.loser_ref_logps, c.winner_lengths, c.loser_lengths)
    expected = [
        formula(name, *row, c.mean_winner_tokens.item(), beta, smoothing)
        for row in zip(*(column.tolist() for column in columns), strict=True)
    ]
    assert values.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradient_is_the_derivative(name):
    c = comparisons(seed=3)
    parameters = LossParameters(0.3, 0.1)

    def loss(winner, loser):
        return LOSSES[name](dataclasses.replace(c, winner_logps=winner, loser_logps=loser), parameters)

    assert torch.autograd.gradcheck(loss, (c.winner_logps, c.loser_logps))


@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_policy_equal_to_the_reference_gives_the_loss_of_no_preference(name):
    c = comparisons()
    c = dataclasses.replace(c, winner_ref_logps=c.winner_logps, loser_ref_logps=c.loser_logps)
    expected = {"sigmoid": math.log(2), "hinge": 1.0}[name]
    assert LOSSES[name](c, LossParameters()).tolist() == pytest.approx([expected] * 7, abs=1e-15)


def test_swapping_winner_and_loser_flips_the_sigmoid_coefficient_at_label_smoothing():
    c = comparisons()
    swapped = Comparisons(
        c.loser_logps, c.winner_logps, c.loser_ref_logps, c.winner_ref_logps, c.loser_lengths, c.winner_lengths,
        c.mean_winner_tokens,
    )  # fmt: skip
    right = LOSSES["sigmoid"](c, LossParameters(0.1, 0.3))
    flipped = LOSSES["sigmoid"](swapped, LossParameters(0.1, 0.7))
    assert torch.allclose(right, flipped, rtol=1e-12)


def test_a_mix_is_the_weighted_sum_of_its_losses():
    c, parameters = comparisons(), LossParameters(0.2, 0.1)
    mixed = preference_loss(c, ["sigmoid", "sft"], [0.8, 0.3], parameters)
    assert torch.allclose(mixed, 0.8 * LOSSES["sigmoid"](c, parameters) + 0.3 * LOSSES["sft"](c, parameters))


def test_large_margins_stay_finite():
    c = comparisons()
    huge = dataclasses.replace(c, winner_logps=c.winner_logps - 1e6)
    assert all(torch.isfinite(LOSSES[name](huge, LossParameters(0.1, 0.1))).all() for name in LOSSES)
