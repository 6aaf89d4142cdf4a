"""Rows of a dataset or a stream → tokenised preference groups, with an account of what was dropped.

    choose     `column_choice`: which columns are read as which of ours
    read       `formats`: a row of any accepted format → prompt, completions, comparisons
    tokenize   `tokenization`: → whole preference groups
    merge      with group_by_prompt: groups with the same prompt become one, equal completions become one
    truncate   `truncation`: → groups that fit max_length, without what carries no signal

Which comparisons of ranked completions are made is decided row by row, after tokenization: scores of different rows
need not be on one scale, so rows of one prompt are merged with the comparisons that each of them has by itself.

Every step is a cached `datasets` map, so a second run with the same tokenizer reads the tokens from disk, whatever its
max_length and comparisons.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase

from dpo_fast.batches.groups import ComparisonChoice
from dpo_fast.data.column_choice import choose_columns, described
from dpo_fast.data.columns import (
    ACCOUNT,
    COUNTS,
    REFERENCE_FIELDS,
    Row,
    group_features,
    tokenized_features,
)
from dpo_fast.data.formats import PREPARED
from dpo_fast.data.merging import merge_by_prompt
from dpo_fast.data.special_tokens import CURE
from dpo_fast.data.tokenization import TokenizeRows
from dpo_fast.data.truncation import (
    COMPARISON_CHOICES,
    TRUNCATION_MODES,
    TruncateRows,
)
from dpo_fast.data.values import plain_rows, reading_rows
from dpo_fast.errors import InputError

logger = logging.getLogger(__name__)

ROWS_AHEAD = 64  # rows of a stream that are tokenised together, and those of a rank that the reference scores together
MOST_UNUSED = 100_000  # rows of a stream, one after the other, of which none is usable
# What makes rows usable.
USABLE = "raise max_length where prompts fill it, else give completions that differ and weights above 0"


@dataclass(frozen=True)
class DataSummary:
    """What `prepare_dataset` made of a dataset.

    Attributes:
        rows: rows that went in.
        groups, completions, comparisons: what came out.
        dropped: reason → rows dropped. A reason that ends in "in a group that stays" counts single comparisons.
        truncated: completions that exceeded max_length together with their prompt, so that either was cut.
        lost_eos: completions that lost their last end-of-sequence token in that cut.
        repeated_bos, repeated_eos: rows that hold the token more often than the tokenizer or the chat template adds it.
        mapped: our names of columns that are read under another name by themselves → their names.
        ignored: columns that are not read.
        kept: which rows (merged ones, if rows were merged) the groups came from, int64 [groups].
    """

    rows: int
    groups: int
    completions: int
    comparisons: int
    dropped: dict[str, int]
    truncated: int
    lost_eos: int
    repeated_bos: int = 0
    repeated_eos: int = 0
    mapped: Mapping[str, str] = field(default_factory=dict, compare=False)
    ignored: tuple[str, ...] = field(default=(), compare=False)
    kept: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def is_notable(self) -> bool:
        """Whether rows do not train as they are, or are read in a way that nobody asked for."""
        return bool(self.dropped or self.truncated or self.repeated_bos or self.repeated_eos or self.mapped)

    def __str__(self) -> str:
        made = f"{self.groups} groups, {self.completions} completions, {self.comparisons} comparisons"
        text = f"{self.rows} rows → {made}"
        if self.dropped:
            text += f"; dropped: {_listed(self.dropped)}"
        if self.truncated:
            text += f"\n{self.truncated} completions cut to max_length, {self.lost_eos} of them lost their EOS token"
        for token, count in (("BOS", self.repeated_bos), ("EOS", self.repeated_eos)):
            if count:
                text += f"\n{count} rows hold the {token} token {CURE}"
        return "\n".join([text, *described(self.mapped, self.ignored)])


def prepare(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    comparisons: ComparisonChoice = "all_pairs",
    group_by_prompt: bool = False,
    columns: Mapping[str, str] | None = None,
    vocab_size: int | None = None,
    positions: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset | IterableDataset, DataSummary | None]:
    """Turn rows of any accepted format into preference groups, one per row, in the columns of `dpo_fast.data.columns`.

    A dataset of prepared groups passes through: only what exceeds `max_length` is cut. Rows of a stream are tokenised
    and cut as training asks for them, so there is no account of what was dropped.

    Args:
        dataset: one split, in a format that `dpo_fast.data.formats` describes.
        tokenizer: the model's. Plain text needs its `eos_token`, conversations its `chat_template`.
        max_length: most tokens of prompt+completion, at least 2. None keeps everything.
        truncation_mode: `keep_start` or `keep_end` of prompt+completion.
        comparisons: which ones a row of scores or ranks yields: `all_pairs` of different scores, `best_vs_rest` or
            `best_vs_worst`; of completions that share the highest or the lowest score, each. Pairs, comparisons that
            the rows list and prepared groups stay as given.
        group_by_prompt: merge rows whose prompts have the same tokens. A comparison that occurs twice weighs twice, a
            completion that is scored twice has the mean score. Not for streams.
        columns: our names of columns → those of the dataset, where they differ. With `prompt` among them, no other
            column belongs to the prompt; with `system`, rows of text become conversations.
        vocab_size: vocabulary size of the model; a token id beyond it is an error.
        positions: most tokens that the model has positions for; a `max_length` beyond it, or a row without a
            `max_length`, is an error. None where nothing bounds them.
        num_proc: number of processes to work in; without effect on a stream.
        name: name of the dataset, for progress bars and messages.

    Returns:
        The groups, and what became of the rows: None for a stream, whose rows are not known yet. `ref_logps` are there
        when the rows supplied `ref_chosen_logps` and `ref_rejected_logps`, unless a row was cut or merged;
        `comparison_offsets` when they supplied `offset`; `completion_scores` when they supplied `scores`, or `ranks`,
        which turn into their negatives.

    Raises:
        InputError: an argument, a column, or a row is not as described, or no row is usable. While a stream is read,
            also a row that was cut although it brings reference log-probs.
    """
    _check_arguments(dataset, max_length, truncation_mode, comparisons, group_by_prompt, name)
    if positions is not None and max_length is not None and max_length > positions:
        raise InputError(
            f"max_length: {max_length} exceeds the {positions} positions that the model has learned; set "
            f"max_length={positions} or less"
        )
    with reading_rows(name):
        rows = plain_rows(dataset)
        chosen = choose_columns(rows, columns, name)
        used = list(chosen.names.values())
        if rows.features is None:
            rows = rows.map(functools.partial(_with_all_of, used))
        rows = rows.select_columns(used)
        apply = functools.partial(_apply, num_proc=num_proc, name=name)
        checked = chosen.format is not PREPARED  # then groups come from `TokenizeRows`, which checks what they hold
        if checked:
            features = tokenized_features(chosen.names)
            rows = apply(rows, TokenizeRows(tokenizer, chosen, name), used, features, "Tokenizing")
            if isinstance(rows, Dataset):
                _warn_of_lost_prompts(list(rows["lost_prompt"]), name)
            rows = rows.remove_columns("lost_prompt")
        choice = "all_pairs" if chosen.format is PREPARED else comparisons
        if group_by_prompt:
            rows, choice = merge_by_prompt(rows, choice, num_proc, checked, name), "all_pairs"
        features = group_features(rows.column_names or chosen.names)
        cut = TruncateRows(
            max_length=max_length,
            truncation_mode=truncation_mode,
            comparisons=choice,
            vocab_size=vocab_size,
            positions=positions,
            tokenizer=tokenizer,
            source=chosen.format,
            checked=checked or group_by_prompt,
            name=name,
        )
        rows = apply(rows, cut, rows.column_names or [], Features(features | ACCOUNT), "Truncating")
        if isinstance(rows, IterableDataset):
            if lines := described(chosen.mapped, chosen.ignored):
                logger.log(logging.WARNING if chosen.mapped else logging.INFO, "%s stream: %s", name, "\n".join(lines))
            return rows.filter(_Usable(name)).remove_columns(list(ACCOUNT)), None
        groups, summary = _usable(rows, features, len(dataset), max_length, name)
        return groups, replace(summary, mapped=chosen.mapped, ignored=chosen.ignored)


def prepare_dataset(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, **options: Any
) -> tuple[Dataset, DataSummary]:
    """Do what `prepare` does, to a dataset alone: a stream is refused. The options are those of `prepare`."""
    if isinstance(dataset, IterableDataset | IterableDatasetDict):
        raise InputError(
            f"dataset: the {options.get('name', 'train')} dataset is a stream ({type(dataset).__name__}); take "
            "dpo_fast.data.prepare.prepare, or load it without streaming=True"
        )
    return prepare(dataset, tokenizer, max_length=max_length, **options)


def _check_arguments(
    dataset: Any,
    max_length: int | None,
    truncation_mode: str,
    comparisons: str,
    group_by_prompt: bool,
    name: str,
) -> None:
    """Refuse arguments that cannot be used."""
    if not isinstance(dataset, Dataset | IterableDataset):
        splits = f" with the splits {', '.join(map(str, dataset))}; choose one" if isinstance(dataset, dict) else ""
        raise InputError(f"dataset: expected a datasets.Dataset, got {type(dataset).__name__}{splits}")
    if truncation_mode not in TRUNCATION_MODES:
        raise InputError(f"truncation_mode: {truncation_mode!r} is unknown; use one of {', '.join(TRUNCATION_MODES)}")
    if comparisons not in COMPARISON_CHOICES:
        raise InputError(f"comparisons: {comparisons!r} is unknown; use one of {', '.join(COMPARISON_CHOICES)}")
    if max_length is not None and max_length < 2:
        raise InputError(
            f"max_length: {max_length} leaves no room for a prompt and a completion; use 2 or more, or None"
        )
    if isinstance(dataset, IterableDataset) and group_by_prompt:
        raise InputError(f"group_by_prompt: the {name} dataset is a stream, of unknown rows; turn it off")


def _with_all_of(columns: list[str], row: Row) -> Row:
    """Return None in the columns that a row of a stream lacks, for the checks to name them."""
    return {column: row.get(column) for column in columns}


def _apply(
    rows: Dataset | IterableDataset,
    step: TokenizeRows | TruncateRows,
    replaced: list[str],
    features: Features,
    verb: str,
    *,
    num_proc: int | None,
    name: str,
) -> Dataset | IterableDataset:
    """Replace the columns `replaced` of all rows by what `step` makes of them."""
    options = {"batched": True, "with_indices": True, "remove_columns": replaced, "features": features}
    if isinstance(rows, IterableDataset):
        return rows.map(step, batch_size=ROWS_AHEAD, **options)
    return rows.with_format(None).map(step, num_proc=num_proc, desc=f"{verb} {name} dataset", **options)


def _warn_of_lost_prompts(ends: list[str], name: str) -> None:
    """Say so where the end of a prompt is tokenised differently when a completion follows."""
    lost = [text for text in ends if text]
    if lost:
        logger.warning(
            "%s dataset: in %d of %d rows the end of the prompt (%r in the first) is tokenised differently when a "
            "completion follows, so it is left out and the completions start there; at inference the model sees it. "
            "End prompts on a token boundary, or use a chat template that renders a prompt alike in both cases.",
            name,
            len(lost),
            len(ends),
            lost[0],
        )


def _usable(
    rows: Dataset, features: Features, given: int, max_length: int | None, name: str
) -> tuple[Dataset, DataSummary]:
    """Return the rows that hold a group, and the account of all."""
    summary, kept = _account(rows, given)
    if not summary.groups:
        raise InputError(
            f"dataset: none of the {summary.rows} rows of the {name} dataset is usable ({_listed(summary.dropped)}); "
            f"{USABLE} (max_length is {max_length})"
        )
    if summary.truncated and set(REFERENCE_FIELDS) & set(features):
        logger.warning(
            "%s dataset: its reference log-probs are not used, because %d completions were cut to max_length",
            name,
            summary.truncated,
        )
        features = {field: feature for field, feature in features.items() if field not in REFERENCE_FIELDS}
    if len(kept) < len(rows):
        rows = rows.select(kept)
    return rows.select_columns(list(features)), summary


def _account(truncated: Dataset, rows: int) -> tuple[DataSummary, list[int]]:
    """The summary, and the rows that hold a group."""
    table = truncated.select_columns(["completion_ids", "comparisons", *ACCOUNT]).with_format("arrow")
    counts = dict.fromkeys(("completion_ids", "comparisons", *COUNTS), 0)
    kept: list[int] = []
    reasons: Counter[str] = Counter()
    start = 0
    for batch in table.iter(batch_size=10_000):
        comparisons = batch["comparisons"].combine_chunks().value_lengths().to_numpy()
        kept += (np.flatnonzero(comparisons) + start).tolist()
        counts["comparisons"] += int(comparisons.sum())
        counts["completion_ids"] += int(batch["completion_ids"].combine_chunks().value_lengths().to_numpy().sum())
        for column in COUNTS:
            counts[column] += int(batch[column].to_numpy().sum())
        reasons.update(reason for row in batch["reasons"].to_pylist() for reason in row)
        start += len(batch)
    summary = DataSummary(
        rows=rows,
        groups=len(kept),
        completions=counts["completion_ids"],
        comparisons=counts["comparisons"],
        dropped=dict(reasons),
        **{name: counts[name] for name in COUNTS},
        kept=np.array(kept, np.int64),
    )
    return summary, kept


def _listed(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} × {reason}" for reason, count in dropped.items())


class _Usable:
    """Whether a row of a stream holds a group; says once that text brings along what is added to it.

    Raises:
        InputError: a row was cut although it brings reference log-probs, or none of very many rows is usable.
    """

    def __init__(self, name: str):
        self.name, self.said, self.unused = name, False, Counter()

    def __call__(self, row: Row) -> bool:
        supplied = [field for field in REFERENCE_FIELDS if row.get(field) is not None]
        if row["comparisons"] and row["truncated"] and supplied:
            raise InputError(
                "ref_chosen_logps: a row of the stream was cut to max_length, and its reference log-probs are those of "
                "the whole; raise max_length, or leave the columns out to have them computed"
            )
        repeated = [token for token in ("BOS", "EOS") if row[f"repeated_{token.lower()}"]]
        if repeated and not self.said:
            self.said = True
            logger.warning("%s stream: a row holds the %s token %s", self.name, " and the ".join(repeated), CURE)
        if row["comparisons"]:
            self.unused.clear()
            return True
        self.unused.update(row["reasons"])
        if self.unused.total() >= MOST_UNUSED:
            raise InputError(
                f"dataset: none of {self.unused.total()} rows of the {self.name} stream, one after the other, is "
                f"usable ({_listed(self.unused)}); {USABLE}"
            )
        return False
