"""Token positions of a dataset, counted exactly without running a model.

A usual trainer runs two rows `[prompt | completion | padding]` per comparison, as long as the longest row of the batch.
Its positions per epoch are those that run here, packed and with each prompt once, plus three kinds of waste:

    usual = packed + repeated prompts + repeated completions + padding

Completions repeat only where one stands in several comparisons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import Trainer

from dpo_fast.batches.groups import PreferenceGroup, padded_token_count
from dpo_fast.config import DPOConfig


class Lengths(NamedTuple):
    """Lengths in tokens; each figure is the length of a row that is there."""

    median: int
    percent_90: int
    longest: int


@dataclass(frozen=True)
class SharedPrompts:
    """Effect of merging groups of the same prompt.

    Attributes:
        groups: number of groups whose prompt another group has too.
        merged_groups: number of groups that are left after merging.
        merged_positions: packed token positions per epoch after merging; equal completions of a prompt run once.
    """

    groups: int
    merged_groups: int
    merged_positions: int


@dataclass(frozen=True)
class Positions:
    """Counts over one epoch; see the module's docstring."""

    groups: int
    completions: int
    comparisons: int
    usual: int
    packed: int
    repeated_prompts: int
    repeated_completions: int
    padding: int
    prompts: Lengths
    completion_lengths: Lengths
    shared_prompts: SharedPrompts

    @property
    def ratio(self) -> float:
        return self.usual / self.packed

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self) | {"ratio": self.ratio}
        return values | {name: values[name]._asdict() for name in ("prompts", "completion_lengths")}


def lengths_only(dataset: Dataset) -> list[PreferenceGroup]:
    """Return the groups of a prepared dataset with ranges in place of token ids: all that counting needs."""
    return [
        PreferenceGroup(
            range(len(prompt)), [range(len(ids)) for ids in completions], comparisons, context_lengths=contexts
        )
        for prompt, completions, comparisons, contexts in _token_rows(dataset)
    ]


def count_positions(dataset: Dataset, groups: Sequence[PreferenceGroup], batches: Sequence[Sequence[int]]) -> Positions:
    """Count the positions of an epoch.

    Args:
        dataset: prepared groups.
        groups: the same groups, from `lengths_only`.
        batches: indices of groups that a usual trainer pads together; all of them are one epoch.
    """
    packed = prompts = completions = rows = usual = 0
    for batch in batches:
        members = [groups[index] for index in batch]
        usual += padded_token_count(members)
        for group in members:
            prompt = len(group.prompt_ids)
            lengths = [len(ids) for ids in group.completion_ids]
            compared = sum(lengths[index] for pair in group.comparisons for index in pair)
            packed += group.num_tokens()
            prompts += (2 * len(group.comparisons) - 1) * prompt
            completions += compared - sum(lengths)
            rows += 2 * len(group.comparisons) * prompt + compared
    epoch = [groups[index] for batch in batches for index in batch]
    return Positions(
        groups=len(epoch),
        completions=sum(len(group.completion_ids) for group in epoch),
        comparisons=sum(len(group.comparisons) for group in epoch),
        usual=usual,
        packed=packed,
        repeated_prompts=prompts,
        repeated_completions=completions,
        padding=usual - rows,
        prompts=_lengths([len(group.prompt_ids) + max(group.contexts) for group in groups]),
        completion_lengths=_lengths(
            [
                len(ids) - context
                for group in groups
                for ids, context in zip(group.completion_ids, group.contexts, strict=True)
            ]
        ),
        shared_prompts=_shared_prompts(dataset),
    )


def _token_rows(dataset: Dataset) -> Iterator[tuple[np.ndarray, list[np.ndarray], list, list[int]]]:
    """Yield token ids of prompt and completions, comparisons and context lengths of every group, as arrays."""
    columns = ["prompt_ids", "completion_ids", "comparisons", "context_lengths"]
    for batch in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for prompt, completions, comparisons, contexts in zip(*(batch[column] for column in columns), strict=True):
            ids = [completion.values.to_numpy() for completion in completions]
            yield prompt.values.to_numpy(), ids, [tuple(pair) for pair in comparisons.as_py()], contexts.as_py()


def _lengths(values: Sequence[int]) -> Lengths:
    median, percent_90 = np.quantile(values, [0.5, 0.9], method="inverted_cdf")
    return Lengths(int(median), int(percent_90), max(values))


def _shared_prompts(dataset: Dataset) -> SharedPrompts:
    """Count what merging would do; groups with no prompt to share stay apart, as `group_by_prompt` leaves them."""
    members: Counter[tuple] = Counter()
    completions: set[tuple] = set()
    positions = 0
    for index, (prompt, ids, _, contexts) in enumerate(_token_rows(dataset)):
        alone = not len(prompt) or any(contexts)
        key = (index,) if alone else ("prompt", hash(prompt.tobytes()))
        positions += 0 if key in members else len(prompt)
        members[key] += 1
        for completion in ids:
            entry = (*key, hash(completion.tobytes()))
            positions += 0 if entry in completions else len(completion)
            completions.add(entry)
    return SharedPrompts(
        groups=sum(count for count in members.values() if count > 1),
        merged_groups=len(members),
        merged_positions=positions,
    )


def epoch_batches(groups: int, config: DPOConfig) -> list[list[int]]:
    """Return the first epoch of a run on so many groups: their indices, a list per micro-batch."""
    trainer = Trainer(nn.Linear(1, 1), config, lambda indices: {"groups": indices}, range(groups))
    return [batch["groups"] for batch in trainer.get_train_dataloader()]


def first_steps(batches: Sequence[Sequence[int]], groups_per_step: int, count: int) -> list[list[int]]:
    """Return the groups of the first `count` steps of equal size; a dataset too small for them starts over."""
    order = [index for batch in batches for index in batch]
    needed = groups_per_step * count
    order = (order * -(-needed // len(order)))[:needed]
    return [order[start : start + groups_per_step] for start in range(0, needed, groups_per_step)]
