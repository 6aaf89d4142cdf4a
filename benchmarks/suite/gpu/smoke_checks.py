"""The checks of `smoke`, riskiest first. Each takes a device, and raises where something is wrong.

Results are compared with float64 by ‖found − truth‖ / ‖truth‖, whose limits are those of the benchmarks. The tests hold
the kernels to a closer bound; here the first question is whether a GPU computes the same at all.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dpo_fast_kernels import (
    LogitTransform,
    PrefixLayout,
    ScoreLayout,
    SequenceLoss,
    linear_logps,
    linear_preference_loss,
    prefix_attention,
)
from dpo_fast_kernels.gather.gather_rows import GatherPlan, gather_rows
from dpo_fast_kernels.head.gemm import Gemm
from dpo_fast_kernels.specification import (
    linear_logps_reference,
    prefix_attention_reference,
    row_gradient_reference,
    row_logps_reference,
)
from suite.harness.timing import LIMITS, relative_error, runs_triton
from suite.ops.head_problem import dpo

Check = Callable[[torch.device], str | None]
_LIMIT = {torch.float32: LIMITS["fp32"], torch.float16: LIMITS["fp16"], torch.bfloat16: LIMITS["bf16"]}


class NotHere(Exception):
    """The machine has nothing to check."""


def near(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], limit: float) -> str:
    """Raise where a tensor is further from the truth than the limit; return the largest error."""
    errors = {name: relative_error(tensor, truth[name].to(tensor.device)) for name, tensor in found.items()}
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= limit}
    assert not wrong, f"errors {wrong} above {limit:.0e}"
    return f"error {max(errors.values()):.0e}"


def half(device: torch.device) -> torch.dtype:
    """Return the dtype of training; in Triton's interpreter bf16 products are garbage."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@contextmanager
def no_waiting(device: torch.device):
    """Make every wait of the host for the device an error."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def repeats_without_waiting(run: Callable[[], Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Run twice, the second time without waiting for the device; raise where a bit differs."""
    first = dict(run())
    with no_waiting(device):
        second = run()
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differ, f"{differ} differ from run to run"
    return first


# ---- products ----


def products(dtype: torch.dtype, n: int, h: int, v: int, stride: int = 0) -> Check:
    """Return a check of all three products: in the memory that they were given, and right."""

    def check(device: torch.device) -> str:
        gemm = Gemm(dtype, device.type)
        x, w = (gemm.factor(torch.randn(size, h, device=device)) for size in (n, v))
        memory = torch.full((n, max(v, stride)), math.nan, device=device)
        z = memory[:, :v]
        assert gemm.logits(x, w, out=z).data_ptr() == memory.data_ptr(), "logits lie elsewhere"
        d = (z / h).to(gemm.factor_dtype)
        if stride:
            d = torch.empty(n, stride, device=device, dtype=d.dtype)[:, :v].copy_(d)
        total = torch.ones(v, h, device=device)
        place = total.data_ptr()
        gemm.accumulate(total, d, x)
        assert total.data_ptr() == place, "the sum lies elsewhere"
        found = {"logits": z, "product": gemm.product(d, w), "accumulated": total}
        truth = {"logits": x.double() @ w.double().t(), "product": d.double() @ w.double()}
        truth["accumulated"] = 1 + d.double().t() @ x.double()
        limit = LIMITS["fp32"] if device.type == "cuda" else _LIMIT[dtype]
        assert device.type != "cuda" or found["product"].dtype == torch.float32
        return near(found, truth, limit)

    return check


# ---- rows of logits ----


def rows(v: int, padded: bool = False) -> Check:
    """Return a check of the row kernels over a vocabulary; on a CPU over 1/64 of it."""

    def check(device: torch.device) -> str:
        from dpo_fast_kernels.head import rows_triton

        _needs_triton(device)
        n, words = (64, v) if device.type == "cuda" else (3, v // 64)
        width = -(-words // 64) * 64 if padded else words
        plain, dtype = LogitTransform(), half(device)
        z = (2 * torch.randn(n, width, device=device))[:, :words]
        targets = torch.randint(words, (n,), device=device)
        targets[:2] = torch.tensor([0, words - 1], device=device)
        d = torch.full((n, width), math.nan, device=device, dtype=dtype)[:, :words]
        logps = rows_triton.row_logps_fwd_bwd(z, targets, None, transform=plain, statistics={}, out=d)
        offsets = torch.tensor([0, 1, n], device=device)
        found = {"logps": logps, "D": d, "sums": rows_triton.sequence_sums(logps, offsets)}
        true = row_logps_reference(z.double(), targets).logps
        truth = {"logps": true, "sums": torch.stack([true[0], true[1:].sum()])}
        truth["D"] = row_gradient_reference(z.double(), targets, plain)
        return near(found, truth, _LIMIT[dtype])

    return check


def _needs_triton(device: torch.device) -> None:
    if not runs_triton(device):
        raise NotHere("Triton kernels need a GPU, or TRITON_INTERPRET=1")


# ---- the head ----


class Head:
    """Groups of two completions, the first larger than any tile; loss and gradients of ours and of float64."""

    def __init__(self, device: torch.device):
        cuda = device.type == "cuda"
        h, v = (576, 32003) if cuda else (24, 203)
        groups = [(2500, 2000), (300, 200), (1, 40)] if cuda else [(11, 9), (3, 2), (1, 4)]
        n = sum(map(sum, groups))
        self.layout = ScoreLayout.build(groups).to(device)
        lengths = self.layout.cu_scores.diff()
        self.completion = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=n)
        self.hidden = torch.randn(n, h, device=device).to(half(device))
        self.weight = (2 / h**0.5 * torch.randn(v, h, device=device)).to(half(device))
        self.targets = torch.randint(v, (n,), device=device)
        self.ref = torch.zeros(len(lengths), device=device)
        self.ref += self._sums(linear_logps_reference(self.hidden, self.weight, self.targets).logps)
        self.ref += torch.randn(len(lengths), device=device)
        self.loss = SequenceLoss(dpo)

    def _sums(self, logps: Tensor) -> Tensor:
        return logps.new_zeros(len(self.layout.cu_scores) - 1).index_add(0, self.completion, logps)

    def solve(self, loss: Callable[[Tensor, Tensor], Tensor], frozen: bool, dtype=None) -> dict[str, Tensor]:
        leaves = [tensor.to(dtype or tensor.dtype).detach() for tensor in (self.hidden, self.weight)]
        trained = leaves[:1] if frozen else leaves
        for leaf in trained:
            leaf.requires_grad_()
        value = loss(*leaves)
        gradients = torch.autograd.grad(value, trained)
        return {"loss": value.detach(), **dict(zip(("d hidden", "d weight"), gradients, strict=False))}

    def ours(self, budget: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, w: (
            linear_preference_loss(x, w, self.targets, self.layout, self.loss, [self.ref], budget_bytes=budget).loss
        )

    def true(self, x: Tensor, w: Tensor) -> Tensor:
        return dpo(self._sums(linear_logps_reference(x, w, self.targets).logps), self.ref.double())


def preference(budget: int, frozen: bool) -> Check:
    """Return a check of the preference loss against float64, of its bits, and of waits for the device."""

    def check(device: torch.device) -> str:
        head = Head(device)
        found = repeats_without_waiting(lambda: head.solve(head.ours(budget), frozen), device)
        truth = head.solve(head.true, frozen, torch.float64)
        return near(found, truth, _LIMIT[half(device)])

    return check


def fused(device: torch.device) -> str:
    """Check the head in one kernel, forward and backward."""
    _needs_triton(device)
    head = Head(device)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        found = linear_logps(x, w, head.targets, cu_scores=head.layout.cu_scores, backend="fused")
        return dpo(found.sequence_logps, head.ref)

    found = repeats_without_waiting(lambda: head.solve(loss, False), device)
    return near(found, head.solve(head.true, False, torch.float64), _LIMIT[half(device)])


# ---- attention and gather ----


def attention(backend: str, head_dim: int, window: int | None = None) -> Check:
    """Return a check of attention with grouped heads, groups of three completions and of one."""

    def check(device: torch.device) -> str:
        cuda = device.type == "cuda"
        if backend == "triton":
            _needs_triton(device)
        groups = [(300, 100, 257, 63), (0, 64, 1, 30), (70, 90)] if cuda else [(19, 7, 11, 5), (6, 9)]
        heads, width, seen = ((8, 2), head_dim, window) if cuda else ((2, 1), 16, window and 12)
        layout = PrefixLayout.build(groups).to(device)
        tokens = layout.spans.shape[1]
        q, k, v, dout = (torch.randn(tokens, heads[at], width, device=device).to(half(device)) for at in (0, 1, 1, 0))
        name = backend if cuda or backend == "triton" else "sdpa" if window else "flash-cpu"

        def run(function: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor, **options):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            out = function(*leaves, layout, window=seen, **options)
            gradients = torch.autograd.grad(out, leaves, gradient)
            return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))

        found = repeats_without_waiting(lambda: run(prefix_attention, (q, k, v), dout, backend=name), device)
        truth = run(prefix_attention_reference, [x.double() for x in (q, k, v)], dout.double())
        return near(found, truth, _LIMIT[half(device)])

    return check


def gather(device: torch.device) -> str:
    """Check that repeated rows are summed."""
    rows, uses, width = (3000, 20_000, 1024) if device.type == "cuda" else (30, 90, 8)
    draw = random.Random(0)
    plan = GatherPlan.build([draw.randrange(rows) for _ in range(uses)]).to(device)
    x = torch.randn(rows + 1, width, device=device).to(half(device)).requires_grad_()
    dy = torch.randn(uses, width, device=device).to(half(device))
    run = lambda: {"dx": torch.autograd.grad(gather_rows(x, plan), x, dy)[0]}  # noqa: E731
    found = repeats_without_waiting(run, device)
    truth = torch.zeros(x.shape, dtype=torch.float64, device=device).index_add(0, plan.index, dy.double())
    return near(found, {"dx": truth}, _LIMIT[half(device)])


# ---- a step ----


def trainer_step(device: torch.device) -> str:
    """Train two steps of a small model: the first loss is ln 2."""
    from suite.training.layout import synthetic_pairs, train

    options = argparse.Namespace(size="tiny", steps=1, batch_size=2, max_length=200)
    report = train("shared", synthetic_pairs(options), options)
    off = abs(report["losses"][0] - math.log(2))
    assert off < (2e-3 if device.type == "cuda" else 1e-5), f"the first loss is ln 2 + {off:.1e}"
    return f"ln 2 + {off:.0e}"


def compiled_layer(device: torch.device) -> str:
    """Compile one layer of a small Llama: its output and gradient stay, at two lengths."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, attn_implementation="sdpa")
    with device:
        layer, rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)
    compiled = torch.compile(layer, dynamic=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    notes = []
    for length in (33, 70):
        x = torch.randn(1, length, 64, device=device)
        places = rotary(x, torch.arange(length, device=device)[None])

        def run(module: Callable, x: Tensor = x, places: tuple = places) -> dict[str, Tensor]:
            leaf = x.clone().requires_grad_()
            out = module(leaf, position_embeddings=places)
            return {"out": out.detach(), "dx": torch.autograd.grad(out.square().sum(), leaf)[0]}

        notes.append(near(run(compiled), run(layer), 1e-3))
    return ", ".join(notes)


_BF16, _FP16 = torch.bfloat16, torch.float16
CHECKS: dict[str, Check] = {
    "products in bf16": products(_BF16, 256, 512, 1000),
    "products in bf16 with padded rows": products(_BF16, 256, 512, 1001, stride=1024),
    "products in bf16, odd rows": products(_BF16, 255, 511, 1001),
    "products in fp16": products(_FP16, 256, 512, 1000),
    "products of one column": products(_BF16, 256, 1, 1000),
    "products of one word": products(_BF16, 256, 512, 1),
    "products of one row": products(_BF16, 1, 512, 1000),
    "rows of 128256 logits": rows(128256),
    "rows of 32003 logits": rows(32003),
    "rows of 32003 logits, padded": rows(32003, padded=True),
    "preference loss, whole groups": preference(2**31, frozen=False),
    "preference loss, split groups": preference(0, frozen=False),
    "preference loss, frozen head": preference(2**31, frozen=True),
    "preference loss, split, frozen": preference(0, frozen=True),
    "varlen attention, 64 wide": attention("varlen", 64),
    "varlen attention, 128 wide": attention("varlen", 128),
    "varlen attention, a window": attention("varlen", 128, window=100),
    "gather": gather,
    "Triton attention, 64 wide": attention("triton", 64),
    "Triton attention, 128 wide": attention("triton", 128),
    "Triton attention, a window": attention("triton", 128, window=100),
    "fused head": fused,
    "a trainer's step": trainer_step,
    "a compiled layer": compiled_layer,
}
