"""A head and its score rows to benchmark: the same compacted rows, loss and truth for everyone.

Completions come in pairs, with lengths from a log-normal around a median as in real preference data. Rows resemble a
trained model's: logits spread by 2, and the target's is raised by up to half more than it takes to be likely, so about
a third of the tokens is well predicted. Reference log-probs are the policy's plus noise of 3 nat: no pair is decided.

    loss = mean over pairs of −logσ(β·[(ℓ_w − ℓ_w^ref) − (ℓ_l − ℓ_l^ref)]),   β = 0.1
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast_kernels import LogitTransform, ScoreLayout
from dpo_fast_kernels.specification import linear_logps_reference

BETA = 0.1
MEDIAN_LENGTH, LONGEST = 300, 1024
_SPREAD = 2.0  # of logits
_TRUTH_BLOCK = 1 << 28  # elements of logits that the truth holds at a time


@dataclass(frozen=True)
class HeadShape:
    hidden: int
    vocabulary: int
    softcap: float | None = None

    def small(self) -> HeadShape:
        """Return the same head with so few words that float64 costs nothing."""
        return HeadShape(self.hidden, max(min(self.vocabulary, 503), self.vocabulary // 64), self.softcap)


SHAPES = {
    "llama-3-8b": HeadShape(4096, 128256),
    "qwen2.5-1.5b": HeadShape(1536, 151936),
    "qwen3-4b": HeadShape(2560, 151936),
    "gemma-2-2b": HeadShape(2304, 256000, softcap=30.0),
    "smollm2-135m": HeadShape(576, 49152),
    "tiny": HeadShape(64, 2003),
}


def pair_lengths(rows: int, seed: int = 0) -> list[tuple[int, int]]:
    """Return lengths of pairs of completions that sum to exactly `rows`.

    Raises:
        ValueError: there are too few rows for a pair.
    """
    if rows < 2:
        raise ValueError(f"rows must be at least 2, a pair of one-token completions, got {rows}")
    draw = random.Random(seed)
    median = min(MEDIAN_LENGTH, max(1, rows // 12))
    pairs, left = [], rows
    while left:
        pair = [min(LONGEST, max(1, round(draw.lognormvariate(math.log(median), 0.8)))) for _ in range(2)]
        if left - sum(pair) < 2:  # the last one takes what is left
            chosen = min(left - 1, max(1, round(left * pair[0] / sum(pair))))
            pair = [chosen, left - chosen]
        pairs.append(tuple(pair))
        left -= sum(pair)
    return pairs


def dpo(logps: Tensor, ref_logps: Tensor | float) -> Tensor:
    """Return the mean sigmoid loss of S/2 pairs from their sequence log-probs [S], chosen and rejected in turn."""
    chosen, rejected = (logps - ref_logps).view(-1, 2).unbind(1)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


class HeadProblem:
    """Rows, head and reference log-probs on a device.

    Attributes:
        hidden: [N, H]. weight: [V, H]. targets: int64 [N]. layout: pairs of completions among the rows.
        completion: int64 [N], which completion a row belongs to.
        ref_logps: fp32 [S].
    """

    def __init__(self, shape: HeadShape, rows: int, dtype: torch.dtype, device: torch.device, seed: int = 0):
        self.shape, self.rows, self.device = shape, rows, device
        self.transform = LogitTransform(softcap=shape.softcap)
        generator = torch.Generator(device).manual_seed(seed)
        options = {"generator": generator, "device": device}
        self.layout = ScoreLayout.build(pair_lengths(rows, seed)).to(device)
        self.lengths = self.layout.cu_scores.diff()
        self.completion = torch.arange(len(self.lengths), device=device).repeat_interleave(self.lengths)
        self.targets = torch.randint(shape.vocabulary, (rows,), **options)
        weight = torch.randn(shape.vocabulary, shape.hidden, **options).mul_(_SPREAD / shape.hidden**0.5)
        likely = math.log(shape.vocabulary) + _SPREAD**2 / 2  # the target's logit at a probability of a half
        boost = torch.rand(rows, 1, **options) * (1.5 * likely / _SPREAD**2)
        hidden = torch.randn(rows, shape.hidden, **options).addcmul_(weight[self.targets], boost)
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        del hidden, weight
        with torch.no_grad():
            sums = self.sums(torch.cat([self._token_logps(self.hidden, self.weight, rows) for rows in self._blocks()]))
        self.ref_logps = sums + 3 * torch.randn(len(self.lengths), **options)

    def _blocks(self) -> list[slice]:
        step = max(1, _TRUTH_BLOCK // self.shape.vocabulary)
        return [slice(start, start + step) for start in range(0, self.rows, step)]

    def _token_logps(self, hidden: Tensor, weight: Tensor, rows: slice) -> Tensor:
        return linear_logps_reference(hidden[rows], weight, self.targets[rows], None, self.transform).logps

    def sums(self, logps: Tensor) -> Tensor:
        """Return sequence log-probs [S] of token log-probs [N], differentiable."""
        return logps.new_zeros(len(self.lengths)).index_add(0, self.completion, logps)

    def loss(self, logps: Tensor, objective: str = "dpo") -> Tensor:
        """Return the loss of token log-probs [N]: "dpo", "dpo without reference" or "nll" (their negative mean)."""
        if objective == "nll":
            return -logps.mean()
        return dpo(self.sums(logps), self.ref_logps if objective == "dpo" else 0.0)

    def truth(self, objective: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return loss, sequence log-probs and gradients by plain PyTorch in `dtype`, a block of rows at a time."""
        x, w = (tensor.detach().to(dtype).requires_grad_() for tensor in (self.hidden, self.weight))
        blocks = self._blocks()
        with torch.no_grad():
            logps = torch.cat([self._token_logps(x, w, rows) for rows in blocks])
        loss = self.loss(logps.requires_grad_(), objective)
        (coefficient,) = torch.autograd.grad(loss, logps)
        for rows in blocks:
            (self._token_logps(x, w, rows) * coefficient[rows]).sum().backward()
        sums = self.sums(logps.detach())
        return {"loss": loss.detach(), "sequence_logps": sums, "d hidden": x.grad, "d weight": w.grad}
