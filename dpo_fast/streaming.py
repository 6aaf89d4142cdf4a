"""A stream of rows → a stream of preference groups, and the batches of those, with reference log-probs.

Rows are tokenised, cut and scored as training asks for them, so a stream has no account of what was dropped, and what
depends on all rows at once is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from datasets import Features, IterableDataset
from transformers import PreTrainedTokenizerBase

from dpo_fast.batches.groups import ComparisonChoice
from dpo_fast.columns import ACCOUNT, REFERENCE_FIELDS, column_names, group_features, tokenized_features
from dpo_fast.dealing import deal_groups
from dpo_fast.formats import PREPARED, detect_format
from dpo_fast.tokenization import TokenizeRows
from dpo_fast.truncation import TruncateRows

if TYPE_CHECKING:
    from dpo_fast.reference.model import Reference

ROWS_AHEAD = 64  # that are tokenised together, and a rank's that the reference scores together
Row = dict[str, Any]


def prepare_stream(
    dataset: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    comparisons: ComparisonChoice = "all_pairs",
    vocab_size: int | None = None,
    name: str = "train",
) -> IterableDataset:
    """Does to a stream what `data.prepare_dataset` does to a dataset, row by row; the arguments are the same.

    Raises:
        ValueError: the columns make no known format. While the stream is read, also a row that is not as described, or
            one that was cut although it brings reference log-probs.
    """
    columns = column_names(dataset)
    if not columns:
        raise ValueError(f"dataset: the {name} stream has no rows; it must have at least one")
    source = detect_format(columns)
    rows = dataset.select_columns([column for column in columns if column in source.columns])
    if source is not PREPARED:
        rows = rows.map(
            TokenizeRows(tokenizer, source, name),
            batched=True,
            batch_size=ROWS_AHEAD,
            with_indices=True,
            remove_columns=[column for column in columns if column in source.columns],
            features=tokenized_features(columns),
        )
        rows = rows.remove_columns("lost_prompt")
    step = TruncateRows(
        max_length=max_length,
        truncation_mode=truncation_mode,
        comparisons="all_pairs" if source is PREPARED else comparisons,
        vocab_size=vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        name=name,
    )
    features = group_features(rows.column_names or columns)
    rows = rows.map(step, batched=True, batch_size=ROWS_AHEAD, with_indices=True, features=Features(features | ACCOUNT))
    return rows.filter(_is_usable).remove_columns(list(ACCOUNT))


def _is_usable(row: Row) -> bool:
    supplied = [field for field in REFERENCE_FIELDS if row.get(field) is not None]
    if row["comparisons"] and row["truncated"] and supplied:
        raise ValueError(
            "ref_chosen_logps: a row of the stream was cut to max_length, and its reference log-probs are those of the "
            "whole; raise max_length, or leave the columns out to have them computed"
        )
    return bool(row["comparisons"])


class StreamBatches(torch.utils.data.IterableDataset):
    """What one rank takes of every batch of a stream: rows that cost as much as any other rank's.

    Every rank reads all rows and deals them, so that all agree without a word; the reference runs on a rank's own.

    Args:
        groups: as `prepare_stream` returns them.
        batch_size: of all ranks together.
        cost: of a group, from the tokens of its prompt and of its completions.
        accelerator: says which rank this is.
        reference: runs on about 64 rows at a time; None where they have reference log-probs, or need none.
    """

    def __init__(
        self,
        groups: IterableDataset,
        batch_size: int,
        cost: Callable[[int, list[int]], int],
        accelerator: Accelerator,
        reference: Reference | None = None,
    ):
        self.groups, self.batch_size, self.cost, self.reference = groups, batch_size, cost, reference
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes

    def set_epoch(self, epoch: int) -> None:
        self.groups.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Row]]:
        """Yields batches of rows, each with its `position` in the batch of all ranks."""
        if self.reference is not None:
            self.reference.share_rows()  # another epoch may deal them otherwise
        rows = iter(self.groups)
        batches_ahead = max(1, ROWS_AHEAD * self.ranks // self.batch_size)
        while batches := [batch for _ in range(batches_ahead) if (batch := list(islice(rows, self.batch_size)))]:
            hands = [self._hand(batch) for batch in batches]
            own = [row for hand in hands for row in hand]
            own = iter(own if self.reference is None else self.reference.with_logps_of_rows(own))
            for hand in hands:
                yield list(islice(own, len(hand)))

    def _hand(self, batch: list[Row]) -> list[Row]:
        costs = [self.cost(len(row["prompt_ids"]), [len(ids) for ids in row["completion_ids"]]) for row in batch]
        return [{**batch[i], "position": i} for i in deal_groups(costs, self.ranks)[self.rank]]
