"""What does the head with its DPO loss cost on padded hidden states: `FusedLinearDPOLoss` against Liger's module?

    python benchmarks/run.py liger --shapes llama-3-8b --rows 8192 --out results

Both get the same tensors, those that Liger's module takes: hidden states of policy and reference [2B, T, H] with
prompts and padding, target, two heads. Completions are those of `head_problem`; prompts have log-normal lengths around
a median of 150 tokens, one for both sides of a pair. The loss is sigmoid with β = 0.1.

    dpo_fast          as it is, reference model included
    dpo_fast-cached   with reference log-probs that are known already, which Liger's cannot be given
    liger             one pair at a time, its default
    liger-large       about 4096 positions at a time
    no-reference      either of them without a reference: what is left when its pass is paid elsewhere

Liger's is compiled on CUDA, as by default, but for problems so small that it would do nothing else; not on a CPU. It
compiles for long, for each shape and mode, which no --seconds cut short. Loss, log-probs and gradients of everyone are
compared with float64 on a small problem and with fp32 at the timed size; what computes something else is marked ≠.
Then all take turns (`timing`).

A short table is printed last; a result file goes to --out, after every problem. The exit status is 1 when ours
disagrees or fails.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_fast import FusedLinearDPOLoss
from dpo_fast_kernels.specification import linear_logps_reference
from suite.harness.results import RESULTS, environment, write_result
from suite.harness.timing import (
    DTYPES,
    LIMITS,
    METHOD,
    SIZE_FACTOR,
    Row,
    Stopwatch,
    fail_if_wrong,
    import_error,
    mark,
    relative_error,
    skip,
    table,
    take_turns,
)
from suite.ops.head_problem import BETA, SHAPES, HeadProblem, HeadShape
from suite.ops.head_providers import MODES, Candidate, set_leaves, solve

IGNORED = -100
MEDIAN_PROMPT = 150
SMALL_ROWS = 331
CUDA_PLAN = (("llama-3-8b", 8192),)
CPU_PLAN = (("smollm2-135m", 900),)
_LARGE_CHUNK = 4096  # positions
_WORTH_COMPILING = 1 << 26  # logits
_TRUTH_BLOCK = 1 << 28  # logits that are held at a time


class PaddedProblem:
    """The rows of a `HeadProblem` among prompts and padding, and a reference of the same size.

    Attributes:
        head: compacted rows, weight, and the truth.
        hidden, ref_hidden: [2B, T, H]. ref_weight: [V, H]. target: int64 [2B, T].
        place: int64 [N], where the score rows lie among the 2B·T positions.
    """

    def __init__(self, shape: HeadShape, rows: int, dtype: torch.dtype, device: torch.device):
        self.head = head = HeadProblem(shape, rows, dtype, device)
        generator = torch.Generator(device).manual_seed(1)
        draw = random.Random(1)
        lengths = head.lengths.tolist()
        pairs = len(lengths) // 2
        median = min(MEDIAN_PROMPT, max(1, rows // 24))
        prompts = [max(1, round(draw.lognormvariate(math.log(median), 0.8))) for _ in range(pairs)]
        positions = max(prompts[index // 2] + length for index, length in enumerate(lengths))
        first = torch.arange(2 * pairs, device=device)
        sequence = first // 2 + first % 2 * pairs  # all chosen completions come first, then the rejected
        begin = sequence * positions + torch.tensor(prompts, device=device).repeat_interleave(2)
        within = torch.arange(rows, device=device) - head.layout.cu_scores[head.completion]
        self.place = begin[head.completion] + within
        self.sizes = (2 * pairs, positions)

        def noise(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device, dtype=dtype)

        self.target = torch.full(self.sizes, IGNORED, device=device)
        self.target.view(-1)[self.place] = head.targets
        self.hidden = noise(*self.sizes, shape.hidden)
        self.hidden.view(-1, shape.hidden)[self.place] = head.hidden
        self.ref_hidden = self.hidden + 0.1 * noise(*self.hidden.shape)
        self.ref_weight = head.weight + 0.1 / shape.hidden**0.5 * noise(*head.weight.shape)
        self.head.ref_logps = self._reference()

    @torch.no_grad()
    def _reference(self) -> Tensor:
        """Return the reference's sequence log-probs, pair after pair, by plain PyTorch."""
        rows = self.ref_hidden.view(-1, self.ref_hidden.shape[-1])[self.place]
        step = max(1, _TRUTH_BLOCK // self.ref_weight.shape[0])
        parts = zip(rows.split(step), self.head.targets.split(step), strict=True)
        return self.head.sums(torch.cat([linear_logps_reference(x, self.ref_weight, t, None).logps for x, t in parts]))

    def unpack(self, gradient: Tensor) -> Tensor:
        """Return a padded gradient's score rows; NaN where it is not 0 elsewhere."""
        flat = gradient.flatten(0, 1)
        elsewhere = flat.index_fill(0, self.place, 0).any()
        return torch.where(elsewhere, torch.nan, flat[self.place])

    def candidate(self, module: Callable, mode: str, reference: Sequence[Tensor], cached: Sequence[Tensor]):
        names = ("ref_chosen_logps", "ref_rejected_logps")

        def forward() -> Tensor:
            loss, (chosen, rejected, *_) = module(
                self.head.weight, self.hidden, self.target, None, *reference, **dict(zip(names, cached, strict=False))
            )
            return torch.stack([chosen, rejected], dim=1).flatten() if mode == "forward" else loss

        return Candidate(forward, self.hidden, math.prod(self.sizes), self.unpack)


def _ours(reference: str) -> Callable[[PaddedProblem, str], Candidate]:
    def prepare(problem: PaddedProblem, mode: str) -> Candidate:
        module = FusedLinearDPOLoss(beta=BETA, use_ref_model=reference == "model")
        model = (problem.ref_hidden, problem.ref_weight) if reference == "model" else ()
        cached = problem.head.ref_logps.view(-1, 2).unbind(1) if reference == "cached" else ()
        return problem.candidate(module, mode, model, cached)

    return prepare


def _liger(reference: str, positions: int | None) -> Callable[[PaddedProblem, str], Candidate]:
    def prepare(problem: PaddedProblem, mode: str) -> Candidate:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        head = problem.head
        compiled = head.device.type == "cuda" and head.rows * head.shape.vocabulary > _WORTH_COMPILING
        if compiled:  # anew for each problem, and past the limit not at all
            torch._dynamo.config.recompile_limit = 64
        pairs = 1 if positions is None else max(1, positions // (2 * problem.sizes[1]))
        model = (problem.ref_hidden, problem.ref_weight) if reference == "model" else ()
        module = LigerFusedLinearDPOLoss(beta=BETA, compiled=compiled, chunk_size=pairs, use_ref_model=bool(model))
        return problem.candidate(module, mode, model, ())

    return prepare


PROVIDERS = {
    "dpo_fast": _ours("model"),
    "dpo_fast-cached": _ours("cached"),
    "liger": _liger("model", None),
    "liger-large": _liger("model", _LARGE_CHUNK),
    "dpo_fast-no-reference": _ours(""),
    "liger-no-reference": _liger("", _LARGE_CHUNK),
}
OURS = [name for name in PROVIDERS if name.startswith("dpo_fast")]


def main() -> None:
    options = parse()
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan, began = make_plan(options), time.monotonic()
    report = {
        "question": "cost of the head with its DPO loss on padded hidden states, against Liger's module",
        "dtype": options.dtype,
        "limits": {"small problem": LIMITS[options.dtype], "timed size": SIZE_FACTOR * LIMITS[options.dtype]},
        "beta": BETA,
        "method": METHOD,
        "threads": torch.get_num_threads(),
        "settings": {name: str(value) for name, value in vars(options).items()},
        "environment": environment(),
        "problems": [],
    }
    path = None
    for index, (name, count) in enumerate(plan):
        if index and time.monotonic() > began + options.seconds:
            print(f"{name}, {count} rows: left out, --seconds {options.seconds:g} are over", flush=True)
            continue
        deadline = began + options.seconds * (index + 1) / len(plan)
        about, rows = run_problem(SHAPES[name], count, options, device, deadline)
        report["problems"].append({"shape": name, **about, "table": [row.record() for row in rows]})
        report["summary"] = summary(report)
        path = write_result(f"fused-linear-{options.dtype}", report, options.out)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\n".join([*report["summary"], str(path)]))
    fail_if_wrong(report["problems"], OURS)


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    shapes = [name for name, shape in SHAPES.items() if shape.softcap is None]  # Liger's module has no softcap
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=shapes, metavar="SHAPE", help=f"of {', '.join(shapes)}")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="numbers of score rows, for every shape")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, metavar="MODE", help=f"of {MODES}")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5, help="at most, of everyone")
    parser.add_argument("--seconds", type=float, default=240 if cuda else 600, help="for everything, checks included")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def make_plan(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the problems: the default ones, or every shape with every number of rows."""
    default = CUDA_PLAN if torch.cuda.is_available() else CPU_PLAN
    shapes = options.shapes or [name for name, _ in default]
    return [(name, count) for count in options.rows or [default[0][1]] for name in shapes]


def run_problem(
    shape: HeadShape,
    count: int,
    options: argparse.Namespace,
    device: torch.device,
    deadline: float,
) -> tuple[dict[str, Any], list[Row]]:
    """Check and time everyone at one shape and number of rows; return the problem's figures and the rows."""
    dtype = DTYPES[options.dtype]
    rows = [Row(name, mode) for mode in options.modes for name in PROVIDERS]
    for name in PROVIDERS:
        reason = None if name in OURS else import_error("liger_kernel.chunked_loss")
        skip([row for row in rows if row.provider == name], reason)
    small = PaddedProblem(shape.small(), min(count, SMALL_ROWS), dtype, device)
    prepare_and_check(rows, small, options.dtype, torch.float64)
    problem = PaddedProblem(shape, count, dtype, device)
    candidates = prepare_and_check(rows, problem, options.dtype, torch.float32, at_size=True)
    stopwatch = Stopwatch(device)

    def repeat(row: Row):
        candidate = candidates[row.provider, row.mode]
        set_leaves(candidate, problem.head, row.mode)
        return stopwatch.repeat(candidate.forward)

    take_turns([row for row in rows if row.status == "timed"], repeat, options.repeats, deadline)
    for row in rows:
        if row.status == "timed":
            row.figures.update(row.spreads())
    sequences, positions = problem.sizes
    return {**asdict(shape), "rows": count, "sequences": sequences, "positions": positions}, rows


def prepare_and_check(
    rows: Sequence[Row],
    problem: PaddedProblem,
    dtype: str,
    truth_dtype: torch.dtype,
    at_size: bool = False,
) -> dict[tuple[str, str], Candidate]:
    """Run every row once to warm up, and compare the result with the truth."""
    candidates: dict[tuple[str, str], Candidate] = {}
    for no_reference in (False, True):
        truth = None
        for row in rows:
            if row.status != "timed" or row.provider.endswith("no-reference") != no_reference:
                continue
            objective = "dpo without reference" if no_reference else "dpo"
            truth = truth or problem.head.truth(objective, truth_dtype)
            candidate = row.attempt(lambda row=row: PROVIDERS[row.provider](problem, row.mode))
            if candidate is None:
                continue
            found = row.attempt(lambda row=row, candidate=candidate: solve(candidate, problem.head, row.mode))
            if found is not None:
                candidates[row.provider, row.mode] = candidate
                row.check({name: relative_error(each, truth[name]) for name, each in found.items()}, dtype, at_size)
    return candidates


def summary(report: Mapping[str, Any]) -> list[str]:
    """Return the short table: a line for each problem, mode and provider."""
    header = ["head + DPO loss, padded", "ms", "p20", "p80", "n", "GiB", "error", "at size"]
    lines = []
    for problem in report["problems"]:
        about = f"{problem['shape']} {problem['rows']} of {problem['sequences']}×{problem['positions']}"
        for row in problem["table"]:
            line = [f"{about} {row['mode']} {row['provider']}{mark(row)}"]
            if "ms" in row:
                ms, peak = row["ms"], row["peak_bytes"]
                line += [f"{ms[part]:.4g}" for part in ("median", "p20", "p80")] + [str(ms["count"])]
                line += ["" if peak is None else f"{peak / 2**30:.2f}"]
                line += [f"{max(row[errors].values()):.0e}" for errors in ("errors", "errors_at_size")]
            else:
                line += [row["status"], *[""] * (len(header) - 2)]
            lines.append(line)
    return table(header, lines)
