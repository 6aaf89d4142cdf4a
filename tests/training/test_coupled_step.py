"""A loss that couples a step has the same value and gradients on one rank and on two with unequal shares of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import PackedBatch, pack
from dpo_fast.losses import LossParameters
from dpo_fast.losses.objective import Objective
from dpo_fast.training.coupled_step import step_coefficients, step_loss, surrogate
from interpreting import environment

OBJECTIVE = Objective({"aot": 1.0, "aot_unpaired": 0.5, "plackett_luce": 0.3, "sft": 0.1}, LossParameters(0.7))
TOTALS = torch.tensor([8.0, 30.0])


def packs() -> list[PackedBatch]:
    """Two, one and two packs' worth of groups; one group has three completions."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for count in (2, 2, 3, 2, 2, 2):
        references = (-5 * torch.rand(count, generator=generator)).tolist()
        completions = [[7] * int(torch.randint(1, 9, (1,), generator=generator)) for _ in range(count)]
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        groups.append(PreferenceGroup([5, 6], completions, pairs, [1.0] * len(pairs), ref_logps=references))
    return [pack(groups[:1]), pack(groups[1:4]), pack(groups[4:])]


def log_probs(packed: list[PackedBatch]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [-5 * torch.rand(len(part.completion_lengths), generator=generator) for part in packed]


def test_the_surrogate_has_the_value_and_the_gradient_of_the_loss():
    all_packs = packs()
    logps = [part.requires_grad_() for part in log_probs(all_packs)]
    value = step_loss(all_packs, logps, TOTALS, OBJECTIVE)
    expected = torch.autograd.grad(value, logps)
    coefficients = step_coefficients(all_packs, logps, TOTALS, OBJECTIVE)
    parts = [surrogate(part, c.gradient, c.share) for part, c in zip(logps, coefficients, strict=True)]
    assert sum(parts).item() == pytest.approx(value.item(), rel=1e-6)
    for one, other in zip(torch.autograd.grad(sum(parts), logps), expected, strict=True):
        assert torch.equal(one, other)
    order = [2, 0, 1]
    moved = step_coefficients([all_packs[i] for i in order], [logps[i] for i in order], TOTALS, OBJECTIVE)
    for index, c in zip(order, moved, strict=True):
        assert torch.allclose(c.gradient, expected[index], rtol=1e-6)


def on_two_ranks() -> None:
    """Rank 0 has the first pack, rank 1 the two others; each compares with the whole step."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    all_packs = packs()
    logps = log_probs(all_packs)
    whole = step_coefficients(all_packs, logps, TOTALS, OBJECTIVE)
    mine = slice(0, 1) if accelerator.process_index == 0 else slice(1, 3)
    found = step_coefficients(all_packs[mine], logps[mine], TOTALS, OBJECTIVE, accelerator)
    for c, expected in zip(found, whole[mine], strict=True):
        assert torch.allclose(c.gradient, expected.gradient, rtol=1e-5, atol=1e-8)
    share = accelerator.gather(torch.stack([c.share for c in found]).sum()[None]).sum()
    assert torch.allclose(share, sum(c.share for c in whole), rtol=1e-6)
    print(f"rank {accelerator.process_index} of {accelerator.num_processes} agrees")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()  # gloo's threads may abort a process that ends with them at work


@pytest.mark.slow
def test_two_ranks_with_unequal_shares_agree_with_one():
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*program, "--no-python", sys.executable, "-c", "import test_coupled_step; test_coupled_step.on_two_ranks()"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in (0, 1):
        assert f"rank {rank} of 2 agrees" in run.stdout
