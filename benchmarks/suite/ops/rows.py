"""How many bytes per second does the work on rows of logits move, against a plain copy of the same bytes?

    python benchmarks/run.py rows --shapes llama-3-8b --dtypes fp32 bf16 --out results
    pytest benchmarks/suite/ops/rows.py

Logits [N, V] without bias or transform, gradients in their dtype. Bytes are counted alike for everyone, in passes over
N·V entries, so that bytes per second compare as times do:

    forward            log-probs and their sums over completions      1  read
    backward           gradient, from log-probs and log-sum-exps      2  read, written
    forward+backward   both                                           3  read, read, written
    copy               the ceiling                                    2  read, written

Whoever keeps a block in the cache from one pass to the next moves less, and may be above 100 % of the copy.

    triton, torch      ours on the tile: row_logps_fwd, row_logps_bwd (with a coefficient a row), row_logps_fwd_bwd
                       (without); torch works in its input's place where that is fp32, and gets it anew each time
    sequence-triton,   ours under autograd: sequence_logps
    sequence-torch
    plain              PyTorch: log_softmax in fp32, gather, sums, under autograd
    trl                selective_log_softmax of TRL, sums, under autograd

Results are compared with float64 before they are timed: all sums, and the gradient of the first and last rows. A short
table is printed last; a result file and a plot go to --out. The exit status is 1 when one of ours is wrong or fails.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_fast_kernels import LogitTransform, ScoreLayout, sequence_logps
from dpo_fast_kernels.head.arguments import row_operations
from dpo_fast_kernels.head.tiles import tile_slices
from dpo_fast_kernels.specification import row_gradient_reference, row_logps_reference
from suite.harness.results import RESULTS, environment, write_result
from suite.harness.timing import (
    DTYPES,
    LIMITS,
    METHOD,
    Row,
    Stopwatch,
    fail_if_wrong,
    import_error,
    mark,
    plot_bars,
    relative_error,
    runs_triton,
    shares,
    skip,
    table,
    take_turns,
)
from suite.ops.head_problem import SHAPES, pair_lengths

PASSES = {"forward": 1, "backward": 2, "forward+backward": 3, "copy": 2}
CUDA_SHAPES = ("smollm2-135m", "llama-3-8b", "qwen3-4b", "gemma-2-2b")
_SAMPLE = 16  # rows at either end whose gradient is compared
_BLOCK = 1 << 26  # elements of logits that the truth holds at a time
_PLAIN = LogitTransform()


class RowsProblem:
    """Logits, targets and completions, and what is true of them in float64."""

    def __init__(self, vocabulary: int, rows: int, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        options = {"generator": generator, "device": device}
        self.device, self.rows, self.vocabulary = device, rows, vocabulary
        self.logits = (2 * torch.randn(rows, vocabulary, **options)).to(dtype)
        self.targets = torch.randint(vocabulary, (rows,), **options)
        self.layout = ScoreLayout.build(pair_lengths(rows)).to(device)
        lengths = self.layout.cu_scores.diff()
        self.completion = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        self.coefficient = torch.randn(len(lengths), **options)
        blocks = tile_slices(0, rows, max(1, _BLOCK // vocabulary))
        self.logps = torch.cat([row_logps_reference(self.logits[b].double(), self.targets[b]).logps for b in blocks])
        self.lse = self.logits.gather(1, self.targets[:, None])[:, 0].double() - self.logps
        self._sample = torch.cat([torch.arange(rows)[:_SAMPLE], torch.arange(rows)[-_SAMPLE:]]).to(device)

    def sums(self, logps: Tensor) -> Tensor:
        return logps.new_zeros(len(self.coefficient)).index_add(0, self.completion, logps)

    def errors(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """Return relative errors of `sums`, of `D`, and of `gradient`, D times its completion's coefficient."""
        errors, z, targets = {}, self.logits[self._sample].double(), self.targets[self._sample]
        for name, tensor in found.items():
            if name == "sums":
                errors[name] = relative_error(tensor, self.sums(self.logps))
                continue
            coefficient = None if name == "D" else self.coefficient[self.completion][self._sample].double()
            true = row_gradient_reference(z, targets, _PLAIN, coefficient)
            errors[name] = relative_error(tensor[self._sample], true)
        return errors


@dataclass
class Candidate:
    """A provider ready to run: `forward` returns what is timed, `results` what to compare after a run."""

    forward: Callable[[], Tensor]
    results: Callable[[Tensor], Mapping[str, Tensor]]
    before: Callable[[], Any] = lambda: None


def _tile(backend: str):
    """Return a provider of the functions on a tile: they are handed memory to write to, and no autograd."""

    def prepare(problem: RowsProblem, mode: str) -> Candidate:
        ops, options = row_operations(backend), {"transform": _PLAIN}
        z, coefficient = problem.logits, problem.coefficient[problem.completion]
        logps, lse = problem.logps.float(), problem.lse.float()
        if mode == "forward":

            def forward() -> Tensor:
                found, _ = ops.row_logps_fwd(z, problem.targets, None, statistics={}, **options)
                return ops.sequence_sums(found, problem.layout.cu_scores)

            return Candidate(forward, lambda sums: {"sums": sums})
        out = torch.empty_like(z)
        work = z.clone() if backend == "torch" and z.dtype == torch.float32 else z
        restore = (lambda: work.copy_(z)) if work is not z else (lambda: None)
        if mode == "backward":

            def backward() -> Tensor:
                ops.row_logps_bwd(work, problem.targets, None, logps, lse, out=out, coefficient=coefficient, **options)
                return out

            return Candidate(backward, lambda out: {"gradient": out}, restore)

        def both() -> Tensor:
            found = ops.row_logps_fwd_bwd(work, problem.targets, None, statistics={}, out=out, **options)
            return ops.sequence_sums(found, problem.layout.cu_scores)

        return Candidate(both, lambda sums: {"sums": sums, "D": out}, restore)

    return prepare


def _differentiable(make_sums: Callable[[RowsProblem, Tensor], Tensor]):
    """Return a provider of a function from logits to sums, whose gradient autograd takes."""

    def prepare(problem: RowsProblem, mode: str) -> Candidate:
        if mode == "forward":
            return Candidate(lambda: make_sums(problem, problem.logits), lambda sums: {"sums": sums})
        leaf = problem.logits.detach().requires_grad_()

        def before() -> None:
            leaf.grad = None

        return Candidate(
            lambda: (make_sums(problem, leaf) * problem.coefficient).sum(), lambda loss: {"gradient": leaf.grad}, before
        )

    return prepare


def _sequence(backend: str):
    return _differentiable(
        lambda problem, z: sequence_logps(z, problem.targets, problem.layout.cu_scores, backend=backend)
    )


def _plain(problem: RowsProblem, z: Tensor) -> Tensor:
    logps = torch.log_softmax(z, -1, dtype=torch.float32).gather(1, problem.targets[:, None])[:, 0]
    return problem.sums(logps)


def _trl(problem: RowsProblem, z: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return problem.sums(selective_log_softmax(z, problem.targets).float())


def _copy(problem: RowsProblem, mode: str) -> Candidate:
    out = torch.empty_like(problem.logits)
    return Candidate(lambda: out.copy_(problem.logits), lambda out: {})


@dataclass(frozen=True)
class Provider:
    """Who computes, in which modes, why not here, and whether it is ours."""

    prepare: Callable[[RowsProblem, str], Candidate]
    modes: Sequence[str] = ("forward", "forward+backward")
    missing: Callable[[RowsProblem], str | None] = lambda problem: None
    ours: bool = False


def _no_gpu(problem: RowsProblem) -> str | None:
    return None if runs_triton(problem.device) else "Triton kernels need a GPU"


_TILE_MODES = ("forward", "backward", "forward+backward")
PROVIDERS = {
    "triton": Provider(_tile("triton"), _TILE_MODES, _no_gpu, ours=True),
    "torch": Provider(_tile("torch"), _TILE_MODES, ours=True),
    "sequence-triton": Provider(_sequence("triton"), missing=_no_gpu, ours=True),
    "sequence-torch": Provider(_sequence("torch"), ours=True),
    "plain": Provider(_differentiable(_plain)),
    "trl": Provider(_differentiable(_trl), missing=lambda problem: import_error("trl.trainer.utils")),
    "copy": Provider(_copy, ("copy",)),
}


def main() -> None:
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan, began = [(name, dtype) for name in options.shapes for dtype in options.dtypes], time.monotonic()
    report = {
        "question": "bytes per second of the work on rows of logits, against a copy",
        "passes": PASSES,
        "limits": {dtype: LIMITS[dtype] for dtype in options.dtypes},
        "method": METHOD,
        "threads": torch.get_num_threads(),
        "settings": {name: str(value) for name, value in vars(options).items()},
        "environment": environment(),
        "problems": [],
    }
    for index, (name, dtype) in enumerate(plan):
        if time.monotonic() > began + options.seconds and index:
            print(f"{name}, {dtype}: left out, --seconds {options.seconds:g} are over", flush=True)
            continue
        deadline = began + options.seconds * (index + 1) / len(plan)
        done = run_problem(SHAPES[name].vocabulary, dtype, options, device, deadline)
        report["problems"].append(
            {
                "shape": name,
                "vocabulary": SHAPES[name].vocabulary,
                "rows": options.rows,
                "dtype": dtype,
                "table": [row.record() for row in done],
            }
        )
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report["summary"] = summary(report)
    path = write_result("rows", report, options.out)
    panels = {_title(problem): shares(problem, "percent_of_copy") for problem in report["problems"]}
    plot_bars(panels, "% of a copy", path.with_suffix(".png"))
    print("\n".join([*report["summary"], str(path)]))
    fail_if_wrong(report["problems"], [name for name, provider in PROVIDERS.items() if provider.ours])


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        metavar="SHAPE",
        default=list(CUDA_SHAPES) if cuda else ["smollm2-135m"],
        help=f"heads whose vocabulary to take, of {', '.join(SHAPES)}",
    )
    parser.add_argument("--rows", type=int, metavar="N", default=2048 if cuda else 512, help="rows of logits")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES) if cuda else ["fp32", "bf16"])
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        metavar="PROVIDER",
        default=list(PROVIDERS),
        help=f"of {', '.join(PROVIDERS)}; copy always takes part",
    )
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5, help="at most, of everyone")
    parser.add_argument("--seconds", type=float, default=35 if cuda else 120, help="for everything, checks included")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def run_problem(
    vocabulary: int,
    dtype: str,
    options: argparse.Namespace,
    device: torch.device,
    deadline: float,
) -> list[Row]:
    """Check and time everyone on one kind of logits."""
    problem = RowsProblem(vocabulary, options.rows, DTYPES[dtype], device)
    names = [name for name in PROVIDERS if name in options.providers or name == "copy"]
    rows = [Row(name, mode) for name in names for mode in PROVIDERS[name].modes]
    for name in names:
        skip([row for row in rows if row.provider == name], PROVIDERS[name].missing(problem))
    candidates = prepare_and_check(rows, problem, dtype)
    stopwatch = Stopwatch(device)

    def repeat(row: Row):
        candidate = candidates[row.provider, row.mode]
        candidate.before()
        return stopwatch.repeat(candidate.forward)

    take_turns([row for row in rows if row.status == "timed"], repeat, options.repeats, deadline)
    one_pass = options.rows * vocabulary * DTYPES[dtype].itemsize
    for row in rows:
        if row.status == "timed":
            row.figures.update(row.spreads(), bytes=PASSES[row.mode] * one_pass)
            row.figures["gb_per_second"] = row.figures["bytes"] / row.figures["ms"]["median"] / 1e6
    ceiling = next(row.figures.get("gb_per_second") for row in rows if row.provider == "copy")
    for row in rows:
        if row.figures and ceiling:
            row.figures["percent_of_copy"] = 100 * row.figures["gb_per_second"] / ceiling
    return rows


def prepare_and_check(rows: Sequence[Row], problem: RowsProblem, dtype: str) -> dict[tuple[str, str], Candidate]:
    """Lay out the memory of every row, run it once to warm up, and compare the result with float64."""
    candidates = {}

    def results(candidate: Candidate) -> Mapping[str, Tensor]:
        candidate.before()
        value = candidate.forward()
        if value.requires_grad:
            value.backward()
        return candidate.results(value.detach())

    for row in rows:
        if row.status == "timed":
            candidate = row.attempt(lambda row=row: PROVIDERS[row.provider].prepare(problem, row.mode))
            found = candidate and row.attempt(lambda candidate=candidate: results(candidate))
            if found is not None:
                candidates[row.provider, row.mode] = candidate
                row.check(problem.errors(found), dtype)
    return candidates


def _title(problem: Mapping[str, Any]) -> str:
    return f"{problem['rows']} × {problem['vocabulary']} {problem['dtype']}"


def summary(report: Mapping[str, Any]) -> list[str]:
    """Return the short table: a line for each kind of logits, GB/s of the copy and everyone's share of it."""
    names = [name for name in PROVIDERS if name != "copy"]
    lines = []
    for problem in report["problems"]:
        rows = {(row["provider"], row["mode"]): row for row in problem["table"]}
        line = [_title(problem)]
        line.append(f"{rows['copy', 'copy'].get('gb_per_second', 0):.4g}")
        for name in names:
            cells = []
            for mode in PROVIDERS[name].modes:
                row = rows.get((name, mode), {"status": ""})
                cells.append(f"{row['percent_of_copy']:.0f}{mark(row)}" if "percent_of_copy" in row else row["status"])
            line.append(cells[0] if len(set(cells)) == 1 else " ".join(cells))
        lines.append(line)
    header = ["rows, % of copy: fwd [bwd] both", "copy GB/s", *names]
    used = [i for i in range(len(header)) if any(line[i] not in ("", "skipped") for line in lines)]
    return table([header[i] for i in used], [[line[i] for i in used] for line in lines])


def pytest_generate_tests(metafunc) -> None:
    cases = [(name, mode) for name, provider in PROVIDERS.items() for mode in provider.modes]
    metafunc.parametrize(("provider", "mode"), cases, ids=[f"{name}-{mode}" for name, mode in cases])


def test_rows(benchmark, provider, mode):
    """Time 97 rows of 2003 logits in fp32."""
    import pytest

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = RowsProblem(SHAPES["tiny"].vocabulary, 97, torch.float32, device)
    reason = PROVIDERS[provider].missing(problem)
    if reason:
        pytest.skip(reason)
    row = Row(provider, mode)
    candidates = prepare_and_check([row], problem, "fp32")
    assert row.status == "timed", row.reason

    def run() -> None:
        candidate = candidates[provider, mode]
        candidate.before()
        value = candidate.forward()
        if value.requires_grad:
            value.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
