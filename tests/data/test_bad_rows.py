"""A row that cannot be used is an `InputError` that names dataset, row, column and value; others are used as given.

The rows come as a stream, which hands on any value, and as a dataset where Arrow has a type for them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset

from bad_rows import GOOD, bad_rows
from dpo_fast.data.prepare import prepare
from dpo_fast.errors import InputError
from tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
VOCABULARY = len(TOKENIZER)
BAD = {f"{number} {what}": case for number, (what, *case) in enumerate(bad_rows())}


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def prepared(dataset, **options):
    return list(prepare(dataset, TOKENIZER, max_length=None, vocab_size=VOCABULARY, **options)[0])


@pytest.mark.parametrize("form", GOOD)
def test_the_rows_that_the_bad_ones_are_made_of_are_good(form):
    rows = [GOOD[form]] * 2
    assert len(prepared(stream_of(rows))) == len(prepared(Dataset.from_list(rows))) == 2


def test_bad_rows_are_refused_by_name():
    assert len(BAD) >= 250
    wrong = []
    for what, (form, row, words) in BAD.items():
        try:
            prepared(stream_of([GOOD[form], row]))
        except InputError as error:
            message = str(error)
            missing = [word for word in ("train dataset", "row 1", *words) if word not in message]
            if missing or "\n" in message or len(message) > 500:
                wrong.append((what, missing, message))
        else:
            wrong.append((what, "accepted"))
    assert not wrong, "\n".join(map(str, wrong))


# Random rows

ATOMS = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    7,
    300,
    2**31,
    2**70,
    0.5,
    -2.5,
    float("nan"),
    float("inf"),
    "",
    "a",
    "NA",
    "7",
]
ATOMS += ["\ud800", "</s>", "user", b"\xff", [], {}, [[]], "x" * 300]


def random_value(rng: random.Random, depth: int = 0):
    kind = rng.random()
    if depth > 3 or kind < 0.5:
        return rng.choice(ATOMS)
    if kind < 0.65:
        return [rng.choice((1, 2, 3, 7)) for _ in range(rng.randrange(4))]
    if kind < 0.8:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 0.9:
        return {"role": rng.choice(("user", "assistant", "tool", 3)), "content": random_value(rng, depth + 1)}
    keys = ("role", "content", "from", "value", "type", "text", "tool_calls", "name", 3)
    return {key: random_value(rng, depth + 1) for key in rng.sample(keys, rng.randrange(4))}


def random_row(rng: random.Random) -> tuple[str, dict]:
    """A good row with one thing or more changed: a column, a part of one, a column that it lacks or has too much."""
    form = rng.choice(list(GOOD))
    row = dict(GOOD[form])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        column = rng.choice(list(row))
        value, change = row[column], rng.random()
        if change < 0.15 and isinstance(value, list) and value:
            row[column] = [*value[:-1], random_value(rng)]
        elif change < 0.25 and isinstance(value, list) and value and isinstance(value[0], dict) and value[0]:
            row[column] = [{**value[0], rng.choice(list(value[0])): random_value(rng)}]
        elif change < 0.3 and len(row) > 1:
            del row[column]
        elif change < 0.35:
            row[rng.choice(("weight", "offset", "scores", "system", "tools", "ref_chosen_logps", "x", "image"))] = value
        else:
            row[column] = random_value(rng)
    return form, row


def check_used_as_given(row: dict, group: dict) -> None:
    completions = group["completion_ids"]
    for ids in (group["prompt_ids"], *completions):
        assert all(type(token) is int and 0 <= token < VOCABULARY for token in ids)
    weights = group["comparison_weights"]
    assert len(weights) == len(group["comparisons"]) and all(0 <= weight < float("inf") for weight in weights)
    whole = [TOKENIZER.decode([*group["prompt_ids"], *ids]) for ids in completions]
    if "completion_ids" in row:
        assert group["prompt_ids"] == row["prompt_ids"]
        assert won(group) == {pair for pair in won(row) if pair[0] != pair[1] and all(pair)}
    elif "chosen_ids" in row:
        assert group["prompt_ids"] == row["prompt_ids"] and completions == [row["chosen_ids"], row["rejected_ids"]]
    elif "completions" in row and "comparisons" not in row:
        scores = group["completion_scores"]
        assert all(scores[winner] > scores[loser] for winner, loser in group["comparisons"])
    else:
        sides = row["completions"] if "completions" in row else [row["chosen"], row["rejected"]]
        for side, text in zip(sides, whole, strict=True):
            assert not isinstance(side, str) or side in text
    if "ref_logps" in group and "ref_chosen_logps" in row:
        assert group["ref_logps"] == [row["ref_chosen_logps"], row["ref_rejected_logps"]]


def won(group: dict) -> set[tuple[tuple, tuple]]:
    """Pairs of winner and loser, as tokens."""
    ids = [tuple(tokens) for tokens in group["completion_ids"]]
    return {(ids[winner], ids[loser]) for winner, loser in group["comparisons"]}


def random_cases(seed: int, count: int) -> Iterator[tuple[dict, list[dict], IterableDataset | Dataset]]:
    """Yield a random row, the rows that it stands last in, and these as a stream or, where Arrow can, as a dataset."""
    rng = random.Random(seed)
    for number in range(count):
        form, row = random_row(rng)
        rows = [row] if number % 2 else [GOOD[form], row]
        yield row, rows, stream_of(rows)
        if number % 5 == 0:
            with suppress(pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
                yield row, [row], Dataset.from_list([row])


def test_random_rows_are_used_as_given_or_refused():
    counts = Counter()
    for row, rows, dataset in random_cases(seed=0, count=500):
        try:
            groups = prepared(dataset)
        except InputError as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
        except Exception as error:
            error.add_note(f"of the row {row!r}")
            raise
        else:
            counts["used" if len(groups) == len(rows) else "dropped"] += 1
            if len(groups) == len(rows):
                check_used_as_given(row, groups[-1])
    assert counts["refused"] > 250 and counts["used"] > 50 and counts["dropped"] > 5, counts
