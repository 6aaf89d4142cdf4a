"""Preference groups: a prompt, K ≥ 2 completions and the comparisons between them.

A DPO pair is the group with K = 2 and one comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Layout = Literal["shared", "padded"]
ComparisonChoice = Literal["all_pairs", "best_vs_rest", "best_vs_worst"]


@dataclass(frozen=True, slots=True)
class PreferenceGroup:
    """One prompt, its completions and what is known about their order.

    Attributes:
        prompt_ids: token ids that all completions continue; may be empty.
        completion_ids: token ids of each completion, K of them.
        comparisons: (winner, loser) pairs of indices into `completion_ids`.
        comparison_weights: one non-negative weight a comparison.
        context_lengths: how many leading tokens of each completion are context that is read but not scored. Zero unless
            truncation from the left cut the completions' prompts differently, so that they no longer share one.
        ref_logps: reference log-prob of each completion, in nats, where it is known.
        ref_token_logps: reference log-prob of each scored token of each completion, where a loss needs parts of them.
        comparison_offsets: by how much the winner's reward β(ℓ − ℓ_ref) should exceed the loser's, one a comparison,
            where the data say so (ODPO, arXiv 2402.10571).
        completion_scores: score of each completion, higher is better, where the data rank completions so.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[Sequence[int]]
    comparisons: Sequence[tuple[int, int]] = ((0, 1),)
    comparison_weights: Sequence[float] = (1.0,)
    context_lengths: Sequence[int] | None = None
    ref_logps: Sequence[float] | None = None
    ref_token_logps: Sequence[Sequence[float]] | None = None
    comparison_offsets: Sequence[float] | None = None
    completion_scores: Sequence[float] | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> PreferenceGroup:
        """Reads a row of a tokenised dataset (columns named as the attributes)."""
        return cls(**{field.name: row[field.name] for field in dataclasses.fields(cls) if field.name in row})

    @property
    def contexts(self) -> Sequence[int]:
        return self.context_lengths or [0] * len(self.completion_ids)

    def num_tokens(self, layout: Layout = "shared") -> int:
        """Token positions that this group occupies when it is packed alone."""
        return num_tokens(len(self.prompt_ids), [len(ids) for ids in self.completion_ids], layout)


def num_tokens(prompt: int, completions: Sequence[int], layout: Layout = "shared") -> int:
    """Return the token positions of a group by itself, from the lengths of its prompt and its completions."""
    return prompt + sum(completions) if layout == "shared" else (prompt + max(completions)) * len(completions)


def padded_token_count(groups: Sequence[PreferenceGroup]) -> int:
    """Return the positions of a batch without packing: two rows per comparison, padded to the longest row."""
    rows = 2 * sum(len(group.comparisons) for group in groups)
    return rows * max(len(group.prompt_ids) + max(map(len, group.completion_ids)) for group in groups)
