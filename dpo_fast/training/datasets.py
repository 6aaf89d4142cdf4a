"""The datasets of a run: rows become preference groups, as a configuration asks for them, and get reference log-probs.

rows → `data.prepare` → groups → what the loss cannot use is refused → `reference` → groups with `ref_logps`
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from dpo_fast.config import DPOConfig
from dpo_fast.data.column_choice import choose_columns
from dpo_fast.data.columns import column_names
from dpo_fast.data.prepare import DataSummary, prepare
from dpo_fast.data.values import is_transformed, plain_rows, reading_rows
from dpo_fast.errors import InputError
from dpo_fast.losses import SORTED, WITH_OFFSETS, uses
from dpo_fast.reference.reference import Reference

logger = logging.getLogger(__name__)

AnyDataset = Dataset | IterableDataset


def check_datasets(train_dataset: Any, eval_dataset: Any, columns: Mapping[str, str] | None) -> None:
    """Refuse datasets that cannot be used, as far as that shows before a model is loaded.

    Raises:
        InputError: a dataset is of another kind, or of columns that cannot be read.
    """
    if train_dataset is None:
        raise InputError("train_dataset is None; pass a dataset of preferences")
    if isinstance(train_dataset, dict):
        splits = ", ".join(map(repr, train_dataset))
        raise InputError(
            f"train_dataset is a {type(train_dataset).__name__} with the splits {splits}; give one of them, as in "
            f"train_dataset=splits[{next(iter(train_dataset), 'train')!r}]"
        )
    held_out = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, dataset in [("train", train_dataset), *held_out.items()]:
        if isinstance(dataset, dict):
            raise InputError(
                f"eval_dataset {name!r} is a {type(dataset).__name__} with the splits {', '.join(map(repr, dataset))}; "
                "give datasets and streams, by the name of each"
            )
        if dataset is not None and not isinstance(dataset, AnyDataset):
            raise InputError(
                f"the {name} dataset is a {type(dataset).__name__}; give a datasets.Dataset or a stream, as from "
                "Dataset.from_list(rows)"
            )
        if getattr(dataset, "features", None) is not None and not is_transformed(dataset):
            with reading_rows(name):
                choose_columns(dataset.with_format(None), columns, name)


def prepare_preferences(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    config: DPOConfig,
    *,
    vocab_size: int | None,
    positions: int | None = None,
    name: str,
) -> tuple[AnyDataset, DataSummary | None]:
    """Return the groups of a dataset or a stream, and what became of the rows: None for a stream.

    Raises:
        InputError: rows or options that cannot be used; the message names them.
    """
    groups, summary = prepare(
        dataset,
        tokenizer,
        max_length=config.max_length,
        truncation_mode=config.truncation_mode,
        comparisons=config.comparisons,
        group_by_prompt=config.group_by_prompt,
        columns=config.columns,
        vocab_size=vocab_size,
        positions=positions,
        num_proc=config.dataset_num_proc,
        name=name,
    )
    _check_use(groups, list(config.loss_mix), name)
    return groups, summary


def _check_use(groups: AnyDataset, losses: list[str], name: str) -> None:
    """Refuse offsets that no loss uses, and weights that sorting losses cannot tell apart."""
    if "comparison_offsets" in groups.column_names and not any(uses(loss, "offsets") for loss in losses):
        raise InputError(
            f"offset: the {name} dataset has offsets, which mean nothing to loss_type={losses}; drop the column, or "
            f"choose from {list(WITH_OFFSETS)}"
        )
    if isinstance(groups, Dataset) and any(uses(loss, "sorting") for loss in losses):
        weights = {weight for row in groups["comparison_weights"] for weight in row}
        if len(weights) > 1:
            raise InputError(
                f"weight: the {name} dataset has comparisons of weights {sorted(weights)[:3]}…, and {list(SORTED)} "
                "sort both sides apart, so that none belongs to a comparison any more; weigh all alike, or leave "
                f"these losses out of loss_type={losses}"
            )


def map_datasets(datasets: Any, function: Callable[[AnyDataset, str], AnyDataset]):
    """Apply `function` to a dataset and its name, or to every one of a dict; None stays None."""
    if isinstance(datasets, dict):
        return {name: function(dataset, name) for name, dataset in datasets.items()}
    return None if datasets is None else function(datasets, "eval")


class PreferenceDatasets:
    """What a trainer does with its datasets before it trains on them.

    Args:
        config: the options of the run.
        tokenizer: the model's.
        vocab_size: vocabulary size of the model; an attribute too.
        positions: most tokens that model and reference have positions for; None where nothing bounds them.
        own_reference: whether the reference is a model of its own, which is released after its pass.

    Attributes:
        summaries: what became of the rows, by name of the dataset.
        has_streams: whether a dataset is a stream, whose references are computed as its rows come.
        reference: what gives reference log-probs; None where the loss looks at none.
    """

    def __init__(
        self,
        config: DPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        *,
        positions: int | None = None,
        own_reference: bool,
    ):
        self.summaries: dict[str, DataSummary] = {}
        self.has_streams = False
        self.reference: Reference | None = None
        self.vocab_size = vocab_size
        self._config, self._tokenizer, self._positions = config, tokenizer, positions
        self._own_reference = own_reference

    def tokenized(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Return the groups of a dataset of the constructor, prepared on one process of each machine first."""
        self.has_streams |= isinstance(dataset, IterableDataset)
        return self._tokenized(dataset, name)

    def _tokenized(self, dataset: AnyDataset, name: str) -> AnyDataset:
        with self._config.main_process_first(local=True, desc=f"tokenizing {name}"):
            groups, summary = prepare_preferences(
                dataset,
                self._tokenizer,
                self._config,
                vocab_size=self.vocab_size,
                positions=self._positions,
                name=name,
            )
        if summary is not None:
            self.summaries[name] = summary
            if self._config.should_log:
                logger.log(logging.WARNING if summary.is_notable else logging.INFO, "%s: %s", name, summary)
        return groups

    def lacks_reference(self, dataset: AnyDataset) -> bool:
        """Return whether the loss looks at reference log-probs that `dataset` does not have."""
        return self.reference is not None and self.reference.column not in column_names(dataset)

    def with_reference(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Add reference log-probs, from the store where it has them; of a stream, see to it that they can come."""
        if not self.lacks_reference(dataset):
            return dataset
        if "ref_logps" in column_names(dataset):
            raise InputError(
                f"ref_chosen_logps: the {name} dataset has sums of reference log-probs, and ld_alpha="
                f"{self._config.ld_alpha} needs those of every token; drop ref_chosen_logps and ref_rejected_logps, "
                "and they are computed"
            )
        if isinstance(dataset, IterableDataset):
            self.reference.expect_rows(self._config.dataloader_num_workers)
            return dataset
        return self.reference.with_logps(dataset, name)

    def settle_reference(self) -> None:
        """Before training: keep a copy of the policy for rows that are still to come, or release a model of its own."""
        if self.reference is None:
            return
        if self.has_streams and not self.reference.lasts and not self._own_reference:
            self.reference.keep()
        elif self._own_reference and not self.has_streams:
            self.reference.release()

    def held_out(self, dataset: AnyDataset, name: str, trained: bool) -> AnyDataset:
        """Prepare a dataset that comes after the constructor; `trained` is whether a step has been taken.

        Raises:
            InputError: the store lacks reference log-probs of it, and the reference is not kept.
        """
        dataset = plain_rows(dataset)
        if self.reference is not None and not self.lacks_reference(dataset):
            return dataset
        dataset = self._tokenized(dataset, name)
        if not self.lacks_reference(dataset):
            return dataset
        gone = self._own_reference or (trained and not self.reference.lasts)
        if not gone or self.has_streams:
            return self.with_reference(dataset, name)
        try:
            return self.reference.with_stored_logps(dataset)
        except ValueError as error:
            reference = "ref_model" if self._own_reference else "the policy before training"
            raise InputError(
                f"eval_dataset {name!r} needs reference log-probs that the reference store lacks ({error}), and the "
                f"reference ({reference}) is not kept; give the dataset to DPOTrainer(eval_dataset=…) instead, or fill "
                "the store with `dpo-fast cache`"
            ) from error

    def save_references(self) -> None:
        """Write what the store has in memory alone: the last rows of a stream."""
        if self.reference is not None and self.has_streams:
            self.reference.store.save()
