"""The ops are good citizens of PyTorch: schema, fake kernels, autograd, and a compiled step without a break in it.

`opcheck` tests an op against its schema, its fake kernel and its autograd, also under tracing with dynamic shapes.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast_kernels import (
    GatherPlan,
    LogitTransform,
    PrefixLayout,
    ScoreLayout,
    SequenceLoss,
    gather_rows,
    linear_logps,
    linear_preference_loss,
    prefix_attention,
    sequence_logps,
)
from dpo_fast_kernels.head import tiles

GROUPS = [(3, 5), (7, 4), (1, 1)]
TRANSFORM = LogitTransform(scale=0.5, softcap=5.0, temperature=1.3)


def dpo(logps: Tensor, ref_logps: Tensor) -> Tensor:
    ratios = logps - ref_logps
    return -F.logsigmoid(0.3 * (ratios[::2] - ratios[1::2])).sum()


LOSS = SequenceLoss(dpo)


def head(groups=GROUPS, h=8, v=31, trains=(True, True, True)) -> dict:
    generator = torch.Generator().manual_seed(len(groups))
    layout = ScoreLayout.build(groups)
    shapes = ((layout.num_rows, h), (v, h), (v,))
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).requires_grad_(train)
        for shape, train in zip(shapes, trains, strict=True)
    )
    targets = torch.randint(v, (layout.num_rows,), generator=generator)
    return {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets, "layout": layout}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "CPU_ROWS", 6)
    monkeypatch.setattr(tiles, "CPU_GROUP_ROWS", 6)


def check(op, *arguments) -> None:
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("keep, budget", [("nothing", 0), ("U", 0), ("D", 0), ("D", 6 * 2 * 31 * 4), ("D", 2**20)])
def test_linear_logps(keep, budget):
    x = head(trains=(True, keep == "D", keep == "D"))
    options = (0.5, 5.0, 1.3, "entropy,is_top1", torch.float32, "torch", budget, keep)
    arguments = (x["hidden"], x["weight"], x["bias"], x["targets"], x["layout"].cu_scores, *options)
    check(torch.ops.dpo_fast.linear_logps.default, *arguments)
    logps, _, _, lse, kept = (tensor.detach() for tensor in torch.ops.dpo_fast.linear_logps(*arguments))
    leaves = [x[name].detach() for name in ("hidden", "weight", "bias")]
    options = (0.5, 5.0, 1.3, torch.float32, "torch", budget, keep)
    for needs in [(True, False, False)] if keep == "U" else [(True, True, True), (False, True, False)]:
        check(
            torch.ops.dpo_fast.linear_logps_bwd.default,
            torch.ones_like(logps), *leaves, x["targets"], logps, lse, kept, *options, *needs,
        )  # fmt: skip


@pytest.mark.parametrize("trains", list(itertools.product([True, False], repeat=3)), ids=str)
def test_linear_preference_loss(trains):
    x = head(trains=trains)
    layout = x["layout"]
    check(
        torch.ops.dpo_fast.linear_preference_loss.default,
        x["hidden"], x["weight"], x["bias"], x["targets"], layout.cu_scores, layout.host_cu_scores, layout.cu_groups,
        [torch.zeros(6)], LOSS.handle, 0.5, 5.0, 1.3, "mean_logit", torch.float32, "torch", 0, *trains,
    )  # fmt: skip


def test_sequence_logps():
    x = head()
    logits = (x["hidden"] @ x["weight"].t()).detach()
    transform = (0.5, 5.0, 1.3)
    arguments = (logits.requires_grad_(), x["targets"], x["layout"].cu_scores, *transform, "entropy,is_top1", "torch")
    check(torch.ops.dpo_fast.sequence_logps.default, *arguments)
    _, logps, _, lse = torch.ops.dpo_fast.sequence_logps(*arguments)
    logps = logps.detach()
    options = (*transform, "torch")
    coefficient = torch.ones_like(logps)
    check(
        torch.ops.dpo_fast.sequence_logps_bwd.default, coefficient, logits.detach(), x["targets"], logps, lse, *options
    )


class Batch:
    """What a step takes: groups as a prompt, some completions and a reference log-prob of each."""

    def __init__(self, groups: list[tuple[int, ...]]):
        generator = torch.Generator().manual_seed(len(groups))
        self.prefix, self.scores = PrefixLayout.build(groups), ScoreLayout.build([group[1:] for group in groups])
        tokens, rows = sum(map(sum, groups)), self.scores.num_rows
        read = torch.randint(tokens - 1, (rows,), generator=generator).sort().values
        read[-1] = tokens - 2  # nothing is predicted from the last token
        self.gather = GatherPlan.build(read.numpy())
        self.x = torch.randn(tokens, 16, generator=generator)
        self.targets = torch.randint(37, (rows,), generator=generator)
        self.ref_logps = -torch.rand(len(self.scores.cu_scores) - 1, generator=generator)


BATCHES = (
    [(9, 9, 9), (2, 1, 8), (6, 3, 3), (4, 5, 5)],
    [(4, 3, 5), (2, 7, 4)],
    [(3, 4, 5), (5, 7, 3), (1, 2, 2)],
)


def step(batch: Batch, mixer: Tensor, weight: Tensor) -> Tensor:
    """Attention, score rows and every op of the head, as a small model would call them."""
    q, k, v = (batch.x @ mixer).unflatten(1, (3, 2, 8)).unbind(1)
    hidden = prefix_attention(q, k, v, batch.prefix).flatten(1)
    hidden = gather_rows(hidden, batch.gather)
    options = {"transform": TRANSFORM, "statistics": ("entropy", "is_top1")}
    known = linear_preference_loss(hidden, weight, batch.targets, batch.scores, LOSS, [batch.ref_logps], **options)
    unknown = linear_logps(hidden, weight, batch.targets, cu_scores=batch.scores.cu_scores, **options)
    given = sequence_logps(hidden @ weight.t(), batch.targets, batch.scores.cu_scores, transform=TRANSFORM)
    losses = known.loss, dpo(unknown.sequence_logps, batch.ref_logps), dpo(given, batch.ref_logps)
    return torch.stack([*losses, known.rows.entropy.mean(), unknown.entropy.mean()])


def gradients(function, batch: Batch) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((16, 48), (37, 16))]
    values = function(batch, *leaves)
    return [values.detach(), *torch.autograd.grad(values.sum(), leaves)]


def assert_compiled_step(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    # Two sizes that happen to be alike in the first batch are not taken for one.
    unlike = torch.fx.experimental._config.patch(use_duck_shape=False)
    with unlike, torch._dynamo.config.patch(error_on_recompile=True):
        for groups in BATCHES:
            batch = Batch(groups)
            for actual, expected in zip(gradients(compiled, batch), gradients(step, batch), strict=True):
                assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_step_has_no_break_and_serves_every_batch():
    assert_compiled_step("aot_eager")


@pytest.mark.slow
def test_a_step_compiled_to_machine_code():
    assert_compiled_step("inductor")
