"""A dataset or a stream in any accepted format → preference groups, as a configuration asks for them.

Also refuses what the data bring and the loss cannot use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from dpo_fast.config import DPOConfig
from dpo_fast.data.prepare import DataSummary, prepare_dataset, prepare_stream
from dpo_fast.errors import InputError
from dpo_fast.losses import SORTED, WITH_OFFSETS, uses


def prepare_preferences(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    config: DPOConfig,
    *,
    vocab_size: int | None,
    name: str,
) -> tuple[Dataset | IterableDataset, DataSummary | None]:
    """Returns the groups, and what became of the rows: None for a stream, whose rows are not known yet.

    Raises:
        ValueError: rows or options that cannot be used; the message names them.
    """
    options = {
        "max_length": config.max_length,
        "truncation_mode": config.truncation_mode,
        "comparisons": config.comparisons,
        "vocab_size": vocab_size,
        "name": name,
    }
    if isinstance(dataset, IterableDataset):
        if config.group_by_prompt:
            raise InputError(f"group_by_prompt: the {name} dataset is a stream, of unknown rows; turn it off")
        groups = prepare_stream(dataset, tokenizer, **options)
        _check_offsets(config.loss_mix, "comparison_offsets" in groups.column_names, name)
        return groups, None
    dataset, summary = prepare_dataset(
        dataset, tokenizer, group_by_prompt=config.group_by_prompt, num_proc=config.dataset_num_proc, **options
    )
    _check_offsets(config.loss_mix, "comparison_offsets" in dataset.column_names, name)
    _check_weights(config.loss_mix, dataset, name)
    return dataset, summary


def _check_offsets(losses: Collection[str], given: bool, name: str) -> None:
    """Refuse offsets that no loss uses."""
    if given and not any(uses(loss, "offsets") for loss in losses):
        raise InputError(
            f"offset: the {name} dataset has offsets, which mean nothing to loss_type={list(losses)}; drop the "
            f"column, or choose from {list(WITH_OFFSETS)}"
        )


def _check_weights(losses: Collection[str], dataset: Dataset, name: str) -> None:
    """Refuses weights that sorting losses cannot tell apart."""
    if set(losses) & set(SORTED):
        weights = {weight for row in dataset["comparison_weights"] for weight in row}
        if len(weights) > 1:
            raise InputError(
                f"weight: the {name} dataset has comparisons of weights {sorted(weights)[:3]}…, and {list(SORTED)} "
                "sort both sides apart, so that none belongs to a comparison any more; weigh all alike, or leave "
                f"these losses out of loss_type={list(losses)}"
            )


def map_datasets(datasets: Any, function: Callable[[Dataset | IterableDataset, str], Dataset | IterableDataset]):
    """Applies `function` to a dataset and its name, or to every one of a dict; None stays None."""
    if isinstance(datasets, dict):
        return {name: function(dataset, name) for name, dataset in datasets.items()}
    return None if datasets is None else function(datasets, "eval")
