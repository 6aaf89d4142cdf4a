"""The objective sees every comparison as its papers do: LD-DPO by token, WPO by hand, a mix as a sum."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.batches.collator import DPOCollator
from dpo_fast.batches.completion_pieces import split_completions
from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.errors import InputError
from dpo_fast.losses import COUPLED, LOSSES, REFERENCE_FREE, SMOOTHED, LossParameters, loss
from dpo_fast.losses.catalogue import looks_at_others
from dpo_fast.losses.objective import Objective
from dpo_fast.training.coupled_step import step_coefficients
from dpo_fast_kernels import SequenceLoss, linear_preference_loss

PARAMETERS = LossParameters(0.7)


def group_of(lengths: list[int], seed: int, context: int = 0) -> PreferenceGroup:
    """All completions compared with each other; `context` leading tokens are not scored."""
    generator = torch.Generator().manual_seed(seed)
    count = len(lengths)
    pairs = [(i, j) for i in range(count) for j in range(count) if i < j]
    return PreferenceGroup(
        [5, 6],
        [[7] * (context + length) for length in lengths],
        pairs,
        [1.0 + index for index in range(len(pairs))],
        context_lengths=[context] * count,
        ref_token_logps=[(-2 * torch.rand(length, generator=generator)).tolist() for length in lengths],
    )


def token_logps(groups: list[PreferenceGroup]) -> list[torch.Tensor]:
    """One leaf a completion."""
    generator = torch.Generator().manual_seed(9)
    rows = [row for group in groups for row in group.ref_token_logps]
    return [(-2 * torch.rand(len(row), generator=generator)).requires_grad_() for row in rows]


def piece_sums(packed, rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([part.sum() for part in torch.cat(rows).split(packed.cu_scores.diff().tolist())])


def totals_of(groups: list[PreferenceGroup]) -> torch.Tensor:
    rows = [group_row(group) for group in groups]
    return DPOCollator(split_for_ld_dpo=True)(rows)["totals"]


def group_row(group: PreferenceGroup) -> dict:
    return {name: getattr(group, name) for name in PreferenceGroup.__dataclass_fields__}


def by_token(groups, rows, objective: Objective, totals) -> torch.Tensor:
    """The loss of every comparison apart, its log-probs summed token by token as the paper writes them."""
    value, rows = 0.0, iter(rows)
    for group in groups:
        policy = [next(rows) for _ in group.completion_ids]
        reference = [torch.tensor(row) for row in group.ref_token_logps]
        for (winner, loser), weight in zip(group.comparisons, group.comparison_weights, strict=True):
            shared = min(len(policy[winner]), len(policy[loser]))

            def logp(tokens, shared=shared):
                return tokens[:shared].sum() + objective.ld_alpha * tokens[shared:].sum()

            sides = [logp(side[k]) for side in (policy, reference) for k in (winner, loser)]
            pair = pack([PreferenceGroup([1], [[2] * len(policy[winner]), [2] * len(policy[loser])])])
            compared = Objective(objective.mix, objective.parameters).compare(
                torch.stack(sides[:2]), totals, torch.stack(sides[2:]), pair.completion_lengths, pair.comparisons,
                torch.tensor([weight]), torch.zeros(1),
            )  # fmt: skip
            whole = policy[winner].sum()[None]
            compared = type(compared)(**{**vars(compared), "whole_winner_logps": whole})
            value = value + objective.mean(compared, totals)
    return value


PER_COMPARISON = sorted(set(LOSSES) - {*COUPLED, "plackett_luce"})


@pytest.mark.parametrize("name", PER_COMPARISON)
def test_ld_dpo_weighs_the_tokens_beyond_the_other_completion(name):
    groups = [group_of([5, 3, 9], 0), group_of([4, 4], 1, context=2), group_of([1, 6], 2)]
    rows = token_logps(groups)
    smoothing = 0.1 if name in SMOOTHED else 0.0
    objective = Objective({name: 1.0}, LossParameters(0.7, smoothing), ld_alpha=0.3)
    packed, totals = pack(groups, split_for_ld_dpo=True), totals_of(groups)
    value = objective(piece_sums(packed, rows), *objective.inputs(packed, totals))
    expected = by_token(groups, rows, objective, totals)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(
        *(torch.autograd.grad(x, rows, materialize_grads=True) for x in (value, expected)), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_where_a_completion_is_cut():
    pieces = split_completions([[5, 3, 9], [4, 4]], [[(0, 1), (2, 0), (1, 2)], [(1, 0)]])
    assert pieces.lengths == [[3, 2, 3, 3, 2, 4], [4, 4]]
    assert pieces.index.tolist() == [[0, 1, 8], [2, 8, 8], [3, 4, 5], [6, 8, 8], [7, 8, 8]]
    assert pieces.full_pieces.tolist() == [[1, 1], [2, 2], [1, 1], [1, 1]]


@given(st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4), min_size=1, max_size=3))
def test_pieces_add_up_to_completions_and_a_weight_of_one_changes_nothing(lengths):
    groups = [group_of(of_group, seed) for seed, of_group in enumerate(lengths)]
    whole, cut = (pack(groups, split_for_ld_dpo=cut) for cut in (False, True))
    rows = token_logps(groups)
    sums = [piece_sums(packed, rows) for packed in (whole, cut)]
    assert torch.allclose(cut.completion_sums(sums[1]), sums[0], atol=1e-5)
    reference = torch.stack([torch.tensor(row).sum() for group in groups for row in group.ref_token_logps])
    assert torch.allclose(cut.ref_logps.sum(dim=1), reference, atol=1e-5)
    whole.ref_logps = reference
    totals = totals_of(groups)
    plain, weighed = (Objective({"sigmoid": 1.0, "sft": 0.5}, PARAMETERS, ld_alpha=alpha) for alpha in (None, 1.0))
    values = [o(x, *o.inputs(p, totals)) for o, x, p in ((plain, sums[0], whole), (weighed, sums[1], cut))]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-5)


def test_sorting_losses_take_pieces_of_several_packs():
    groups = [group_of([5, 3, 9], 0), group_of([4, 7], 1), group_of([1, 6], 2)]
    objective = Objective({"aot": 1.0, "aot_unpaired": 0.5}, PARAMETERS, ld_alpha=0.4)
    totals, rows = totals_of(groups), token_logps(groups)
    together, apart = (
        [pack(groups, split_for_ld_dpo=True)],
        [pack(groups[:1], split_for_ld_dpo=True), pack(groups[1:], split_for_ld_dpo=True)],
    )
    whole = step_coefficients(together, [piece_sums(together[0], rows)], totals, objective)
    parts = step_coefficients(
        apart, [piece_sums(apart[0], rows[:3]), piece_sums(apart[1], rows[3:])], totals, objective
    )
    assert torch.allclose(whole[0].gradient, torch.cat([part.gradient for part in parts]), rtol=1e-5)
    assert whole[0].share.item() == pytest.approx(sum(part.share.item() for part in parts), rel=1e-6)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def zero_reference(group: PreferenceGroup) -> dict[str, list]:
    lengths = [len(ids) for ids in group.completion_ids]
    return {"ref_logps": [0.0] * len(lengths), "ref_token_logps": [[0.0] * length for length in lengths]}


@pytest.mark.parametrize("cut", [False, True])
def test_weights_of_wpo_by_hand(cut):
    """Two pairs; the first one's tokens are as likely as two draws that agree, so it weighs 1."""
    groups = [PreferenceGroup([5], [[7], [7, 7]]), PreferenceGroup([5], [[7, 7], [7] * 4], comparison_weights=(3.0,))]
    groups = [replace(group, **zero_reference(group)) for group in groups]
    packed = pack(groups, split_for_ld_dpo=cut)
    if cut:  # the losers consist of two pieces each
        logps, squares = [-2.0, -1.0, -2.0, -4.0, -3.0, -2.0], [-2.0, -2.0, -1.0, -3.0, -4.0, -1.0]
    else:
        logps, squares = [-2.0, -3.0, -4.0, -5.0], [-2.0, -3.0, -3.0, -5.0]
    logps, squares = (torch.tensor(x, dtype=torch.float64) for x in (logps, squares))
    logps.requires_grad_()
    totals = torch.tensor([4.0, 9.0])
    plain, weighted = (
        Objective({"sigmoid": 1.0}, LossParameters(0.5), wpo, 1.0 if cut else None) for wpo in (False, True)
    )
    value = weighted(logps, squares, *weighted.inputs(packed, totals))
    expected = (-log_sigmoid(0.5) - 3 * math.exp(-0.5) * log_sigmoid(0.5)) / 4
    assert value.item() == pytest.approx(expected, rel=1e-6)
    packed.comparison_weights = packed.comparison_weights * torch.tensor([1.0, math.exp(-0.5)])
    gradients = [torch.autograd.grad(loss, logps)[0] for loss in (value, plain(logps, *plain.inputs(packed, totals)))]
    assert torch.allclose(*gradients, rtol=1e-6), "the weights carry no gradient"


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_losses_without_a_reference_need_none(name):
    groups = [PreferenceGroup([5], [[7], [7, 7]])]
    for cut in (False, True):
        packed, objective = pack(groups, split_for_ld_dpo=cut), Objective({name: 1.0}, ld_alpha=0.5 if cut else None)
        sums = -torch.ones(packed.score_layout.cu_scores.shape[0] - 1)
        assert torch.isfinite(objective(sums, *objective.inputs(packed, torch.tensor([1.0, 1.0]))))


def test_pack_refuses_reference_tokens_that_do_not_fit():
    short = group_of([3, 2], 0)
    short = PreferenceGroup(short.prompt_ids, short.completion_ids, ref_token_logps=[[-1.0] * 3, [-1.0]])
    with pytest.raises(ValueError, match="ref_token_logps hold 4 numbers for 5 scored tokens"):
        pack([short], split_for_ld_dpo=True)
    with pytest.raises(ValueError, match="ref_token_logps is given on some groups and missing on others"):
        pack([short, PreferenceGroup([1], [[2], [3]])], split_for_ld_dpo=True)


def test_what_cannot_be_computed_is_refused():
    group = PreferenceGroup([1], [[2, 3], [4]])
    whole, split = pack([group]), pack([group], split_for_ld_dpo=True)
    totals = whole.totals
    for mix in ({"sigmoid": 1.0}, {"nll": 1.0, "ipo": 0.5}):
        with pytest.raises(ValueError, match="packed has no reference log-probs, and .* looks at them"):
            Objective(mix).inputs(whole, totals)
    for name in (*REFERENCE_FREE, "sft"):
        assert len(Objective({name: 1.0}).inputs(whole, totals)) == 6
    with pytest.raises(ValueError, match="ld_alpha=0.5 does not fit the pack"):
        Objective({"nll": 1.0}, ld_alpha=0.5).inputs(whole, totals)
    with pytest.raises(ValueError, match="ld_alpha=None does not fit the pack"):
        Objective({"nll": 1.0}).inputs(split, totals)
    with pytest.raises(ValueError, match="loss_type='dop' is not known"):
        Objective({"dop": 1.0})
    with pytest.raises(ValueError, match="label_smoothing=0.1 means nothing to"):
        Objective({"ipo": 1.0}, LossParameters(label_smoothing=0.1))
    with pytest.raises(ValueError, match="mix is empty"):
        Objective({})
    with pytest.raises(ValueError, match="ld_alpha=2.0 must lie in"):
        Objective({"nll": 1.0}, ld_alpha=2.0)


def test_a_function_is_a_loss_wherever_a_name_is():
    assert Objective({LOSSES["ipo"]: 0.5}) == Objective({"ipo": 0.5})


@pytest.fixture
def own():
    """Functions of one's own enter `LOSSES`, and leave it again."""
    before = set(LOSSES)
    yield
    for name in set(LOSSES) - before:
        del LOSSES[name]


def parameters_of(name: str) -> LossParameters:
    return LossParameters(0.7, 0.1 if name in SMOOTHED else 0.0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_says_whether_it_looks_at_other_prompts(name):
    assert looks_at_others(name, parameters_of(name)) == (name in COUPLED)


@pytest.mark.parametrize("sizes", [2, 3, 8])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_head_takes_what_leaves_prompts_apart_and_nothing_else(name, sizes):
    groups = [group_of([2 + index % 3, 3, 1], index) for index in range(sizes)]
    packed = pack(groups)
    packed.ref_logps = torch.tensor([sum(row) for group in groups for row in group.ref_token_logps])
    objective = Objective({name: 1.0}, parameters_of(name))
    inputs = objective.inputs(packed, packed.totals)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(packed.targets), 8, generator=generator).requires_grad_()
    weight = torch.randn(50, 8, generator=generator)

    def loss():
        return linear_preference_loss(
            hidden, weight, packed.targets, packed.score_layout, lambda *given: objective(*given), inputs
        ).loss

    assert objective.couples_groups == (name in COUPLED)
    if name not in COUPLED:
        assert torch.isfinite(loss())
        SequenceLoss(objective)
        return
    with pytest.raises(ValueError, match="^loss: .*other groups"):
        loss()
    with pytest.raises(ValueError, match=f"^loss: Objective.*{name}.* couples groups; .*linear_logps"):
        SequenceLoss(objective)


def test_a_function_that_looks_at_other_prompts_has_to_say_so(own):
    def own_spread(c, p):
        return (c.winner_ratios - c.winner_ratios.mean()) ** 2

    def own_square(c, p):
        return c.winner_ratios**2

    def own_broken(c, p):
        raise KeyError("not on these")

    for function in (own_square, own_broken):
        assert not Objective({function: 1.0}).couples_groups
    with pytest.raises(InputError, match=r"^loss_type: the loss own_spread .*@dpo_fast.losses.loss\(step=True\)"):
        Objective({own_spread: 1.0})
    with pytest.raises(InputError, match="^loss_type: the loss own_spread"):
        Objective({loss(lengths=True)(own_spread): 1.0})
    assert Objective({loss(step=True)(own_spread): 1.0}).couples_groups
