"""How near does shared-prefix attention come to a plain causal call of the same FLOP?

    python benchmarks/run.py attention --seconds 60 --out results

Every backend that the machine has runs forward and backward on packed rows with the heads of three models. Beside them
two calls that share nothing, on PyTorch's own kernels and with their usual, unordered sums:

    plain        causal, sequences of one length, one for every completion, so long that the FLOPs are equal:
                 the ceiling, nothing is gathered or shared
    duplicated   causal, every completion behind a copy of its prompt, more FLOP: what sharing saves

FLOP counted, for all alike: 4·D·Hq a visible (query, key) pair in the forward and 10·D·Hq in the backward; what a
backend computes twice is not counted twice. A provider is checked on a small row against float64 before it is timed,
and marked ≠ if it errs more than twice as far as eager PyTorch. Providers take turns; medians with p20 and p80.

The table is printed last; with --out a result file and a plot are written. On a CPU everything is tiny by default.
`pytest benchmarks/suite/ops/attention.py` runs CPU-sized cases under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.machine import peak_memory, reset_peak_memory, used_memory
from dpo_fast_kernels import PrefixLayout, prefix_attention
from dpo_fast_kernels.specification import prefix_attention_reference
from suite.harness.results import environment, spread, write_result
from suite.harness.timing import mark, runs_triton

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

MODELS = {"llama-3-8b": (32, 8, 128), "qwen2.5-1.5b": (12, 2, 128), "smollm2-135m": (9, 3, 64)}  # Hq, Hkv, D
BATCHES = {
    "pairs 512/512": [(512, 512, 512)] * 6,
    "long prompt 3072/512": [(3072, 512, 512)] * 2,
    "four of 1024/1024": [(1024, 1024, 1024, 1024, 1024)] * 2,
    "short 256/64": [(256, 64, 64)] * 24,
}
CPU_MODELS = {"smollm2-135m": (9, 3, 64)}
CPU_BATCHES = {"pairs 64/64": [(64, 64, 64)] * 2, "four of 64/64": [(64, 64, 64, 64, 64)]}
INTERPRETED = ({"tiny": (2, 1, 16)}, {"pairs 8/8": [(8, 8, 8)]})  # models and batches for Triton's interpreter
CHECKED = [(70, 50, 61), (33, 20, 1, 40, 29)]
BACKENDS = {"cuda": ("triton", "varlen", "flash-attn", "sdpa"), "cpu": ("flash-cpu", "sdpa")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=BACKENDS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=None)
    parser.add_argument("--seconds", type=float, default=None, help="time for all measurements, checks come on top")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=None, help="whose heads to take, on a GPU")
    parser.add_argument("--backends", nargs="+", default=None, help="some of ours; plain and duplicated always run")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file and the plot")
    options = parser.parse_args()

    cuda = options.device == "cuda"
    on_cpu = INTERPRETED if runs_triton(torch.device("cpu")) else (CPU_MODELS, CPU_BATCHES)
    models, batches = (MODELS, BATCHES) if cuda else on_cpu
    models = {name: heads for name, heads in models.items() if not options.models or name in options.models}
    dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    seconds = options.seconds or (60 if cuda else 4)
    backends = options.backends or BACKENDS[options.device]
    rows, refused, disagree = [], {}, {}
    for model, heads in models.items():
        providers = {}
        for backend in backends:
            try:
                reason = wrong(backend, heads, dtype, options.device)
            except ValueError as error:  # it cannot run here
                refused[f"{backend} with {model}"] = str(error)
                continue
            providers[backend] = reason is not None
            if reason:
                disagree[f"{backend} with {model}"] = reason
        for batch, groups in batches.items():
            budget = seconds / len(models) / len(batches)
            rows += [
                {"model": model, "batch": batch, **row, "disagrees": providers.get(row["provider"], False)}
                for row in measure(list(providers), heads, groups, dtype, options.device, budget)
            ]
    result = {
        "question": "shared-prefix attention against a plain causal call of the same FLOPs",
        "dtype": str(dtype),
        "heads": {model: dict(zip(("query", "key", "size"), heads, strict=True)) for model, heads in models.items()},
        "groups": batches,
        "rows": rows,
        "refused": refused,
        "disagree": disagree,
        "summary": summary(rows),
        "environment": environment(),
    }
    if options.out is not None:
        path = write_result(f"attention-{str(dtype).removeprefix('torch.')}", result, options.out)
        plot(rows, path.with_suffix(".png"))
        print(path)
    for provider, reason in refused.items():
        print(f"not timed: {provider}: {reason}")
    print_table(rows)
    if disagree:
        raise SystemExit(f"a provider computes something else: {disagree}")


def inputs(tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return q, k, v as leaves, and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    query_heads, key_heads, head_dim = heads
    return [
        torch.randn(tokens, count, head_dim, generator=generator, device=device, dtype=torch.float32)
        .to(dtype)
        .requires_grad_(leaf)
        for count, leaf in ((query_heads, True), (key_heads, True), (key_heads, True), (query_heads, False))
    ]


def ours(backend: str, layout: PrefixLayout) -> Attention:
    return lambda q, k, v: prefix_attention(q, k, v, layout, backend=backend)


def wrong(backend: str, heads: tuple[int, int, int], dtype: torch.dtype, device: str) -> str | None:
    """Return how far a backend of ours errs too far, or None; a ValueError says why it cannot run here."""
    layout = PrefixLayout.build(CHECKED).to(device)
    *tensors, dout = inputs(layout.spans.shape[1], heads, dtype, device)

    def results(attention: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        out = attention(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    def reference(*leaves: Tensor) -> Tensor:
        return prefix_attention_reference(*leaves, layout)

    actual = results(ours(backend, layout), tensors)
    eager = results(reference, tensors)
    truth = results(reference, [x.detach().double().requires_grad_() for x in tensors])
    for name, *values in zip(("out", "dq", "dk", "dv"), actual, eager, truth, strict=True):
        error, allowed = ((x.double() - values[2]).abs().max().item() for x in values[:2])
        allowed = 2 * allowed + 8 * torch.finfo(torch.float32).eps * values[2].abs().max().item()
        if not error <= allowed:
            return f"{name} errs by {error:.2e}, allowed is {allowed:.2e}"
    return None


def visible_pairs(groups: Sequence[Sequence[int]]) -> int:
    """Return the number of visible (query, key) pairs: a prompt's own once per group, a completion's with both."""
    return sum(
        prompt * (prompt + 1) // 2 + sum(length * prompt + length * (length + 1) // 2 for length in completions)
        for prompt, *completions in groups
    )


def plain_groups(groups: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return as many sequences as completions, of the one length that has as many visible pairs, rounded."""
    count = sum(len(completions) for _, *completions in groups)
    length = round((math.sqrt(1 + 8 * visible_pairs(groups) / count) - 1) / 2)
    return [(0, length)] * count


def duplicated_groups(groups: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    return [(prompt, length) for prompt, *completions in groups for length in completions]


class _Causal(torch.autograd.Function):
    """PyTorch's variable-length FlashAttention-2 on sequences that have their own keys, causal."""

    @staticmethod
    def forward(ctx, q, k, v, offsets, longest):
        scale = q.shape[2] ** -0.5
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, offsets, offsets, longest, longest, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse, offsets, state, unused)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, offsets, state, unused = ctx.saved_tensors
        gradients = torch.ops.aten._flash_attention_backward(
            *(dout, q, k, v, out, lse, offsets, offsets, ctx.longest, ctx.longest, 0.0, True, state, unused),
            scale=ctx.scale,
        )
        return *gradients, None, None


def causal(lengths: Sequence[int], device: str, dtype: torch.dtype) -> Attention:
    """Return plain causal attention on sequences one after another."""
    if device == "cuda" and dtype != torch.float32:
        offsets = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
        return lambda q, k, v: _Causal.apply(q, k, v, offsets, max(lengths))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        pieces = zip(*(x.transpose(0, 1)[None].split(list(lengths), dim=2) for x in (q, k, v)), strict=True)
        out = [F.scaled_dot_product_attention(*piece, is_causal=True) for piece in pieces]
        return torch.cat(out, dim=2)[0].transpose(0, 1)

    return attend


def measure(
    backends: Sequence[str],
    heads: tuple[int, int, int],
    groups: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: str,
    seconds: float,
) -> list[dict[str, Any]]:
    """Time all providers in turns for about `seconds`, and return a row for each."""
    layout = PrefixLayout.build(groups).to(device)
    own = inputs(layout.spans.shape[1], heads, dtype, device)
    steps = {backend: (ours(backend, layout), own, groups) for backend in backends}
    for name, others in (("plain", plain_groups(groups)), ("duplicated", duplicated_groups(groups))):
        lengths = [sum(group) for group in others]
        steps[name] = (causal(lengths, device, dtype), inputs(sum(lengths), heads, dtype, device), others)
    memory = {name: step_memory(attention, tensors, device) for name, (attention, tensors, _) in steps.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times["plain"]) < 3:
        for name, (attention, tensors, _) in steps.items():
            times[name].append(timed_step(attention, tensors, device))
    rows = []
    for name, (_, _, counted) in steps.items():
        flop = visible_pairs(counted) * heads[0] * heads[2]
        both = spread([sum(pair) for pair in times[name]])
        rows.append(
            {
                "provider": name,
                "forward_ms": spread([forward for forward, _ in times[name]]),
                "backward_ms": spread([backward for _, backward in times[name]]),
                "both_ms": both,
                "forward_tflop": 4 * flop / 1e12,
                "both_tflop": 14 * flop / 1e12,
                "tflop_per_second": 14 * flop / 1e9 / both["median"],
                "peak_memory_mib": memory[name],
            }
        )
    plain = next(row["both_ms"]["median"] for row in rows if row["provider"] == "plain")
    return [{**row, "time_of_plain": row["both_ms"]["median"] / plain} for row in rows]


def timed_step(attention: Attention, tensors: Sequence[Tensor], device: str) -> tuple[float, float]:
    """Return the milliseconds of forward and backward."""
    *leaves, dout = tensors
    if device == "cpu":
        start = time.perf_counter()
        out = attention(*leaves)
        middle = time.perf_counter()
        torch.autograd.grad(out, leaves, dout)
        return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    start.record()
    out = attention(*leaves)
    middle.record()
    torch.autograd.grad(out, leaves, dout)
    end.record()
    end.synchronize()
    return start.elapsed_time(middle), middle.elapsed_time(end)


def step_memory(attention: Attention, tensors: Sequence[Tensor], device: str) -> float | None:
    """Return the MiB that a step takes beside its inputs, after one that compiled and warmed up."""
    timed_step(attention, tensors, device)
    if device == "cpu":
        return None
    place = torch.device(device)
    before = used_memory(place)
    reset_peak_memory(place)
    timed_step(attention, tensors, device)
    return (peak_memory(place) - before) / 2**20


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'model':14}{'batch':22}{'provider':12}{'forward':>9}{'backward':>10}{'both, ms (p20–p80)':>26}"
        f"{'TFLOP/s':>9}{'time of plain':>15}{'MiB':>8}"
    )
    for row in rows:
        both = row["both_ms"]
        span = f"{both['median']:.3f} ({both['p20']:.3f}–{both['p80']:.3f})"
        memory = "" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}"
        print(
            f"{row['model']:14}{row['batch']:22}{row['provider']:12}{row['forward_ms']['median']:9.3f}"
            f"{row['backward_ms']['median']:10.3f}{span:>26}{row['tflop_per_second']:9.2f}"
            f"{row['time_of_plain']:14.2f}×{memory:>8}"
        )


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line per model and batch: milliseconds of everyone, and their ratio to the plain call."""
    lines: dict[str, str] = {}
    for row in rows:
        case = f"{row['model']}, {row['batch']}:"
        cell = f"  {row['provider']} {row['both_ms']['median']:.3f} ms {row['time_of_plain']:.2f}×{mark(row)}"
        lines[case] = lines.get(case, case) + cell
    return list(lines.values())


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    figure, axes = plt.subplots(figsize=(4 + len(cases), 4), layout="constrained")
    width = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        heights = {(row["model"], row["batch"]): row["time_of_plain"] for row in rows if row["provider"] == provider}
        places = [place for place, case in enumerate(cases) if case in heights]
        axes.bar([place + index * width for place in places], heights.values(), width, label=provider)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([place + 0.4 for place in range(len(cases))], ["\n".join(case) for case in cases], fontsize=7)
    axes.set(ylabel="time, plain causal call of the same FLOPs = 1", title="attention, forward and backward")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def pytest_generate_tests(metafunc) -> None:
    metafunc.parametrize("batch", CPU_BATCHES)
    metafunc.parametrize("provider", [*BACKENDS["cpu"], "plain"])


def test_attention(benchmark, provider: str, batch: str) -> None:
    groups, heads = CPU_BATCHES[batch], CPU_MODELS["smollm2-135m"]
    if provider == "plain":
        lengths = [sum(group) for group in plain_groups(groups)]
        attention, tokens = causal(lengths, "cpu", torch.float32), sum(lengths)
    else:
        assert wrong(provider, heads, torch.float32, "cpu") is None
        attention, tokens = ours(provider, PrefixLayout.build(groups)), sum(map(sum, groups))
    tensors = inputs(tokens, heads, torch.float32, "cpu")
    benchmark(timed_step, attention, tensors, "cpu")
