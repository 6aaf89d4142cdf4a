"""Rows of a preference dataset → one common form, before any tokenizer is involved.

    standard         prompt: str, chosen: str, rejected: str
    conversational   the same columns as lists of {"role", "content"} messages
    implicit prompt  without the prompt column: the prompt is what chosen and rejected begin with
    ShareGPT         conversations: [{"from", "value"}, …], chosen and rejected: a {"from", "value"} message or text
    ranked           prompt, completions: [K answers], and scores (higher is better) or ranks (1 is best)
    compared         prompt, completions: [K answers], comparisons: [[winner, loser], …] by index
    tokenized        prompt_ids, chosen_ids, rejected_ids

`tools` and `chat_template_kwargs` reach the chat template of every conversational row. `system` is said first where a
conversation has no system message; text becomes a conversation. The ranked form turns into all comparisons between
answers of unequal score. `weight` is a number for all comparisons of a row, `weights` one for each of the compared
form, and `offset` the margin in reward that the winner of a pair should have. Rows are as `values.plain` leaves them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dpo_fast.data.columns import COLUMNS, Row
from dpo_fast.data.messages import Message, is_conversation, messages_of
from dpo_fast.data.values import beginning, is_finite, shown
from dpo_fast.errors import InputError


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its K completions, all text or all lists of messages, and (winner, loser) pairs of completions.

    `template_arguments` are the keyword arguments of the chat template. `scores` of the completions are there where the
    comparisons were made from them, `weights` of the comparisons where the row has them.
    """

    prompt: str | list[Message]
    completions: list[str] | list[list[Message]]
    comparisons: list[tuple[int, int]]
    template_arguments: dict[str, Any]
    scores: list[float] | None = None
    weights: list[float] | None = None

    @property
    def conversational(self) -> bool:
        return isinstance(self.prompt, list)


@dataclass(frozen=True, slots=True)
class Format:
    """Columns that a kind of row must and may have, and how such a row is read (None: it holds tokens)."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    read: Callable[[Row], Example] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return self.required + self.optional


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"column {column!r}: expected text or a list of messages, got {shown(value)}; "
            "give it in every row, or leave the row out"
        )
    return value


def _template_arguments(row: Row) -> dict[str, Any]:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise InputError(f"column 'tools': not valid JSON ({error}); give a list of JSON schemas") from error
    arguments = row.get("chat_template_kwargs")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise InputError(
            f"column 'chat_template_kwargs': expected a dict, got {shown(arguments)}; give the template's arguments by "
            "name"
        )
    arguments = {"tools": tools, **arguments}
    tools = arguments["tools"]
    if not (tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))):
        raise InputError(f"column 'tools': expected a list of dicts, got {shown(tools)}; give a list of JSON schemas")
    return arguments


def _example(row: Row, prompt: Any, completions: list[Any], comparisons: list[tuple[int, int]], **more: Any) -> Example:
    """Return an example with what the row holds beside prompt and completions."""
    if "system" in row:
        prompt = messages_of(prompt, "prompt", role="user")
        completions = [messages_of(completion, "completions") for completion in completions]
        if row["system"] and not (prompt and prompt[0]["role"] == "system"):
            prompt = [*messages_of(row["system"], "system", role="system"), *prompt]
    return Example(prompt, completions, comparisons, _template_arguments(row), **more)


def _divergence(left: Sequence, right: Sequence) -> int:
    """Where the shared beginning of two texts or conversations ends: both keep an element, a word keeps its space."""
    shortest = min(len(left), len(right))
    pairs = zip(left, right, strict=False)
    split = next((i for i, (a, b) in enumerate(pairs) if a != b), max(shortest - 1, 0))
    return split - 1 if split and left[split - 1] == " " else split


def _split_prompt(chosen: Sequence, rejected: Sequence) -> tuple[Any, list[Any]]:
    split = _divergence(chosen, rejected)
    return chosen[:split], [chosen[split:], rejected[split:]]


def _prompt_and_completions(prompt: Any, completions: list[Any], columns: list[str]) -> tuple[Any, list[Any]]:
    """An explicit prompt with its completions, as text if all of them are text, else as messages."""
    if not any(map(is_conversation, [prompt, *completions])):
        texts = [_text(value, column) for value, column in zip(completions, columns, strict=True)]
        return _text(prompt, "prompt"), texts
    conversations = [messages_of(value, column) for value, column in zip(completions, columns, strict=True)]
    if isinstance(prompt, str) and all(c and c[0]["role"] != "assistant" for c in conversations):
        return _repeated_prompt(prompt, conversations)
    return messages_of(prompt, "prompt", role="user"), conversations


def _repeated_prompt(prompt: str, conversations: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """Full conversations that repeat the prompt, with the bare prompt text beside them (as UltraFeedback does)."""
    split = min(_divergence(conversations[0], other) for other in conversations[1:])
    shared = conversations[0][:split]
    if not any(message.get("content") == prompt for message in shared):
        raise InputError(
            "column 'prompt' is text, and the completions are conversations that do not begin with an assistant's "
            "message and do not share a message with that text; give the prompt as a list of messages, or leave the "
            "prompt column out"
        )
    return shared, [conversation[split:] for conversation in conversations]


def _read_pair(row: Row) -> Example:
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        prompt, completions = _prompt_and_completions(row["prompt"], [chosen, rejected], ["chosen", "rejected"])
    elif is_conversation(chosen) and is_conversation(rejected):
        prompt, completions = _split_prompt(messages_of(chosen, "chosen"), messages_of(rejected, "rejected"))
    else:
        prompt, completions = _split_prompt(_text(chosen, "chosen"), _text(rejected, "rejected"))
    return _example(row, prompt, completions, [(0, 1)])


def _read_sharegpt(row: Row) -> Example:
    prompt = messages_of(row["conversations"], "conversations", role="user")
    return _example(row, prompt, [messages_of(row[column], column) for column in ("chosen", "rejected")], [(0, 1)])


def _prompt_and_answers(row: Row) -> tuple[Any, list[Any]]:
    completions = row["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise InputError(
            f"column 'completions': expected a list of at least two, to be compared, got {shown(completions)}; put "
            "the completions of a prompt into one row, or leave the row out"
        )
    return _prompt_and_completions(row["prompt"], completions, ["completions"] * len(completions))


def _read_ranked(row: Row) -> Example:
    prompt, completions = _prompt_and_answers(row)
    column = "scores" if "scores" in row else "ranks"
    values = _one_for_each(row[column], column, len(completions), "completions")
    if column == "scores":
        values = [float(value) if isinstance(value, bool) else value for value in values]  # labels, good or bad
    if not all(map(is_finite, values)):
        raise InputError(
            f"column {column!r}: expected finite numbers, got {shown(values)}; leave unrated completions out"
        )
    scores = values if column == "scores" else [-rank for rank in values]
    return _example(row, prompt, completions, comparisons_from_scores(scores), scores=scores)


def _read_compared(row: Row) -> Example:
    prompt, completions = _prompt_and_answers(row)
    comparisons, allowed = row["comparisons"], range(len(completions))
    if not isinstance(comparisons, list):
        raise InputError(
            f"column 'comparisons': expected a list of [winner, loser], got {shown(comparisons)}; give one for each "
            "comparison, by index"
        )
    for pair in comparisons:
        indices = isinstance(pair, list) and len(pair) == 2 and set(map(type, pair)) == {int}
        if not indices or pair[0] == pair[1] or not all(index in allowed for index in pair):
            raise InputError(
                f"column 'comparisons': {beginning(pair)} is not [winner, loser], two different indices from 0 to "
                f"{allowed[-1]} of the {len(completions)} completions"
            )
    if cycle := _cycle(comparisons):
        raise InputError(
            f"column 'comparisons': completions {' > '.join(map(str, cycle))} contradict each other; remove one of "
            "these comparisons"
        )
    weights = None
    if "weights" in row:
        weights = _one_for_each(row["weights"], "weights", len(comparisons), "comparisons")
        weights = [_weight(weight, "weights") for weight in weights]
    pairs = [(winner, loser) for winner, loser in comparisons]
    return _example(row, prompt, completions, pairs, weights=weights)


def _one_for_each(values: Any, column: str, count: int, what: str) -> list[Any]:
    if not isinstance(values, list) or len(values) != count:
        found = len(values) if isinstance(values, list) else shown(values)
        raise InputError(f"column {column!r}: expected one for each of the {count} {what}, got {found}; give as many")
    return values


def _weight(value: Any, column: str) -> float:
    if not is_finite(value) or value < 0:
        raise InputError(
            f"column {column!r}: expected a finite number, 0 or more, got {beginning(value)}; give one in every "
            "row, or leave the column out"
        )
    return value


def row_weight(row: Row) -> float:
    """What a row's comparisons weigh."""
    return _weight(row["weight"], "weight")


def row_offset(row: Row) -> float:
    """The margin in reward that the winner of a row's pair should have."""
    if not is_finite(row["offset"]):
        raise InputError(
            f"column 'offset': expected a finite number, got {beginning(row['offset'])}; give one in every row "
            "(0 asks for no margin), or leave the column out"
        )
    return row["offset"]


def comparisons_from_scores(scores: Sequence[float]) -> list[tuple[int, int]]:
    """Every (winner, loser) pair of indices with unequal scores; higher wins."""
    pairs = combinations(range(len(scores)), 2)
    return [(i, j) if scores[i] > scores[j] else (j, i) for i, j in pairs if scores[i] != scores[j]]


def _cycle(comparisons: Sequence[Sequence[int]]) -> list[int] | None:
    """Completions of which each beats the next, the first also at the end; None where there are none such."""
    beaten: dict[int, set[int]] = defaultdict(set)
    for winner, loser in comparisons:
        beaten[winner].add(loser)
    # Who beats nobody that is left is in no cycle; of those who remain in the end, each beats another of them.
    while harmless := [winner for winner, losers in beaten.items() if losers.isdisjoint(beaten)]:
        for winner in harmless:
            del beaten[winner]
    if not beaten:
        return None
    path = [min(beaten)]
    while (following := min(beaten[path[-1]] & beaten.keys())) not in path:
        path.append(following)
    return [*path[path.index(following) :], following]


_CHAT_COLUMNS = ("system", "tools", "chat_template_kwargs")
_REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
NUMBER_COLUMNS = ("weight", "offset", *_REFERENCE_COLUMNS)
_RANKED_COLUMNS = ("weight", *_CHAT_COLUMNS)

_NEEDED = tuple(name for name, column in COLUMNS.items() if column.default is None and not column.optional)

PREPARED = Format("prepared groups", _NEEDED, tuple(name for name in COLUMNS if name not in _NEEDED))
TOKENIZED = Format("tokenized pairs", ("prompt_ids", "chosen_ids", "rejected_ids"), NUMBER_COLUMNS)
FORMATS = (
    PREPARED,
    TOKENIZED,
    Format("ranked by score", ("prompt", "completions", "scores"), _RANKED_COLUMNS, _read_ranked),
    Format("ranked", ("prompt", "completions", "ranks"), _RANKED_COLUMNS, _read_ranked),
    Format("compared", ("prompt", "completions", "comparisons"), ("weights", *_RANKED_COLUMNS), _read_compared),
    Format(
        "ShareGPT pairs",
        ("conversations", "chosen", "rejected"),
        (*_CHAT_COLUMNS, *NUMBER_COLUMNS),
        _read_sharegpt,
    ),
    Format("pairs", ("prompt", "chosen", "rejected"), (*_CHAT_COLUMNS, *NUMBER_COLUMNS), _read_pair),
    Format("pairs with an implicit prompt", ("chosen", "rejected"), (*_CHAT_COLUMNS, *NUMBER_COLUMNS), _read_pair),
)


def detect_format(columns: Collection[str]) -> Format:
    """The format that these columns make; the first that fits in the order of `FORMATS`.

    Raises:
        ValueError: no format fits, or the columns are ambiguous or of a kind that is not supported.
    """
    found = f"found the columns {', '.join(sorted(columns)) or '(none)'}"
    for media in ("image", "video", "audio"):
        if names := sorted({media, f"{media}s"} & set(columns)):
            raise InputError(
                f"dataset: {found}; {media}s are not supported; remove {', '.join(names)} to train on text"
            )
    for candidate in FORMATS:
        if set(candidate.required) <= set(columns):
            if "completions" in candidate.required:
                _check_ranked(columns, found)
            references = set(columns) & set(_REFERENCE_COLUMNS)
            if len(references) == 1 and references <= set(candidate.optional):
                raise InputError(f"dataset: {found}; give both of {' and '.join(_REFERENCE_COLUMNS)}, or none of them")
            return candidate
    if {"completion", "label"} <= set(columns):
        raise InputError(
            f"dataset: {found}; completion with label is unpaired preference data (KTO), which is not supported: here "
            "completions of one prompt are compared, as pairs (prompt, chosen, rejected) or ranked (prompt, "
            "completions, scores). Put the rows of each prompt into one row, with their labels as scores, or train "
            "with a KTO trainer"
        )
    accepted = "; ".join(f"{candidate.name}: {', '.join(candidate.required)}" for candidate in FORMATS)
    raise InputError(
        f"dataset: {found}. Rename the columns, or map them (--columns chosen=better rejected=worse), to one of the "
        f"accepted formats ({accepted})"
    )


def _check_ranked(columns: Collection[str], found: str) -> None:
    if len({"scores", "ranks", "comparisons"} & set(columns)) > 1:
        raise InputError(f"dataset: {found}; give either scores or ranks or comparisons, one of them only")
    if "offset" in columns:
        raise InputError(
            f"dataset: {found}; offset is the margin of one comparison, and a row of completions holds several: give "
            "pairs (prompt, chosen, rejected, offset), or remove it"
        )
