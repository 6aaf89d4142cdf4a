"""The preference groups that run.py speed trains on: a dataset's, or random tokens of a published one's lengths.

A group is a prompt, K completions and the comparisons of all of them, as token ids. Every side gets the same ids:
groups, or the pairs that they consist of.

Lengths of synthetic groups are log-normal, drawn for prompt and each completion, in tokens. Medians are approximate:

    ultrafeedback  pairs of 409 tokens, prompt : completion 0.42   arXiv 2410.20305, UltraFeedback (one completion)
    hh             186 tokens, 2.15                                the same, Anthropic HH-RLHF
    tldr           416 tokens, 11.1                                the same, summaries of Reddit posts
    long-prompt    documents with a question; no published set, the order of size of retrieval and long chats
    one-to-one     prompts as long as completions, for prompts with K completions

A rejected completion is a little longer than a chosen one, as in LLaMA-Factory's demo pairs (343 to 314 tokens in the
mean). The standard deviation of a length's logarithm is 0.8: the mean is then 1.4 times the median.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from dpo_fast.commands.bench.trainers import pairs_of

Group = dict[str, Any]  # prompt_ids, completion_ids, comparisons

SPREAD = 0.8
_FIRST_ID = 3  # below are pad, bos and eos


@dataclass(frozen=True)
class Lengths:
    """Median tokens of a prompt, and of a chosen and a rejected completion."""

    prompt: int
    chosen: int
    rejected: int


PUBLISHED = {
    "ultrafeedback": Lengths(121, 275, 300),
    "hh": Lengths(127, 57, 61),
    "tldr": Lengths(382, 33, 36),
    "long-prompt": Lengths(3000, 240, 260),
    "one-to-one": Lengths(256, 256, 256),
}


def synthetic_groups(
    name: str, count: int, *, group_size: int, max_length: int, vocab_size: int, seed: int = 0
) -> list[Group]:
    """Return groups of random tokens; what exceeds `max_length` is cut, and a prompt without room is drawn again.

    Raises:
        ValueError: nearly all prompts of these lengths exceed `max_length`.
    """
    lengths, draw = PUBLISHED[name], random.Random(seed)
    groups: list[Group] = []
    for _ in range(100 * count):
        if len(groups) == count:
            return groups
        prompt = _length(draw, lengths.prompt)
        if prompt >= max_length:
            continue
        # The completions of K lie between chosen and rejected, from the best to the worst.
        share = (k / (group_size - 1) for k in range(group_size))
        medians = (lengths.chosen + part * (lengths.rejected - lengths.chosen) for part in share)
        completions = [min(_length(draw, median), max_length - prompt) for median in medians]
        groups.append(
            {
                "prompt_ids": _ids(draw, prompt, vocab_size),
                "completion_ids": [_ids(draw, length, vocab_size) for length in completions],
                "comparisons": all_comparisons(group_size),
            }
        )
    raise ValueError(
        f"max_length={max_length} is too short for {name!r}, whose prompts have {lengths.prompt} tokens in the median; "
        f"raise it, or take another of {list(PUBLISHED)}"
    )


def _length(draw: random.Random, median: float) -> int:
    return max(1, round(median * math.exp(draw.gauss(0, SPREAD))))


def _ids(draw: random.Random, length: int, vocab_size: int) -> list[int]:
    return draw.choices(range(_FIRST_ID, vocab_size), k=length)


def dataset_groups(
    name: str, count: int, *, group_size: int, max_length: int, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> list[Group]:
    """Return groups of a dataset in any format of `dpo-fast train`, in an order drawn once, cut to `max_length`.

    With a `group_size` of 2 every comparison is a group of its own; above, rows with so many completions, all compared.

    Raises:
        ValueError: the dataset has fewer usable ones.
    """
    from dpo_fast.data.loading import load_preference_dataset
    from dpo_fast.data.prepare import prepare_dataset

    dataset = load_preference_dataset(name)
    if isinstance(dataset, DatasetDict):
        dataset = dataset["train"]
    prepared, _ = prepare_dataset(dataset, tokenizer, max_length=max_length, vocab_size=vocab_size, name="benchmark")
    rows = [{field: row[field] for field in ("prompt_ids", "completion_ids", "comparisons")} for row in prepared]
    if group_size == 2:
        groups = [_pair(row, winner, loser) for row in rows for winner, loser in row["comparisons"]]
    else:
        compared = len(all_comparisons(group_size))
        groups = [
            row for row in rows if len(row["completion_ids"]) == group_size and len(row["comparisons"]) == compared
        ]
    if len(groups) < count:
        raise ValueError(
            f"dataset={name!r} has {len(groups)} usable groups of {group_size} completions, and the steps take {count};"
            " lower steps or batch_size, or take synthetic rows"
        )
    random.Random(0).shuffle(groups)
    return groups[:count]


def _pair(row: Group, winner: int, loser: int) -> Group:
    completions = [row["completion_ids"][index] for index in (winner, loser)]
    return {"prompt_ids": row["prompt_ids"], "completion_ids": completions, "comparisons": [[0, 1]]}


def all_comparisons(group_size: int) -> list[list[int]]:
    """Return the comparisons of every completion with every later one."""
    return [[winner, loser] for winner in range(group_size) for loser in range(winner + 1, group_size)]


def save_rows(groups: Sequence[Group], folder: str) -> None:
    """Write what the sides read: `groups` and `pairs`."""
    Dataset.from_list(list(groups)).save_to_disk(f"{folder}/groups")
    Dataset.from_list(pairs_of(groups)).save_to_disk(f"{folder}/pairs")
