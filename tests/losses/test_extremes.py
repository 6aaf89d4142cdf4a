"""Every loss is finite, and pulls the right way or not at all, whatever β, divergence and log-probs are."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from dpo_fast.losses import LOSSES, REFERENCE_FREE, SMOOTHED, Comparisons, LossParameters, functions, uses

BETAS = (1e-8, 1e-3, 0.1, 1.0, 100.0, 1e6)
RATIOS = (0.0, 1e-3, 1.0, 30.0, 45.0, 79.0, 88.0, 200.0, 1e4, 1e5, 1e6)
RATIOS = (*RATIOS, *(-ratio for ratio in RATIOS[1:]))
DIVERGENCES = [
    {"f_divergence_type": "reverse_kl"},
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    *(
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
        for alpha in (-1e3, -5.0, 0.0, 0.5, 0.9999, 1.0001, 2.0, 40.0, 1e6)
    ),
]


def pairs(winner_ratios, loser_ratios, dtype=torch.float32) -> Comparisons:
    """Pairs of log-probs, below 0, that are so far from the reference."""
    ratios = torch.tensor([winner_ratios, loser_ratios], dtype=torch.float32)
    policy = ratios.clamp(max=0) - 1e-3
    reference = policy - ratios
    lengths = torch.tensor([7, 5])[:, None].expand_as(ratios)
    return Comparisons(
        *policy.to(dtype).requires_grad_().unbind(0),
        *reference.to(dtype).unbind(0),
        *lengths,
        mean_winner_tokens=torch.tensor(7.0, dtype=dtype),
        offsets=torch.zeros(ratios.shape[1], dtype=dtype),
    )


def evaluated(name: str, c: Comparisons, p: LossParameters) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the losses and their derivatives by the log-probs of winner and loser."""
    sides = (c.winner_logps, c.loser_logps)
    losses = LOSSES[name](c, p)
    return losses, *torch.autograd.grad(losses.sum(), sides, allow_unused=True, materialize_grads=True)


def each_alone(c: Comparisons) -> list[Comparisons]:
    """Pairs one by one, as a loss that couples them would mix their derivatives."""
    columns = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    count = len(c.winner_logps)
    parts = ({k: v[i : i + 1] if v is not None and v.ndim else v for k, v in columns.items()} for i in range(count))
    return [Comparisons(**part) for part in parts]


def parameters(name: str, beta: float, divergence: dict, **options) -> LossParameters:
    smoothing = {"label_smoothing": 0.49 if name in SMOOTHED else 0.0}
    return LossParameters(**{"beta": beta, **smoothing, **divergence, **options})


def up_to_300(x: torch.Tensor, largest: object = None) -> torch.Tensor:
    return x.clamp(max=300).exp()


# Of those that look at no divergence, one is enough.
CASES = [
    pytest.param(name, divergence, id=f"{name} {' '.join(map(str, divergence.values()))}")
    for name in LOSSES
    for divergence in (DIVERGENCES if name not in (*REFERENCE_FREE, "sft", "aot") else DIVERGENCES[:1])
]
TUNED = {
    "discopop": [{"discopop_tau": 1e-6}, {"discopop_tau": 1e6}],
    "simpo": [{"simpo_gamma": 1e30}],
    "beta_dpo": [{"beta_dpo_alpha": 0.0}, {"beta_dpo_alpha": 1e6}],
    "robust": [{"label_smoothing": 0.4999999}],
    "exo_pair": [{"label_smoothing": 1e-30}],
}
EXTREMES = [list(column) for column in zip(*itertools.product(RATIOS, RATIOS), strict=True)]


@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_value_and_derivative_are_finite(name, divergence):
    c = pairs(*EXTREMES)
    with_offsets = [dataclasses.replace(c, offsets=torch.full_like(c.offsets, offset)) for offset in (1e20, -1e20)]
    tuned = [parameters(name, beta, divergence, **options) for beta in BETAS for options in ({}, *TUNED.get(name, ()))]
    assert tuned
    for p, compared in itertools.product(tuned, [c, *(with_offsets if uses(name, "offsets") else ())]):
        for what, found in zip(("loss", "∂winner", "∂loser"), evaluated(name, compared, p), strict=True):
            bad = (~found.isfinite()).nonzero()[:3, 0].tolist()
            assert not bad, f"{what} at {p}, ratios {[(EXTREMES[0][i], EXTREMES[1][i]) for i in bad]}"
            assert found.sum().isfinite(), f"the sum of {what} over a batch, at {p}"


@pytest.mark.parametrize(("name", "divergence"), [case for case in CASES if case.values[1] in DIVERGENCES[:7]])
def test_the_derivative_has_the_sign_of_the_exact_one_or_is_zero(name, divergence, monkeypatch):
    """The exact one: float64, whose exponentials need no bound up to e^300."""
    ratios = [ratio for ratio in RATIOS if abs(ratio) <= 200]
    ratios = ratios if not uses(name, "step") else [-200.0, -88.0, -45.0, -1.0, 0.0, 1.0, 79.0]  # one by one, slow
    bounded = functions._bounded_exp
    grid = [list(column) for column in zip(*itertools.product(ratios, ratios), strict=True)]
    step = uses(name, "step")
    for beta in (1e-8, 0.1, 100.0):
        p = parameters(name, beta, divergence)
        sides = []
        for dtype in (torch.float32, torch.float64):
            c = pairs(*grid, dtype=dtype)
            monkeypatch.setattr(functions, "_bounded_exp", bounded if dtype is torch.float32 else up_to_300)
            found = zip(*(evaluated(name, one, p) for one in each_alone(c)), strict=True) if step else ()
            sides.append([torch.cat(parts) for parts in found] if step else evaluated(name, c, p))
        for found, exact in list(zip(*sides, strict=True))[1:]:
            wrong = (found.double().sign() * exact.sign() < 0) & (exact.abs() > 1e-5 * exact.abs().amax().clamp(max=1))
            where = wrong.nonzero()[:3, 0].tolist()
            assert not where, f"beta={beta}: {[(grid[0][i], grid[1][i], found[i], exact[i]) for i in where]}"


@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_the_bounds_leave_the_ordinary_range_alone(name, divergence, monkeypatch):
    """Bit by bit, against exponentials without a bound."""
    alpha = divergence.get("f_alpha_divergence_coef", 0.0)
    reach = min(30.0, 30.0 / max(1.0, abs(alpha - 1)))
    generator = torch.Generator().manual_seed(0)
    ratios = ((2 * torch.rand(2, 64, generator=generator) - 1) * reach).tolist()
    for beta in (1e-3, 0.1, 1.0, 10.0, *((1e6,) if name in ("ipo", "sppo_hard") else ())):
        p = parameters(name, beta, divergence)
        bounded = evaluated(name, pairs(*ratios), p)
        with monkeypatch.context() as patched:
            patched.setattr(functions, "_bounded_exp", lambda x, largest=80.0: x.clamp(max=80.0).exp())
            free = evaluated(name, pairs(*ratios), p)
        assert all(torch.equal(*both) for both in zip(bounded, free, strict=True)), f"beta={beta}"


def test_a_beta_that_is_a_tensor_bounds_alike():
    for beta, name in itertools.product((0.1, 1e6), ("sigmoid", "sppo_hard")):
        numbers = [
            evaluated(name, pairs(*EXTREMES), LossParameters(beta=b, f_divergence_type="forward_kl"))
            for b in (beta, torch.tensor(beta))
        ]
        for one, other in zip(*numbers, strict=True):
            assert torch.isfinite(other).all() and torch.allclose(one, other, rtol=1e-4)


@pytest.mark.parametrize("lengths", [1, 1000])
@pytest.mark.parametrize("beta", BETAS)
def test_odds_are_finite_at_both_ends(beta, lengths):
    logps = torch.tensor([0.0, -1e-9, -1e-7, -1e-3, -1.0, -90.0, -1e4, -1e6])
    c = pairs(*EXTREMES)
    grid = torch.cartesian_prod(logps, logps)
    count = torch.full((len(grid),), lengths)
    zeros = torch.zeros(len(grid))
    c = Comparisons(
        *grid.T.clone().requires_grad_().unbind(0), zeros, zeros, count, count, torch.tensor(float(lengths))
    )
    losses, winner, loser = evaluated("orpo", c, LossParameters(beta=beta))
    assert torch.isfinite(losses).all() and torch.isfinite(winner).all() and torch.isfinite(loser).all()
    assert (winner <= 0).all() and (loser >= 0).all()
    assert losses.amax() >= 1e6 / lengths * math.floor(min(beta, 1))
