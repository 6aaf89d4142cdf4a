"""Who takes part in the benchmark of the LM head, and how each is called.

ours
    preference   `linear_preference_loss`: loss and gradients made in the forward
    kept         `linear_logps` with a budget that keeps all of D, at least the default one
    recomputed   `linear_logps` with a budget of 0, which keeps nothing
    forward      `linear_logps` without gradient, in tiles
    fused        the same as one kernel, CUDA only
peers, optional
    trl          `ChunkedLogProbFunction` with the chunks that TRL's trainer takes and no statistics
    liger-dpo    `LigerFusedLinearDPOLoss` on rows padded to the longest completion, which is the input it takes, in
                 chunks of about 4096 rows (its default is one pair); it cannot be given reference log-probs, so its
                 loss is that of a reference of 0, and its truth too; compiled on CUDA, as by default, but not for
                 problems so small that it would do nothing else
    liger-ce     `LigerFusedLinearCrossEntropyLoss` with sums in fp32: the mean NLL of the same rows, for its cost
    cce          `cut_cross_entropy.linear_cross_entropy`, the variant with compensated sums where the version has it
    plain        whole logits, log_softmax in fp32, gather, sums
bare             the products of `preference` (or of `forward`) in the same tiles through the same calls, nothing else
untiled          the same products of all rows at once: the floor that no tiling forgives

FLOP are counted in 2·NHV products that a strategy takes: logits, logits again, dX, dW. N are padded rows for liger-dpo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast.machine import free_memory
from dpo_fast_kernels import SequenceLoss, linear_logps, linear_preference_loss
from dpo_fast_kernels.head.gemm import Gemm
from dpo_fast_kernels.head.score_layout import group_tiles
from dpo_fast_kernels.head.tiles import TileMemory, group_tile_rows, tile_rows, tile_slices
from suite.harness.timing import import_error, runs_triton
from suite.ops.head_problem import BETA, HeadProblem, dpo

MODES = ("trainable", "frozen", "forward")  # head trains, only hidden does, nothing does
DEFAULT_BUDGET = 2 * 2**30
_LIGER_ROWS = 4096
_WORTH_COMPILING = 1 << 26  # logits


@dataclass
class Candidate:
    """A provider with its inputs laid out, ready to run again and again.

    Attributes:
        forward: returns the loss, or in mode "forward" the sequence log-probs.
        hidden: the leaf that its gradient goes to.
        unpack: from that gradient to rows [N, H].
        rows: rows that it multiplies with the head.
    """

    forward: Callable[[], Tensor]
    hidden: Tensor
    rows: int
    unpack: Callable[[Tensor], Tensor] = lambda gradient: gradient


@dataclass(frozen=True)
class Provider:
    """One way to compute the head.

    Attributes:
        prepare: makes a candidate for a mode, outside the timing.
        products: mode → how many products of 2·NHV FLOP it takes. Modes that are not here it does not have.
        missing: why it cannot run on a problem; None when it can.
        objective: the loss that it computes, by the name that `HeadProblem.loss` knows.
        ours: whether the benchmark must fail when it is wrong.
        checked: whether it has a result to compare.
    """

    prepare: Callable[[HeadProblem, str], Candidate]
    products: Mapping[str, int]
    missing: Callable[[HeadProblem], str | None] = lambda problem: None
    objective: str = "dpo"
    ours: bool = False
    checked: bool = True


def _finish(problem: HeadProblem, mode: str, sums: Tensor) -> Tensor:
    return sums if mode == "forward" else dpo(sums, problem.ref_logps)


def _preference(problem: HeadProblem, mode: str) -> Candidate:
    loss = SequenceLoss(dpo)

    def forward() -> Tensor:
        return linear_preference_loss(
            problem.hidden,
            problem.weight,
            problem.targets,
            problem.layout,
            loss,
            [problem.ref_logps],
            transform=problem.transform,
        ).loss

    return Candidate(forward, problem.hidden, problem.rows)


def _bytes_of_gradient(problem: HeadProblem) -> int:
    gemm = Gemm(problem.weight.dtype, problem.device.type)
    return problem.rows * problem.shape.vocabulary * gemm.factor_dtype.itemsize


def _linear_logps(budget: Callable[[HeadProblem], int], backend: str | None = None):
    def prepare(problem: HeadProblem, mode: str) -> Candidate:
        budget_bytes = budget(problem)
        tiles = "triton" if runs_triton(problem.device) else "torch"  # what "auto" takes for a gradient

        def forward() -> Tensor:
            rows = linear_logps(
                problem.hidden,
                problem.weight,
                problem.targets,
                cu_scores=problem.layout.cu_scores,
                transform=problem.transform,
                budget_bytes=budget_bytes,
                backend=backend or tiles,
            )
            return _finish(problem, mode, rows.sequence_logps)

        return Candidate(forward, problem.hidden, problem.rows)

    return prepare


def _trl(problem: HeadProblem, mode: str) -> Candidate:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def forward() -> Tensor:
        logps, *_ = ChunkedLogProbFunction.apply(
            problem.hidden,
            problem.weight,
            None,
            problem.targets,
            1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            problem.shape.softcap,
            1.0,
            (),
        )
        return _finish(problem, mode, problem.sums(logps))

    return Candidate(forward, problem.hidden, problem.rows)


def _liger_dpo(problem: HeadProblem, mode: str) -> Candidate:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    completions, longest = len(problem.lengths), int(problem.lengths.max())
    first = torch.arange(completions, device=problem.device)
    line = first // 2 + first % 2 * (completions // 2)  # all chosen completions come first, then the rejected
    within = torch.arange(problem.rows, device=problem.device) - problem.layout.cu_scores[problem.completion]
    place = line[problem.completion] * longest + within
    hidden = problem.hidden.new_zeros(completions * longest, problem.shape.hidden)
    hidden[place] = problem.hidden.detach()
    hidden = hidden.view(completions, longest, -1)
    targets = problem.targets.new_full((completions * longest,), -100)
    targets[place] = problem.targets
    targets = targets.view(completions, longest)
    compiled = problem.device.type == "cuda" and problem.rows * problem.shape.vocabulary > _WORTH_COMPILING
    if compiled:  # anew for each problem, and past the limit not at all
        torch._dynamo.config.recompile_limit = 64
    loss = LigerFusedLinearDPOLoss(
        beta=BETA,
        compiled=compiled,
        use_ref_model=False,
        chunk_size=max(1, _LIGER_ROWS // (2 * longest)),
    )

    def forward() -> Tensor:
        value, _ = loss(problem.weight, hidden, targets)
        return value

    return Candidate(forward, hidden, completions * longest, lambda gradient: gradient.flatten(0, 1)[place])


def _liger_ce(problem: HeadProblem, mode: str) -> Candidate:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=problem.shape.softcap, accum_dtype=torch.float32)
    return Candidate(
        lambda: loss(problem.weight, problem.hidden, problem.targets),
        problem.hidden,
        problem.rows,
    )


def _cce(problem: HeadProblem, mode: str) -> Candidate:
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    exact = "CCE_KAHAN_FULL_C_FULL_E"
    variant = (exact if exact in LinearCrossEntropyImpl.__members__ else "CCE").lower()

    def forward() -> Tensor:
        nll = linear_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.targets,
            softcap=problem.shape.softcap,
            reduction="none",
            impl=variant,
        )
        return _finish(problem, mode, problem.sums(-nll.float()))

    return Candidate(forward, problem.hidden, problem.rows)


def _plain(problem: HeadProblem, mode: str) -> Candidate:
    def forward() -> Tensor:
        logits = problem.transform((problem.hidden @ problem.weight.t()).float())
        logps = logits.log_softmax(-1).gather(1, problem.targets[:, None])[:, 0]
        return _finish(problem, mode, problem.sums(logps))

    return Candidate(forward, problem.hidden, problem.rows)


def _bare(problem: HeadProblem, mode: str) -> Candidate:
    gemm = Gemm(problem.weight.dtype, problem.device.type)
    x, w = gemm.factor(problem.hidden.detach()), gemm.factor(problem.weight.detach())
    layout = problem.layout
    if mode == "forward":
        tiles = list(tile_slices(0, problem.rows, tile_rows(problem.rows, w.shape[0], DEFAULT_BUDGET, gemm)))
    else:
        sizes = group_tile_rows(problem.rows, w.shape, DEFAULT_BUDGET, gemm)
        groups = list(group_tiles(layout.host_cu_scores, layout.cu_groups, *sizes))
        assert not any(group.split for group in groups), "a pair fills a tile at most"
        tiles = [group.rows for group in groups]
    memory = TileMemory(gemm, max(rows.stop - rows.start for rows in tiles), w.shape[0], problem.device)
    dweight = w.new_empty(w.shape, dtype=gemm.sum_dtype) if mode == "trainable" else None
    for rows in tiles if mode != "forward" else ():  # GPUs multiply zeros faster: give them a D like any other
        z = gemm.logits(x[rows], w, out=memory.logits(rows.stop - rows.start))
        torch.neg(z.softmax(-1), out=z)
        memory.gradient(z).copy_(z)

    def forward() -> Tensor:
        for rows in tiles:
            z = gemm.logits(x[rows], w, out=memory.logits(rows.stop - rows.start))
            if mode != "forward":
                d = memory.gradient(z)
                gemm.product(d, w)
                if mode == "trainable":
                    gemm.accumulate(dweight, d, x[rows], first=rows.start == 0)
        return problem.ref_logps

    return Candidate(forward, problem.hidden, problem.rows)


def _untiled(problem: HeadProblem, mode: str) -> Candidate:
    gemm = Gemm(problem.weight.dtype, problem.device.type)
    x, w = gemm.factor(problem.hidden.detach()), gemm.factor(problem.weight.detach())
    z = torch.empty(problem.rows, w.shape[0], dtype=gemm.sum_dtype, device=problem.device)
    d = gemm.logits(x, w, out=z).softmax(-1).neg_().to(gemm.factor_dtype) if mode != "forward" else None

    def forward() -> Tensor:
        gemm.logits(x, w, out=z)
        if mode != "forward":
            gemm.product(d, w)
        if mode == "trainable":
            gemm.product(d.t(), x)
        return problem.ref_logps

    return Candidate(forward, problem.hidden, problem.rows)


def _not_on_cpu(*modules: str, dtypes: tuple[torch.dtype, ...] = ()):
    def missing(problem: HeadProblem) -> str | None:
        if not runs_triton(problem.device):
            return "its Triton kernels need a GPU"
        if dtypes and problem.weight.dtype not in dtypes:
            return f"has no backward in {problem.weight.dtype}"
        return import_error(*modules)

    return missing


def _liger_dpo_missing(problem: HeadProblem) -> str | None:
    if problem.shape.softcap is not None:
        return "has no softcap"
    return import_error("liger_kernel.chunked_loss")


def _too_large(what: str, size: Callable[[HeadProblem], int]):
    def missing(problem: HeadProblem) -> str | None:
        needed, free = size(problem), free_memory(problem.device)
        if needed <= free // 3:
            return None
        return f"{what} take {needed / 2**30:.1f} GiB, more than a third of the {free / 2**30:.1f} GiB that are free"

    return missing


_ALL_ONCE = {"trainable": 3, "frozen": 2, "forward": 1}
_LOGITS_TWICE = {"trainable": 4, "frozen": 3, "forward": 1}
_HALF = (torch.bfloat16, torch.float16)

PROVIDERS = {
    "preference": Provider(_preference, {"trainable": 3, "frozen": 2}, ours=True),
    "kept": Provider(
        _linear_logps(lambda problem: max(DEFAULT_BUDGET, _bytes_of_gradient(problem))),
        {"trainable": 3, "frozen": 2},
        _too_large("kept gradients", _bytes_of_gradient),
        ours=True,
    ),
    "recomputed": Provider(_linear_logps(lambda problem: 0), {"trainable": 4, "frozen": 2}, ours=True),
    "forward": Provider(_linear_logps(lambda problem: DEFAULT_BUDGET), {"forward": 1}, ours=True),
    "fused": Provider(
        _linear_logps(lambda problem: DEFAULT_BUDGET, backend="fused"),
        {"forward": 1},
        _not_on_cpu("dpo_fast_kernels.head.linear_logps_fused"),
        ours=True,
    ),
    "trl": Provider(_trl, _LOGITS_TWICE, lambda problem: import_error("trl.trainer.utils")),
    "liger-dpo": Provider(
        _liger_dpo, {"trainable": 3, "frozen": 2}, _liger_dpo_missing, objective="dpo without reference"
    ),
    "liger-ce": Provider(
        _liger_ce,
        {"trainable": 3, "frozen": 2},
        _not_on_cpu("liger_kernel.transformers.fused_linear_cross_entropy"),
        objective="nll",
    ),
    "cce": Provider(_cce, _LOGITS_TWICE, _not_on_cpu("cut_cross_entropy", dtypes=_HALF)),
    "plain": Provider(
        _plain,
        _ALL_ONCE,
        _too_large("fp32 logits", lambda problem: problem.rows * problem.shape.vocabulary * 4),
    ),
    "untiled": Provider(
        _untiled,
        _ALL_ONCE,
        _too_large("logits and softmax", lambda problem: problem.rows * problem.shape.vocabulary * 10),
        checked=False,
    ),
    "bare": Provider(_bare, _ALL_ONCE, checked=False),
}


def solve(candidate: Candidate, problem: HeadProblem, mode: str) -> dict[str, Tensor]:
    """Run a candidate once; return its loss and gradients, or its sequence log-probs in mode "forward"."""
    set_leaves(candidate, problem, mode)
    result = candidate.forward()
    if mode == "forward":
        return {"sequence_logps": result}
    result.backward()
    found = {"loss": result.detach(), "d hidden": candidate.unpack(candidate.hidden.grad)}
    if mode == "trainable":
        found["d weight"] = problem.weight.grad
    return found


def set_leaves(candidate: Candidate, problem: HeadProblem, mode: str) -> None:
    """Require gradients of the leaves that train in a mode, and drop the gradients of the last run."""
    for leaf, trains in ((candidate.hidden, mode != "forward"), (problem.weight, mode == "trainable")):
        leaf.requires_grad_(trains)
        leaf.grad = None
