"""What does the LM head cost, forward and backward: ours by strategy, against peers and against the bare GEMMs?

    python benchmarks/run.py head --shapes llama-3-8b --rows 8192 16384 --out results
    pytest benchmarks/suite/ops/head.py

Everyone gets the same score rows (`head_problem`) and computes the same sigmoid loss, but for what `head_providers`
says of each. Loss and gradients are compared with float64 on a small problem of the same shape, and with fp32 at the
timed size; what computes something else is marked ≠. Then all take turns (`timing`).

    % of bare = time of the bare products over the provider's. The bare ones are logits, dX and dW (trainable), logits
    and dX (frozen), or logits alone (forward): a strategy that takes more of them is not forgiven for it. TFLOP/s are
    on what it takes.

A short table is printed last; a result file and a plot go to --out, after every problem. The exit status is 1 when one
of ours disagrees or fails.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from suite.harness.results import RESULTS, environment, write_result
from suite.harness.timing import (
    DTYPES,
    LIMITS,
    METHOD,
    SIZE_FACTOR,
    Row,
    Stopwatch,
    fail_if_wrong,
    mark,
    plot_bars,
    relative_error,
    shares,
    skip,
    table,
    take_turns,
)
from suite.ops.head_problem import BETA, SHAPES, HeadProblem, HeadShape
from suite.ops.head_providers import MODES, PROVIDERS, Candidate, set_leaves, solve

SMALL_ROWS = 331
CUDA_PLAN = (
    ("smollm2-135m", 8192),
    ("qwen2.5-1.5b", 8192),
    ("llama-3-8b", 2048),
    ("qwen3-4b", 8192),
    ("gemma-2-2b", 8192),
    ("llama-3-8b", 8192),
    ("llama-3-8b", 16384),
    ("llama-3-8b", 65536),
)
CPU_PLAN = (("smollm2-135m", 1791),)
# On a GPU these compile for every problem, longer than all others run: where nobody asks, for one shape only.
SLOW_TO_COMPILE, COMPILED_SHAPE = ("liger-dpo",), SHAPES["llama-3-8b"]
_LARGE = (65536, 70 * 2**30)  # so many rows by default only on a GPU with so much memory


def main() -> None:
    options = parse()
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan, began = make_plan(options), time.monotonic()
    costs = [rows * SHAPES[name].hidden * SHAPES[name].vocabulary for name, rows in plan]
    report = {
        "question": "cost of the LM head, forward and backward, against peers and the bare GEMMs",
        "dtype": options.dtype,
        "limits": {"small problem": LIMITS[options.dtype], "timed size": SIZE_FACTOR * LIMITS[options.dtype]},
        "beta": BETA,
        "method": METHOD,
        "threads": torch.get_num_threads(),
        "settings": {name: str(value) for name, value in vars(options).items()},
        "environment": environment(),
        "problems": [],
    }
    deadline, path = began, None
    for (name, rows), cost in zip(plan, costs, strict=True):
        deadline += options.seconds / 2 * (1 / len(plan) + cost / sum(costs))  # what one leaves over, the next may use
        if time.monotonic() > began + options.seconds:
            print(f"{name}, {rows} rows: left out, --seconds {options.seconds:g} are over", flush=True)
            continue
        problem, done = run_problem(SHAPES[name], rows, options, device, deadline)
        report["problems"].append({"shape": name, **problem, "table": [row.record() for row in done]})
        print("\n".join(["", _title(report["problems"][-1]), *full_table(done), ""]), flush=True)
        report["summary"] = summary(report)
        path = write_result(f"head-{options.dtype}", report, options.out)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if path is None:
        raise SystemExit(f"--seconds {options.seconds:g} were over before a problem began; give more")
    panels = {_title(problem): shares(problem, "percent_of_bare") for problem in report["problems"]}
    plot_bars(panels, "% of the bare GEMMs", path.with_suffix(".png"))
    print("\n".join([*report["summary"], str(path)]))
    fail_if_wrong(report["problems"], [name for name, provider in PROVIDERS.items() if provider.ours])


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="numbers of score rows, for every shape")
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        metavar="PROVIDER",
        help=f"of {', '.join(PROVIDERS)}; bare always takes part; all when left out",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5, help="at most, of everyone")
    parser.add_argument("--seconds", type=float, default=180 if cuda else 600, help="for everything, checks included")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def make_plan(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the problems, cheap ones first: the default ones, or every shape with every number of rows."""
    cuda = torch.cuda.is_available()
    default = CUDA_PLAN if cuda else CPU_PLAN
    if options.shapes or options.rows:
        shapes = options.shapes or list(dict.fromkeys(name for name, _ in default))
        rows = options.rows or sorted({count for _, count in default if count < _LARGE[0]})
        default = [(name, count) for count in rows for name in shapes]
        return sorted(default, key=lambda item: item[1] * SHAPES[item[0]].hidden * SHAPES[item[0]].vocabulary)
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    return [item for item in default if item[1] < _LARGE[0] or memory >= _LARGE[1]]


def run_problem(
    shape: HeadShape,
    count: int,
    options: argparse.Namespace,
    device: torch.device,
    deadline: float,
) -> tuple[dict[str, Any], list[Row]]:
    """Check and time everyone at one shape and number of rows; return the problem's figures and the rows."""
    dtype = DTYPES[options.dtype]
    names = [name for name in PROVIDERS if name in (options.providers or PROVIDERS) or name == "bare"]
    rows = [Row(name, mode) for mode in MODES for name in names if mode in PROVIDERS[name].products]
    problem = HeadProblem(shape, count, dtype, device)
    for name in names:
        reason = PROVIDERS[name].missing(problem)
        if name in SLOW_TO_COMPILE and not options.providers and device.type == "cuda" and shape != COMPILED_SHAPE:
            reason = "compiles for long: ask for it with --providers"
        skip([row for row in rows if row.provider == name], reason)
    small = HeadProblem(shape.small(), min(count, SMALL_ROWS), dtype, device)
    prepare_and_check(rows, small, options.dtype, torch.float64)
    candidates = prepare_and_check(rows, problem, options.dtype, torch.float32, at_size=True)
    stopwatch = Stopwatch(device)

    def repeat(row: Row):
        candidate = candidates[row.provider, row.mode]
        set_leaves(candidate, problem, row.mode)
        return stopwatch.repeat(candidate.forward)

    take_turns([row for row in rows if row.status == "timed"], repeat, options.repeats, deadline)
    add_figures(rows, problem, candidates)
    lengths = problem.lengths.tolist()
    about = {**asdict(shape), "rows": count, "completions": len(lengths), "longest_completion": max(lengths)}
    return about, rows


def prepare_and_check(
    rows: Sequence[Row],
    problem: HeadProblem,
    dtype: str,
    truth_dtype: torch.dtype,
    at_size: bool = False,
) -> dict[tuple[str, str], Candidate]:
    """Lay out the inputs of every row, run it once to warm up, and compare the result with the truth."""
    candidates = {}
    for objective in dict.fromkeys(PROVIDERS[row.provider].objective for row in rows):
        truth = None
        for row in rows:
            provider = PROVIDERS[row.provider]
            if row.status != "timed" or provider.objective != objective:
                continue
            candidate = row.attempt(lambda row=row, provider=provider: provider.prepare(problem, row.mode))
            if candidate is None:
                continue
            candidates[row.provider, row.mode] = candidate
            if not provider.checked:
                row.attempt(lambda row=row, candidate=candidate: _warm_up(candidate, problem, row.mode))
                continue
            truth = truth or problem.truth(objective, truth_dtype)
            found = row.attempt(lambda row=row, candidate=candidate: solve(candidate, problem, row.mode))
            if found is not None:
                errors = {name: relative_error(tensor, truth[name]) for name, tensor in found.items()}
                row.check(errors, dtype, at_size)
    return candidates


def _warm_up(candidate: Candidate, problem: HeadProblem, mode: str) -> None:
    set_leaves(candidate, problem, mode)
    candidate.forward()


def add_figures(rows: Sequence[Row], problem: HeadProblem, candidates: Mapping[tuple[str, str], Candidate]) -> None:
    """Fill in what follows from the repeats: milliseconds, memory, TFLOP/s and the share of the bare products."""
    width = 2 * problem.shape.hidden * problem.shape.vocabulary
    for row in rows:
        if row.status == "timed":
            flop = PROVIDERS[row.provider].products[row.mode] * candidates[row.provider, row.mode].rows * width
            row.figures.update(row.spreads(), flop=flop)
            row.figures["tflops"] = flop / row.figures["ms"]["median"] / 1e9
            if not PROVIDERS[row.provider].checked:
                row.figures["peak_bytes"] = None  # its memory is laid out beforehand
    bare = {row.mode: row.figures["ms"]["median"] for row in rows if row.provider == "bare" and row.figures}
    for row in rows:
        if row.figures and row.mode in bare:
            row.figures["percent_of_bare"] = 100 * bare[row.mode] / row.figures["ms"]["median"]


def full_table(rows: Sequence[Row]) -> list[str]:
    """Return all figures of a problem as lines of text."""
    header = ["", "ms fwd", "bwd", "both", "p20", "p80", "n", "GiB", "TFLOP/s", "% bare", "error", "at size"]
    lines = []
    for row in rows:
        cells = [f"{row.mode} {row.provider}"]
        if row.status == "timed" and row.figures:
            figures, ms = row.figures, row.figures["ms"]
            peak = figures["peak_bytes"]
            cells += [f"{figures[part]['median']:.2f}" for part in ("ms_forward", "ms_backward")]
            cells += [f"{ms[part]:.2f}" for part in ("median", "p20", "p80")]
            cells += [str(ms["count"]), "" if peak is None else f"{peak / 2**30:.2f}", f"{figures['tflops']:.2f}"]
            cells += [f"{figures.get('percent_of_bare', 0):.0f}"]
            cells += [f"{max(found.values()):.0e}" if found else "" for found in (row.errors, row.errors_at_size)]
        else:
            cells += [row.status, *[""] * (len(header) - 2)]
        lines.append(cells)
    return table(header, lines)


def _title(problem: Mapping[str, Any]) -> str:
    return f"{problem['shape']} {problem['hidden']}×{problem['vocabulary']}, {problem['rows']} rows"


def summary(report: Mapping[str, Any]) -> list[str]:
    """Return the short table: a line for each problem and mode, milliseconds and % of the bare products."""
    names = [name for name in PROVIDERS if name != "bare"]
    lines = []
    for mode in MODES:
        for problem in report["problems"]:
            rows = {row["provider"]: row for row in problem["table"] if row["mode"] == mode}
            line = [f"{problem['shape']} {problem['rows']} {mode}"]
            line += [f"{rows['bare']['ms']['median']:.4g}" if "ms" in rows["bare"] else rows["bare"]["status"]]
            for name in names:
                row = rows.get(name)
                if row and "ms" in row:
                    line.append(f"{row['ms']['median']:.4g} {row.get('percent_of_bare', 0):.0f}%{mark(row)}")
                else:
                    line.append(row["status"] if row else "")
            lines.append(line)
    used = [i for i in range(len(names) + 2) if any(line[i] for line in lines)]
    header = [f"LM head, {report['dtype']}: ms, % of bare", "bare", *names]
    return table([header[i] for i in used], [[line[i] for i in used] for line in lines])


def pytest_generate_tests(metafunc) -> None:
    cases = [(name, frozen) for name in PROVIDERS for frozen in (False, True)]
    metafunc.parametrize(
        ("provider", "frozen"), cases, ids=[f"{name}-{'frozen' if frozen else 'trainable'}" for name, frozen in cases]
    )


def test_head(benchmark, provider, frozen):
    """Time 256 rows of a head of 64 × 2003; a provider without gradient runs its forward."""
    import pytest

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bf16" if device.type == "cuda" else "fp32"
    mode = "frozen" if frozen else "trainable"
    if mode not in PROVIDERS[provider].products:
        mode = "forward"
    problem = HeadProblem(SHAPES["tiny"], 256, DTYPES[dtype], device)
    reason = PROVIDERS[provider].missing(problem)
    if reason:
        pytest.skip(reason)
    row = Row(provider, mode)
    candidates = prepare_and_check([row], problem, dtype, torch.float64)
    assert row.status == "timed", row.reason

    def run() -> None:
        set_leaves(candidates[provider, mode], problem, mode)
        result = candidates[provider, mode].forward()
        if result.requires_grad:
            result.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
