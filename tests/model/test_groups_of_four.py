"""A prompt with K completions is its K·(K−1)/2 pairs: the same loss and gradients, at the cost of K completions."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from test_forward import random_ids

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.losses import COUPLED, LOSSES, SMOOTHED, LossParameters
from dpo_fast.losses.objective import Objective
from dpo_fast.model.agreement import use_shared_prefix
from dpo_fast.model.forward import add_dpo_forward
from dpo_fast_kernels import SequenceLoss
from families import tiny_model

K = 4
PAIRS = list(combinations(range(K), 2))


def group_of_four() -> PreferenceGroup:
    generator = torch.Generator().manual_seed(3)
    completions = [random_ids(length, generator) for length in (9, 14, 1, 6)]
    ref_logps = (-4 * torch.rand(K, generator=generator) - 20).tolist()
    prompt = random_ids(11, generator)
    return PreferenceGroup(prompt, completions, PAIRS, (1.0, 0.5, 2.0, 1.0, 3.0, 1.0), ref_logps=ref_logps)


def as_pairs(group: PreferenceGroup) -> list[PreferenceGroup]:
    return [
        PreferenceGroup(
            group.prompt_ids,
            [group.completion_ids[winner], group.completion_ids[loser]],
            comparison_weights=(weight,),
            ref_logps=[group.ref_logps[winner], group.ref_logps[loser]],
        )
        for (winner, loser), weight in zip(group.comparisons, group.comparison_weights, strict=True)
    ]


def solve(model, groups: list[PreferenceGroup], name: str) -> dict[str, torch.Tensor]:
    packed = pack(groups)
    parameters = LossParameters(beta=0.3, label_smoothing=0.1 if name in SMOOTHED else 0.0)
    objective = Objective({name: 1.0}, parameters)
    weights = packed.comparison_weights
    winner_tokens = packed.completion_lengths[packed.comparisons[:, 0]]
    totals = torch.stack([weights.sum(), (weights * winner_tokens).sum()])
    model.zero_grad()
    output = model(packed=packed, loss=SequenceLoss(objective), loss_inputs=objective.inputs(packed, totals))
    output.preference_loss.backward()
    return {"loss": output.preference_loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("name", sorted(set(LOSSES) - set(COUPLED) - {"plackett_luce"}))
def test_gradients_of_a_group_are_the_sum_over_its_pairs(name):
    model = tiny_model("llama")
    add_dpo_forward(model)
    use_shared_prefix(model)
    group = group_of_four()
    together, apart = solve(model, [group], name), solve(model, as_pairs(group), name)
    for key, value in apart.items():
        assert (together[key] - value).norm() <= 1e-5 * value.norm().clamp(min=1e-6), key


def test_a_group_costs_its_prompt_and_completions_once():
    group = group_of_four()
    lengths = [len(ids) for ids in group.completion_ids]
    assert pack([group]).num_tokens == len(group.prompt_ids) + sum(lengths)
    assert pack(as_pairs(group)).num_tokens == len(PAIRS) * len(group.prompt_ids) + (K - 1) * sum(lengths)
