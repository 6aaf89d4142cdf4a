"""A loss says at its function what it looks at; all that asks for it, and every check, follows from there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dpo_fast import losses
from dpo_fast.config import DPOConfig
from dpo_fast.integrations.liger import FusedLinearDPOLoss
from dpo_fast.losses import LOSSES, LossParameters, LossUses, catalogue, dpo_loss, losses_using, preference_loss, uses
from preferences import logged, make_trainer, pairs


@pytest.fixture
def squared(monkeypatch):
    """A new loss: one decorated function, and nothing else."""
    monkeypatch.setattr(catalogue, "LOSSES", dict(LOSSES))

    @losses.loss(label_smoothing=True, lengths=True, reference=False)
    def squared(c, p):
        margin = c.winner_logps / c.winner_lengths - c.loser_logps / c.loser_lengths
        return (1 - 2 * p.label_smoothing - p.beta * margin) ** 2

    return squared


def test_a_new_loss_is_one_function(squared, tmp_path):
    assert "squared" in losses_using("label_smoothing") and "squared" in losses_using("lengths")
    assert not uses("squared", "reference") and not uses("squared", "offsets") and not uses("squared", "step")
    logps, lengths = -torch.arange(1.0, 5.0), torch.tensor([2, 4])
    options = {"loss_type": "squared", "chosen_lengths": lengths, "rejected_lengths": lengths}
    found, _, _ = dpo_loss(*logps.reshape(2, 2), *logps.reshape(2, 2), beta=0.5, label_smoothing=0.1, **options)
    assert torch.allclose(found, (0.8 - 0.5 * torch.tensor([1.0, 0.5])) ** 2)
    with pytest.raises(ValueError, match="^chosen_lengths is missing: squared counts tokens"):
        dpo_loss(*logps.reshape(2, 2), *logps.reshape(2, 2), loss_type="squared")
    with pytest.raises(ValueError, match="^offsets mean nothing to squared"):
        dpo_loss(*logps.reshape(2, 2), *logps.reshape(2, 2), offsets=torch.zeros(2), **options)

    trainer = make_trainer(tmp_path, loss_type=["squared"], label_smoothing=0.1, max_steps=2)
    assert trainer.reference is None, "it looks at none"
    trainer.train()
    assert len(logged(trainer, "loss")) == 2
    rows = pairs().add_column("offset", [0.5] * len(pairs()))
    with pytest.raises(ValueError, match=r"^offset: .* mean nothing to loss_type=\['squared'\]"):
        make_trainer(tmp_path, rows, loss_type=["squared"])


def test_the_views_are_of_the_catalogue():
    assert set(losses.SMOOTHED) == {name for name in LOSSES if uses(name, "label_smoothing")}
    assert set(losses.REFERENCE_FREE) == {"nll", "simpo", "cpo", "orpo"} and set(losses.SORTED) < set(losses.COUPLED)
    assert all(getattr(losses, name) is function for name, function in LOSSES.items())
    with pytest.raises(AttributeError, match="no attribute 'dop'"):
        losses.dop  # noqa: B018


def test_every_loss_says_what_it_looks_at():
    """A log-prob, length or parameter that a loss does not say it uses leaves its values alone."""
    logps = [(-torch.rand(6, generator=torch.Generator().manual_seed(k)) * 9).double() for k in range(4)]
    lengths = torch.arange(1, 7), torch.arange(6, 0, -1)
    for name, function in LOSSES.items():
        smoothing = 0.1 if uses(name, "label_smoothing") else 0.0
        p = LossParameters(label_smoothing=smoothing)
        c = losses.Comparisons(*logps, *lengths, mean_winner_tokens=torch.tensor(3.5), offsets=torch.zeros(6).double())
        value = function(c, p)
        changes = {
            "reference": dataclasses.replace(c, winner_ref_logps=c.winner_ref_logps * 1.5),
            "lengths": dataclasses.replace(c, winner_lengths=lengths[0] + 1, mean_winner_tokens=torch.tensor(4.5)),
            "offsets": dataclasses.replace(c, offsets=torch.ones(6).double()),
        }
        for what, changed in changes.items():
            different = not torch.equal(function(changed, p), value)
            declared = uses(name, what)
            assert different == declared or (name, what) == ("sft", "reference"), f"{name} and {what}"
        assert uses(name, "step") == (not torch.equal(function(_without_last(c), p), value[:-1])), (
            f"{name} and the step"
        )


def _without_last(c: losses.Comparisons) -> losses.Comparisons:
    tensors = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    return losses.Comparisons(**{k: v[:-1] if v is not None and v.ndim else v for k, v in tensors.items()})


@pytest.mark.parametrize(
    ("parameter", "value", "names", "words"),
    [
        ("beta", 0.0, ["sigmoid"], "beta=0.0 must be a finite number above 0"),
        ("beta", "much", ["sigmoid"], "beta='much' must be a finite number"),
        ("beta", float("nan"), ["sigmoid"], "beta=nan must"),
        ("beta", float("inf"), ["sigmoid"], "beta=inf must"),
        ("beta", None, ["sigmoid"], "beta=None must"),
        ("label_smoothing", -0.1, ["sigmoid"], "label_smoothing=-0.1 must"),
        ("f_alpha_divergence_coef", float("inf"), ["sigmoid"], "f_alpha_divergence_coef=inf must be a finite number"),
        ("label_smoothing", 0.5, ["robust"], r"label_smoothing=0.5 must lie in \[0, 0.5\)"),
        ("label_smoothing", 0.1, ["hinge", "ipo"], "label_smoothing=0.1 means nothing to"),
        ("label_smoothing", 0.0, ["exo_pair"], "label_smoothing=0.0 is not possible with loss_type 'exo_pair'"),
        ("f_divergence_type", "kl", ["sigmoid"], "f_divergence_type='kl' (is not known|must be one of)"),
        ("f_divergence_type", "js_divergence", ["aot"], "f_divergence_type='js_divergence' has no ratio"),
        ("simpo_gamma", float("nan"), ["simpo"], "simpo_gamma=nan must be a finite number"),
        ("discopop_tau", 0.0, ["discopop"], "discopop_tau=0.0 must be a finite number above 0"),
    ],
)
def test_one_check_serves_the_configuration_the_function_and_the_module(tmp_path, parameter, value, names, words):
    with pytest.raises(ValueError, match=words):
        LossParameters(**{parameter: value}).check(names)
    with pytest.raises(ValueError, match=words):
        DPOConfig(output_dir=str(tmp_path), report_to="none", loss_type=names, **{parameter: value})
    with pytest.raises(ValueError, match=words):
        dpo_loss(*torch.zeros(4, 1), loss_type=names[0], **{parameter: value})
    with pytest.raises(ValueError, match="couples all pairs" if uses(names[0], "step") else words):
        FusedLinearDPOLoss(loss_type=names[0], **{parameter: value})


def test_text_is_no_parameter_but_the_configuration_reads_it(tmp_path):
    with pytest.raises(ValueError, match="beta='0.1' must be a finite number"):
        LossParameters(beta="0.1").check(["sigmoid"])
    assert DPOConfig(output_dir=str(tmp_path), report_to="none", beta="0.1").beta == 0.1


def test_parameters_may_be_tensors():
    LossParameters(beta=torch.tensor(0.3)).check(["sigmoid"])
    assert preference_loss(
        losses.Comparisons(*torch.zeros(4, 1), *torch.ones(2, 1), torch.ones(())), ["sigmoid"], [1.0], LossParameters()
    ).item() == pytest.approx(-F.logsigmoid(torch.zeros(())).item())


def test_what_a_function_of_your_own_may_use(monkeypatch):
    monkeypatch.setattr(catalogue, "LOSSES", {**LOSSES, "mine": lambda c, p: c.winner_logps})
    assert {f.name for f in dataclasses.fields(LossUses) if uses("mine", f.name)} == {
        "label_smoothing",
        "offsets",
        "reference",
    }
