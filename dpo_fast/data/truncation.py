"""Whole preference groups → the comparisons asked for, in groups that fit `max_length` and carry signal.

`keep_start` keeps the first max_length tokens of prompt+completion, and drops a group whose prompt alone fills them.
`keep_end` keeps the last ones. Completions that lose different parts of the prompt no longer share one: each then
carries what is left of it as its own context. These are TRL 1.16's rules.
"""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path
from typing import get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_fast.batches.groups import ComparisonChoice
from dpo_fast.data import columns, special_tokens, values
from dpo_fast.data.columns import COLUMNS, COUNTS, REFERENCE_FIELDS, Row, take, with_defaults
from dpo_fast.data.formats import TOKENIZED, Format
from dpo_fast.data.special_tokens import repeats_bos, repeats_eos
from dpo_fast.data.values import beginning, check_logps, check_type, plain
from dpo_fast.errors import InputError

TRUNCATION_MODES = ("keep_start", "keep_end")
COMPARISON_CHOICES = get_args(ComparisonChoice)

# Why a row, or a single comparison, was dropped.
NO_PROMPT = "no prompt"
ALL_TIES = "all ties"
PROMPT_TOO_LONG = "prompt fills max_length"
EMPTY_COMPLETION = "empty completion"
IDENTICAL_COMPLETIONS = "identical completions"
NO_WEIGHT = "no weight"
STAYS = ", in a group that stays"

# Part of the cache key of the rows: `datasets` hashes an importable class by its name, not by its code.
CODE = hashlib.blake2b(
    b"".join(Path(file).read_bytes() for file in (__file__, columns.__file__, special_tokens.__file__, values.__file__))
).hexdigest()


def checked_group(row: Row, where: str) -> Row:
    """Return the group of a row, with the columns that it leaves out filled in; `where` names the row in errors."""
    try:
        return _checked_group(row)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _checked_group(row: Row) -> Row:
    given = {name: row[name] for name in COLUMNS if name in row}
    for name, value in given.items():
        if value is not None:
            check_type(value, COLUMNS[name].type, name)
        elif COLUMNS[name].default is None:
            raise InputError(f"column {name!r} is missing; give it in every row (not None), or leave the column out")
    group = with_defaults(given)
    counts = {"completion": len(group["completion_ids"]), "comparison": len(group["comparisons"])}
    for name, value in group.items():
        per = COLUMNS[name].per
        if per in counts and len(value) != counts[per]:
            raise InputError(f"column {name!r} holds {len(value)} for {counts[per]} {per}s; give one for each")
    for pair in group["comparisons"]:
        if len(pair) != 2 or pair[0] == pair[1] or not all(0 <= index < counts["completion"] for index in pair):
            raise InputError(
                f"comparisons {beginning(group['comparisons'])} must be different indices of the "
                f"{counts['completion']} completions, and {pair} is not; give [winner, loser]"
            )
    if any(weight < 0 for weight in group["comparison_weights"]):
        raise InputError(
            f"column 'comparison_weights': {beginning(group['comparison_weights'])} must be 0 or more; let the other "
            "completion win instead"
        )
    unpredicted = 0 if group["prompt_ids"] else 1  # nothing predicts the first token of a sequence
    for k, (ids, context) in enumerate(zip(group["completion_ids"], group["context_lengths"], strict=True)):
        if not 0 <= context <= len(ids):
            raise InputError(
                f"column 'context_lengths': {context} is not from 0 to the {len(ids)} tokens of completion {k}; give "
                "how many of its first tokens are not scored"
            )
        logps, scored = group.get("ref_token_logps"), max(0, len(ids) - max(context, unpredicted))
        if logps is not None and len(logps[k]) != scored:
            raise InputError(
                f"column 'ref_token_logps': {len(logps[k])} numbers for the {scored} scored tokens of completion {k}; "
                "give one for each, or leave the column out to have it computed"
            )
    for name in REFERENCE_FIELDS:
        logps = group.get(name) or []
        check_logps(list(chain(*logps)) if name == "ref_token_logps" else logps, name)
    return group


def choose_comparisons(group: Row, choice: ComparisonChoice) -> Row:
    """Return `group` with those of its comparisons that `choice` asks for; all of them where it has no scores.

    `best_vs_rest` keeps what a completion of the highest score wins, `best_vs_worst` what it wins against one of the
    lowest: a single comparison, unless several completions share either score.
    """
    scores = group.get("completion_scores")
    if choice == "all_pairs" or not scores:
        return group
    best, bound = max(scores), min(scores) if choice == "best_vs_worst" else np.inf
    kept = [
        index
        for index, (winner, loser) in enumerate(group["comparisons"])
        if scores[winner] == best and scores[loser] <= bound
    ]
    return take(group, "comparison", kept)


def truncate(group: Row, max_length: int | None, truncation_mode: str) -> Row:
    """Return `group` with every prompt+completion cut to `max_length` tokens; None leaves it whole.

    With `keep_start` the prompt must be shorter than `max_length`.
    """
    prompt, completions = group["prompt_ids"], group["completion_ids"]
    longest = np.inf if max_length is None else max_length
    excess = [max(0, len(prompt) + len(ids) - longest) for ids in completions]
    if not any(excess):
        return group
    if truncation_mode == "keep_start":
        return {**group, "completion_ids": [ids[: max_length - len(prompt)] for ids in completions]}
    if len(set(excess)) == 1 and excess[0] <= len(prompt):
        return {**group, "prompt_ids": prompt[excess[0] :]}
    contexts = zip(group["context_lengths"], excess, strict=True)
    return {
        **group,
        "prompt_ids": [],
        "completion_ids": [[*prompt, *ids][cut:] for ids, cut in zip(completions, excess, strict=True)],
        "context_lengths": [max(0, len(prompt) + length - cut) for length, cut in contexts],
    }


def keep_signal(group: Row) -> tuple[Row, list[int], list[str]]:
    """Drop comparisons that teach nothing, and completions that no comparison is left for.

    Returns:
        The group, the indices of the completions that stay, and one reason for each comparison dropped.
    """
    unpredicted = 0 if group["prompt_ids"] else 1  # nothing predicts the first token of a sequence
    keys = list(zip(group["context_lengths"], group["completion_ids"], strict=True))
    empty = [len(ids) <= max(context, unpredicted) for context, ids in keys]
    kept, reasons = [], []
    for index, (winner, loser) in enumerate(group["comparisons"]):
        if empty[winner] or empty[loser]:
            reasons.append(EMPTY_COMPLETION)
        elif keys[winner] == keys[loser]:
            reasons.append(IDENTICAL_COMPLETIONS)
        else:
            kept.append(index)
    group = take(group, "comparison", kept)
    used = sorted({index for pair in group["comparisons"] for index in pair})
    place = {index: k for k, index in enumerate(used)}
    comparisons = [(place[winner], place[loser]) for winner, loser in group["comparisons"]]
    return {**take(group, "completion", used), "comparisons": comparisons}, used, reasons


class TruncateRows:
    """A batch of rows that hold whole groups → as many rows that hold what is used of them, and an account of the rest.

    `source` is the format that the groups were read from, and `checked` whether `checked_group` need not look at them.
    A dropped row comes back without comparisons. `reasons` names why it, or single comparisons of it, were dropped.
    """

    def __init__(
        self,
        *,
        max_length: int | None,
        truncation_mode: str,
        comparisons: ComparisonChoice,
        vocab_size: int | None,
        positions: int | None,
        tokenizer: PreTrainedTokenizerBase,
        source: Format,
        checked: bool,
        name: str,
    ):
        self.max_length, self.truncation_mode, self.comparisons = max_length, truncation_mode, comparisons
        self.vocab_size, self.positions, self.tokenizer = vocab_size, positions, tokenizer
        self.places = TOKENIZED.required if source is TOKENIZED else ("prompt_ids", "completion_ids")
        self.checked, self.name, self.code = checked, name, CODE

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = (dict(zip(batch, map(plain, values), strict=True)) for values in zip(*batch.values(), strict=True))
        results = [self._row(row, index) for row, index in zip(rows, indices, strict=True)]
        return {column: [result[column] for result in results] for column in results[0]}

    def _row(self, row: Row, index: int) -> Row:
        where = f"{self.name} dataset, row {index}"
        whole = choose_comparisons(row if self.checked else checked_group(row, where), self.comparisons)
        self._check_vocabulary(whole, where)
        prompt, longest = whole["prompt_ids"], np.inf if self.max_length is None else self.max_length
        if self.truncation_mode == "keep_start" and len(prompt) >= longest:
            return self._dropped(whole, PROMPT_TOO_LONG)
        if not whole["completion_ids"]:
            return self._dropped(whole, NO_PROMPT)
        if not whole["comparisons"]:
            return self._dropped(whole, ALL_TIES)
        group, used, reasons = keep_signal(truncate(whole, self.max_length, self.truncation_mode))
        if not group["comparisons"]:
            return self._dropped(whole, reasons[0])
        if not np.asarray(group["comparison_weights"], np.float32).any():
            return self._dropped(whole, NO_WEIGHT)
        self._check_length(group, where)

        truncated = lost_eos = 0
        for k, ids in zip(used, group["completion_ids"], strict=True):
            before = whole["completion_ids"][k]
            cut = len(prompt) + len(before) - len(group["prompt_ids"]) - len(ids)
            truncated += cut > 0
            if cut and self.truncation_mode == "keep_start":
                lost_eos += self.tokenizer.eos_token_id in before[len(ids) :]
        repeated_bos = repeats_bos(prompt, whole["completion_ids"], self.tokenizer)
        counts = truncated, lost_eos, repeated_bos, repeats_eos(whole["completion_ids"], self.tokenizer)
        account = {
            **dict(zip(COUNTS, map(int, counts), strict=True)),
            "reasons": [reason + STAYS for reason in reasons],
        }
        return {**group, **account}

    def _dropped(self, group: Row, reason: str) -> Row:
        return {**{name: [] for name in group}, **dict.fromkeys(COUNTS, 0), "reasons": [reason]}

    def _check_length(self, group: Row, where: str) -> None:
        length = len(group["prompt_ids"]) + max(map(len, group["completion_ids"]))
        if self.positions is not None and length > self.positions:
            raise InputError(
                f"max_length: {self.max_length} cuts nothing, and the {length} tokens of {where} exceed the "
                f"{self.positions} positions that the model has learned; set max_length={self.positions} or less"
            )

    def _check_vocabulary(self, group: Row, where: str) -> None:
        for place, ids in enumerate((group["prompt_ids"], *group["completion_ids"])):
            if ids and (min(ids) < 0 or (self.vocab_size is not None and max(ids) >= self.vocab_size)):
                wrong = min(ids) if min(ids) < 0 else max(ids)
                column = self.places[min(place, len(self.places) - 1)]
                size = "" if self.vocab_size is None else f" of {self.vocab_size} entries"
                raise InputError(
                    f"{where}: token id {wrong} in {column!r} is outside the model's vocabulary{size}; use the "
                    "model's own tokenizer, or resize its embeddings when tokens were added"
                )
