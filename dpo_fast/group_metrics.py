"""How well the rewards of K ranked completions agree with their scores, group by group.

    best_of_k     share of groups whose most rewarded completion has the highest score
    kendall_tau   τ_b = (concordant − discordant) / √(pairs with different rewards · pairs with different scores), the
                  mean over groups (Kendall 1945); 1 is the same order, −1 the opposite

Everything is a comparison of all completions of a batch with each other, [S, S], and stays on the device. Completions
without a score (NaN) count for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_metrics(
    rewards: Tensor,  # fp32 [S]
    scores: Tensor,  # fp32 [S]
    groups: Tensor,  # int64 [S], which group each completion belongs to
) -> dict[str, tuple[Tensor, Tensor]]:
    """(numerator, denominator) of both metrics: sums over groups, and the number of groups that have one."""
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
