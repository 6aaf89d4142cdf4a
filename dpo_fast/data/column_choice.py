"""Which columns of a dataset are read as which of ours, and which are left out.

A column whose name says that it may belong to the prompt is read, or refused by name. It is read by itself where that
has one reading: the only such text of rows without a prompt is the prompt, and a system text opens a conversation. It
is left out where its text is in the prompt, or in both completions, already, and where it holds no text at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Json, Value

from dpo_fast.data.columns import Row
from dpo_fast.data.formats import FORMATS, PREPARED, Format, detect_format
from dpo_fast.data.values import element_type, plain, shown
from dpo_fast.errors import InputError, reading

SYSTEM_TEXTS = ("system", "system_prompt", "system_message")
# Names of what may belong to a prompt; those that are likeliest the prompt itself come first.
PROMPT_LIKE = (
    *("prompt", "conversations", "question", "instruction", "instructions", "query", "problem", "request", "post"),
    *("user_prompt", "user_input", "user_message", "input", "inputs", "messages", "conversation", "dialogue", "dialog"),
    *("history", "context", "contexts", "background", "passage", "document", "few_shot", *SYSTEM_TEXTS),
)
# Names of completions that stand for ours where a dataset has none of those.
COMPLETIONS = {"chosen": "chosen_response", "rejected": "rejected_response"}
READABLE = sorted({column for form in FORMATS if form is not PREPARED for column in form.columns})
SAMPLE = 100  # rows that are looked at to find text that occurs twice


@dataclass(frozen=True)
class ColumnChoice:
    """How the columns of a dataset are read.

    Attributes:
        format: what the columns make.
        names: our name of each column that is read → its name in the dataset.
        mapped: those of `names` that nobody gave, under another name than ours.
        ignored: columns that are not read.
        features: types of the dataset's columns; None where a stream does not know them.
    """

    format: Format
    names: dict[str, str]
    mapped: dict[str, str]
    ignored: tuple[str, ...]
    features: Features | None


def described(mapped: Mapping[str, str], ignored: tuple[str, ...]) -> list[str]:
    """Return lines that say which columns are read under another name, and which are not read."""
    lines = [f"column {theirs!r} is read as {ours!r}" for ours, theirs in mapped.items()]
    return lines + ([f"columns that are not read: {', '.join(ignored)}"] if ignored else [])


def choose_columns(dataset: Dataset | IterableDataset, given: Mapping[str, str] | None, name: str) -> ColumnChoice:
    """Return how the columns of a dataset are read.

    Args:
        dataset: at least one row, as Python values.
        given: our names → the dataset's, from the user. With `prompt`, no other column belongs to the prompt.
        name: name of the dataset, for messages.

    Raises:
        InputError: `given` names a column that is not there, the columns make no format, or one of them may belong to
            the prompt in more than one way.
    """
    columns = _Columns(dataset, name)
    if not columns.kinds or (isinstance(dataset, Dataset) and not len(dataset)):
        kind = "dataset" if isinstance(dataset, Dataset) else "stream"
        raise InputError(f"dataset: the {name} {kind} has no rows; it must have at least one")
    mapped: dict[str, str] = {}
    if set(PREPARED.required) <= set(columns.kinds):
        names = {column: column for column in columns.kinds}  # was mapped when it was prepared
    else:
        given = dict(given or {})
        _check_given(given, columns, name)
        own = {column: column for column in columns.kinds if column not in given.values()}
        if "prompt" in given:
            names = {ours: theirs for ours, theirs in own.items() if ours not in PROMPT_LIKE} | given
        else:
            names = _guessed(own | given, given, columns, name)
            mapped = {ours: theirs for ours, theirs in names.items() if ours != theirs and ours not in given}
    form = detect_format(names)
    names = {ours: names[ours] for ours in form.columns if ours in names}
    if "system" in names and "prompt" not in names and not columns.conversational(names):
        raise InputError(
            f"system: the {name} dataset has text and no prompt column, so there is no message that the system's could "
            "stand before; give --columns prompt=… too, or leave system out"
        )
    ignored = tuple(column for column in columns.kinds if column not in names.values())
    return ColumnChoice(form, names, mapped, ignored, dataset.features)


class _Columns:
    """The columns of a dataset: `kinds` by name, which are text, texts, messages, numbers or nothing."""

    def __init__(self, dataset: Dataset | IterableDataset, name: str):
        self.dataset, self.name = dataset, name
        if dataset.features is not None:
            self.kinds = {name: _kind(feature) for name, feature in dataset.features.items()}
        else:
            first = self.sample(1)
            self.kinds = {name: _kind_of_value(value) for name, value in (first[0] if first else {}).items()}

    def conversational(self, names: Mapping[str, str]) -> bool:
        return any(
            self.kinds[names[ours]] == "messages"
            for ours in ("prompt", "conversations", "chosen", "rejected", "completions")
            if ours in names
        )

    def says_nothing(self, column: str) -> bool:
        """Return whether a column holds no text; a stream's may still come."""
        if self.kinds[column] in ("numbers", "nothing"):
            return True
        return isinstance(self.dataset, Dataset) and not any(any(_texts(value)) for value in self.dataset[column])

    def sample(self, count: int = SAMPLE) -> list[Row]:
        if isinstance(self.dataset, Dataset):
            return [self.dataset[index] for index in range(min(count, len(self.dataset)))]
        with reading("dataset", self.name, "give a stream of dicts, whose keys are names of columns"):
            rows = list(islice(self.dataset, count))
        for index, row in enumerate(rows):
            if not isinstance(row, dict) or not all(isinstance(column, str) for column in row):
                raise InputError(
                    f"dataset: the {self.name} stream, row {index}: expected a dict with names of columns as keys, got "
                    f"{shown(row)}; give one for each row"
                )
        return rows


def _kind(feature: Any) -> str:
    inner, depth = feature, 0
    while (element := element_type(inner)) is not None:
        inner, depth = element, depth + 1
    if isinstance(inner, dict | Json):
        return "messages"
    if isinstance(inner, Value) and inner.dtype == "null":
        return "nothing"
    if isinstance(inner, Value) and "string" in inner.dtype:
        return "texts" if depth else "text"
    return "numbers"


def _kind_of_value(value: Any) -> str:
    value = plain(value)
    if value is None or value == []:
        return "text"  # it may be in the next row
    try:
        return _kind(Features.from_arrow_schema(pa.table({"value": [value]}).schema)["value"])
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return "messages"  # values of different types: what else they are, they are no numbers


def _check_given(given: Mapping[str, str], columns: _Columns, name: str) -> None:
    for ours, theirs in given.items():
        if ours not in READABLE:
            raise InputError(
                f"columns: {ours!r} is no column of any format; give one of {', '.join(map(repr, READABLE))}"
            )
        if theirs not in columns.kinds:
            raise InputError(
                f"columns: the {name} dataset has no column {theirs!r} to be read as {ours!r}; it has "
                f"{', '.join(sorted(columns.kinds))}"
            )
        if list(given.values()).count(theirs) > 1:
            raise InputError(f"columns: {dict(given)} reads {theirs!r} twice; give each column one meaning")


def _guessed(names: dict[str, str], given: Mapping[str, str], columns: _Columns, name: str) -> dict[str, str]:
    """Return `names` with what has one reading, and without what is in other columns already."""
    if not COMPLETIONS.keys() & names.keys() and set(COMPLETIONS.values()) <= names.keys():
        names = {ours: theirs for ours, theirs in names.items() if theirs not in COMPLETIONS.values()} | COMPLETIONS
    form = next((form for form in FORMATS if set(form.required) <= {*names, "prompt"}), None)
    if form is None or form.read is None:
        return names
    prompt = "conversations" if "conversations" in form.required else "prompt"
    asides = {ours: theirs for ours, theirs in names.items() if ours in PROMPT_LIKE and ours not in (prompt, *given)}
    found = [theirs for theirs in asides.values() if not columns.says_nothing(theirs)]
    rows = columns.sample() if found else []
    found = [theirs for theirs in found if not _occurs_elsewhere(theirs, rows, names, prompt)]
    names = {ours: theirs for ours, theirs in names.items() if ours not in asides}
    systems = [theirs for theirs in found if theirs in SYSTEM_TEXTS]
    others = [theirs for theirs in found if theirs not in SYSTEM_TEXTS]
    if prompt not in names and [columns.kinds[theirs] for theirs in others] == ["text"]:
        names[prompt] = others.pop()
    if len(systems) == 1 and "system" not in given and columns.conversational(names):
        names["system"] = systems.pop()
    if systems or others:
        raise InputError(_refusal([*systems, *others], names, prompt, columns, name))
    return names


def _occurs_elsewhere(column: str, rows: list[Row], names: Mapping[str, str], prompt: str) -> bool:
    """Return whether all text of a column is in the prompt or in every completion; of messages, in any completion."""
    found = False
    for row in rows:
        start = "\n".join(_texts(row.get(names.get(prompt))))
        if "completions" in names:
            completions = row[names["completions"]] or []
        else:
            completions = [row[names["chosen"]], row[names["rejected"]]]
        sequences = ["\n".join([start, *_texts(completion)]) for completion in completions]
        texts = list(_texts(row[column]))
        occurs = all if isinstance(row[column], str) else any
        if not all(occurs(text in sequence for sequence in sequences) for text in texts):
            return False
        found |= bool(texts)
    return found


def _texts(value: Any) -> Iterator[str]:
    """Yield what is said in a value: its strings that are not blank, without those that name a speaker."""
    value = plain(value)
    if isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "from"):
                yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _refusal(found: list[str], names: Mapping[str, str], prompt: str, columns: _Columns, name: str) -> str:
    """Say which columns have more than one reading, and what to do."""
    main = names.get(prompt) or next((n for n in PROMPT_LIKE if n in found and n not in SYSTEM_TEXTS), None)
    system = next((theirs for theirs in found if theirs in SYSTEM_TEXTS), None)
    which = ", ".join(map(repr, found))
    text = (
        f"dataset: the {name} dataset has the columns {', '.join(sorted(columns.kinds))}, of which {which} may belong "
        "to the prompt, in more than one way."
    )
    if main is not None:
        both = f"--columns prompt={main}"
        text += f" Give {both} to read nothing else as prompt"
        if system is not None:
            text += f", or {both} system={system} to make each row a conversation that begins with {system!r}"
    else:
        text += " Remove or rename them to leave them out"
    return (
        f"{text}. Several columns become one with dataset.map(lambda row: {{'prompt': …}}). In Python --columns a=b is "
        "DPOConfig(columns={'a': 'b'})"
    )
