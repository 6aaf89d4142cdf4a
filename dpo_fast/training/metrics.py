"""Metrics that stay on the device until they are logged.

A step adds tensors; nothing is read back before `reduce`. The value of a metric is the mean over batches of its mean
within a batch, as TRL logs it; a batch that was split into packs counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dpo_fast.batches.packing import PackedBatch
from dpo_fast.losses import Comparisons
from dpo_fast.model.forward import PackedOutput

Gather = Callable[[Tensor], Tensor]

STATISTICS = ("entropy", "mean_logit", "is_top1")  # statistics of the head that metrics are made of

NAMES = (
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins", "best_of_k", "kendall_tau")),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
    *("entropy", "mean_token_accuracy", "aux_loss"),
)


def batch_metrics(
    output: PackedOutput,
    packed: PackedBatch,
    comparisons: Comparisons,
    beta: float,
) -> dict[str, tuple[Tensor, Tensor]]:
    """(numerator, denominator) of every metric over one pack; numerators and denominators of packs add up.

    Rewards, log-probs and accuracies are means over comparisons, weighted. Entropy is a mean over all score rows,
    logits and token accuracy over those of winners and losers; a completion that wins or loses several comparisons
    counts each time. Groups with scores add how well the rewards agree with them.
    """
    winners, losers = packed.comparisons.unbind(1)
    weights = packed.comparison_weights
    total = weights.sum()
    chosen, rejected = beta * comparisons.winner_ratios, beta * comparisons.loser_ratios
    margins = chosen - rejected

    def mean(values: Tensor) -> tuple[Tensor, Tensor]:
        return (values * weights).sum(), total

    metrics = {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/accuracies": mean((margins > 0).float()),
        "rewards/margins": mean(margins),
        "logps/chosen": mean(comparisons.winner_logps),
        "logps/rejected": mean(comparisons.loser_logps),
    }
    if output.entropy is not None:
        tokens = packed.completion_sums(packed.cu_scores.diff()).float()
        logits = _completion_sums(output.mean_logit, packed)
        top1 = _completion_sums(output.is_top1.float(), packed)

        def token_mean(sums: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
            return (sums[side] * weights).sum(), (tokens[side] * weights).sum()

        metrics |= {
            "entropy": (output.entropy.sum(), tokens.sum()),
            "logits/chosen": token_mean(logits, winners),
            "logits/rejected": token_mean(logits, losers),
            "mean_token_accuracy": token_mean(top1, winners),
        }
    if packed.completion_scores is not None:
        rewards = packed.completion_sums(output.logps)
        if packed.ref_logps is not None:
            rewards = rewards - packed.ref_logps.reshape(len(rewards), -1).sum(dim=1)
        metrics |= group_metrics(rewards, packed.completion_scores, packed.completion_groups)
    if output.aux_loss is not None:
        metrics["aux_loss"] = (output.aux_loss, torch.ones_like(output.aux_loss))
    return {name: (numerator.detach(), denominator) for name, (numerator, denominator) in metrics.items()}


def _completion_sums(values: Tensor, packed: PackedBatch) -> Tensor:
    """Sums over the score rows of each completion: [N] → [S]."""
    return packed.completion_sums(torch.segment_reduce(values, "sum", offsets=packed.cu_scores, unsafe=True))


class MetricAccumulator:
    """Collects metrics over batches; every value is a device scalar.

    Numerators and denominators of a batch add up over its packs, and over ranks, before they are divided. A batch that
    has nothing which a metric looks at is left out of that metric's mean.
    """

    def __init__(self, device: torch.device) -> None:
        self._nothing = torch.zeros((), device=device)
        self._batch: dict[str, tuple[Tensor, Tensor]] = {}
        self._closed: list[Tensor] = []  # fp32 [2 · names] of every batch, the same names on all ranks

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Adds one pack to the current batch."""
        for name, (numerator, denominator) in metrics.items():
            if name in self._batch:
                numerator, denominator = self._batch[name][0] + numerator, self._batch[name][1] + denominator
            self._batch[name] = (numerator, denominator)

    def end_batch(self) -> None:
        """Closes the current batch, which may have had no pack on this rank."""
        parts = [self._batch.get(name, (self._nothing, self._nothing)) for name in NAMES]
        self._closed.append(torch.stack([value.float() for part in parts for value in part]))
        self._batch = {}

    def clear(self) -> None:
        """Forget all batches."""
        self._batch, self._closed = {}, []

    def reduce(self, gather: Gather = lambda values: values[None]) -> dict[str, float]:
        """Return the means over batches since the last call, in one transfer to the host.

        Args:
            gather: stacks the values of all ranks, [ranks, …]; all ranks call it together.
        """
        values, known = self._resolve(gather)
        means = values.sum(dim=0) / known.sum(dim=0)
        return {name: mean for name, mean, has in zip(NAMES, means.tolist(), known.any(dim=0), strict=True) if has}

    def batches(self, gather: Gather = lambda values: values[None]) -> list[dict[str, float]]:
        """Return the values of each batch since the last call, likewise."""
        values, known = self._resolve(gather)
        rows = zip(values.tolist(), known.tolist(), strict=True)
        return [{name: value for name, value, has in zip(NAMES, row, given, strict=True) if has} for row, given in rows]

    def _resolve(self, gather: Gather) -> tuple[Tensor, Tensor]:
        """Return the values, fp32 [batches, names], and which of them there are; both are on the host."""
        if not self._closed:
            return torch.zeros(0, len(NAMES)), torch.zeros(0, len(NAMES), dtype=torch.bool)
        sums = gather(torch.stack(self._closed)).sum(dim=0).unflatten(1, (-1, 2)).cpu()  # [batches, names, 2]
        self._closed = []
        known = sums[..., 1] > 0
        return torch.where(known, sums[..., 0] / sums[..., 1], 0.0), known


def group_metrics(
    rewards: Tensor,  # fp32 [S]
    scores: Tensor,  # fp32 [S]
    groups: Tensor,  # int64 [S], which group each completion belongs to
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return how well the rewards of K ranked completions agree with their scores, group by group.

        best_of_k     share of groups whose most rewarded completion has the highest score
        kendall_tau   τ_b = (concordant − discordant) / √(pairs with different rewards · pairs with different scores),
                      the mean over groups (Kendall 1945); 1 is the same order, −1 the opposite

    Everything is a comparison of all completions of a batch with each other, [S, S], and stays on the device.
    Completions without a score (NaN) count for nothing.

    Returns:
        (numerator, denominator) of both metrics: sums over groups, and the number of groups that have one.
    """
    scored = ~scores.isnan()
    same = (groups[:, None] == groups) & scored[:, None] & scored
    size = same.sum(dim=1).clamp(min=1)

    def is_best(values: Tensor) -> Tensor:
        return values >= torch.where(same, values, -torch.inf).amax(dim=1)

    most_rewarded = is_best(rewards) & scored
    hit = (most_rewarded & is_best(scores)).float()
    tied = (same & most_rewarded).sum(dim=1).clamp(min=1)  # completions that share the highest reward
    ranked = torch.where(scored & (size > 1), 1 / size, 0.0)  # adds up to 1 over a group that can be ranked

    def signs(values: Tensor) -> Tensor:
        return torch.sign(values[:, None] - values).nan_to_num() * same

    by_reward, by_score = signs(rewards), signs(scores)
    agreement, reward_pairs, score_pairs = (
        same.float() @ pairs.sum(dim=1) for pairs in (by_reward * by_score, by_reward.abs(), by_score.abs())
    )
    defined = ranked * (score_pairs > 0)
    tau = agreement / (reward_pairs * score_pairs).sqrt().clamp(min=1e-6)
    return {
        "rewards/best_of_k": ((hit / tied * (size > 1)).sum(), ranked.sum()),
        "rewards/kendall_tau": ((tau * defined).sum(), defined.sum()),
    }
