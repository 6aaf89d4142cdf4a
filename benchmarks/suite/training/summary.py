"""Results of run.py speed: sides that compute something else, figures, a table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from dpo_fast.commands.bench.worker import Report
from suite.harness.results import spread
from suite.training.models import model_config, step_flops, unique_tokens
from suite.training.setting import Setting
from suite.training.workloads import Group

# Losses start at ln 2 whoever computes; the norm of the gradient is what tells that the same thing is differentiated.
GRADIENT_TOLERANCE = {"fp32": 5e-3, "bf16": 1e-1}
Reports = Mapping[str, Report]


def record(report: Report) -> dict[str, Any]:
    """Return a report as the result file has it."""
    return {
        "losses": report.losses,
        "gradient_norms": [row["grad_norm"] for row in report.log],
        "seconds_before_training": report.seconds_before_training,
        "seconds": report.seconds,
        "token_positions": sum(report.positions),
        "peak_memory_gib": report.peak_memory / 2**30,
        **report.notes,
    }


def disagreements(reports: Reports, loss_tolerance: float, gradient_tolerance: float) -> list[str]:
    """Return where a side differs from the first by more than a tolerance, in a step's loss or gradient norm."""
    found = []
    for key, what, tolerance in (("loss", "loss", loss_tolerance), ("grad_norm", "gradient norm", gradient_tolerance)):
        (name, ours), *others = reports.items()
        for other, theirs in others:
            for step, (a, b) in enumerate(zip(ours.log, theirs.log, strict=True)):
                if not abs(a[key] - b[key]) <= tolerance * abs(b[key]):
                    found.append(f"step {step}: {name} has {what} {a[key]}, {other} {b[key]}")
    return found


def bare_gemm_rate(model: str, precision: str) -> dict[str, Any]:
    """Return the FLOP/s of a lone matrix product of the model's shape, which is the most that this machine can do."""
    config = model_config(model).get_text_config()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, inner = (8192, getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((tokens, inner), (inner, config.hidden_size)))
    products, seconds = 20 if device.type == "cuda" else 1, []  # enough to hide a GPU's launches
    for _ in range(8):
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    flops = 2 * tokens * inner * config.hidden_size * products
    shape = f"{tokens}×{inner} by {inner}×{config.hidden_size}"
    return {"flops_per_second": flops / min(seconds), "product": shape, "precision": precision}


def figures(
    reports: Reports,
    settings: Mapping[str, Setting],
    groups: Sequence[Group],
    groups_a_step: int,
    gemm: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the figures of every side over the timed steps, and those of the first side against the others."""
    steps = [groups[start : start + groups_a_step] for start in range(0, len(groups), groups_a_step)]
    some = next(iter(settings.values()))
    timed = steps[1 : 1 + some.steps]
    config = model_config(some.model)
    flops = sum(step_flops(config, step, frozen=some.lora) for step in timed)
    tokens = [sum(map(unique_tokens, step)) for step in timed]
    pairs = sum(len(group["comparisons"]) for step in timed for group in step)
    sides = {}
    for name, report in reports.items():
        seconds = sum(report.seconds)
        sides[name] = {
            "pairs_per_second": pairs / seconds,
            "unique_tokens_per_second": sum(tokens) / seconds,
            "model_flop_utilisation": flops / seconds / gemm["flops_per_second"],
            "seconds_per_step": spread(report.seconds),
            "setting": {key: asdict(settings[name])[key] for key in ("micro_batch", "accumulation", "checkpointing")},
            **record(report),
        }
    return {
        "sides": sides,
        "against": {name: _against(sides, name) for name in list(sides)[1:]},
        "unique_tokens": tokens,
        "bare_gemm": dict(gemm),
    }


def _against(sides: Mapping[str, Any], other: str) -> dict[str, Any]:
    ours, theirs = next(iter(sides.values())), sides[other]
    return {
        "speedup": ours["pairs_per_second"] / theirs["pairs_per_second"],
        "speedup_per_step": spread([b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]),
        "memory_ratio": ours["peak_memory_gib"] / theirs["peak_memory_gib"],
        "largest_loss_difference": _largest_difference(ours["losses"], theirs["losses"]),
        "largest_gradient_norm_difference": _largest_difference(ours["gradient_norms"], theirs["gradient_norms"]),
    }


def _largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def table(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of the result for people."""
    head = f"{'':10}{'micro':>6}{'pairs/s':>10}{'tokens/s':>10}{'MFU':>7}{'s/step':>9}{'p20–p80':>16}{'GiB':>8}"
    lines = [f"{head}{'positions':>11}{'syncs':>7}"]
    for name, side in result["sides"].items():
        step, setting = side["seconds_per_step"], side["setting"]
        micro_batch = f"{setting['micro_batch']}{'c' if setting['checkpointing'] else ''}"
        lines.append(
            f"{name:10}{micro_batch:>6}{side['pairs_per_second']:10.4f}{side['unique_tokens_per_second']:10.1f}"
            f"{side['model_flop_utilisation']:7.1%}{step['median']:9.2f}{step['p20']:9.2f}–{step['p80']:<6.2f}"
            f"{side['peak_memory_gib']:8.2f}{side['token_positions']:11d}{side.get('host_syncs', '–'):>7}"
        )
    for name, side in result["sides"].items():
        if parts := side.get("seconds_by_part"):
            lines.append(f"{name:10}" + "  ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items()) + "  (s)")
    if result["disagrees"]:
        lines.append(f"≠ disagrees, no figure here counts: {result['disagreements'][0]}")
    for name, reason in result["does_not_fit"].items():
        lines.append(f"{name:10}does not fit: {reason}")
    for name, ours in result["against"].items():
        lines.append(
            f"against {name}: speed-up {ours['speedup']:.2f}×, peak memory {ours['memory_ratio']:.2f}×; largest "
            f"relative difference of a loss {ours['largest_loss_difference']:.1e}, of a gradient's norm "
            f"{ours['largest_gradient_norm_difference']:.1e}"
        )
    return lines
