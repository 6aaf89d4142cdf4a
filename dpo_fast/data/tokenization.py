"""Examples of `formats` → token ids: one prompt, and completions that continue it.

The prompt and every prompt+completion are tokenised as one text each. The completions start where the prompt's tokens
and those of any prompt+completion part, so a token that merges over the boundary belongs to the completion. Plain text
gets the end-of-sequence token when it lacks it, conversations what the chat template gives. TRL 1.16's rules.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_fast.data import formats, messages, values
from dpo_fast.data.column_choice import ColumnChoice
from dpo_fast.data.columns import COLUMNS, with_defaults
from dpo_fast.data.formats import TOKENIZED, Example, Row, row_offset, row_weight
from dpo_fast.data.messages import KNOWN_ROLES, in_parts, unknown_role
from dpo_fast.data.values import check_logps, check_type, element_type, plain
from dpo_fast.errors import InputError

# Part of the cache key of every row's tokens: `datasets` hashes an importable class by its name, not by its code.
_CODE = hashlib.blake2b(
    b"".join(Path(f).read_bytes() for f in (__file__, formats.__file__, messages.__file__, values.__file__))
).hexdigest()
# Arguments of `apply_chat_template` that are not the template's: they would change what comes back.
_TAKEN = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {
    *("self", "kwargs", "tools", "documents", "chat_template")
}
_WRITTEN_OUT = ("'type': 'text'", '"type": "text"')  # parts of text that a template does not take apart


class TokenizeRows:
    """A batch of raw rows, read by `choice` → the columns of as many whole preference groups.

    `lost_prompt` is the text of the prompt's end where it is not part of prompt+completion. An example without a prompt
    comes back without completions, and one without a winner without comparisons.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, choice: ColumnChoice, name: str):
        self.tokenizer, self.source, self.name, self.code = tokenizer, choice.format, name, _CODE
        types = choice.features or {}
        self.columns = {ours: (theirs, types.get(theirs)) for ours, theirs in choice.names.items()}

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        columns = [[plain(value, kind) for value in batch[theirs]] for theirs, kind in self.columns.values()]
        rows = [dict(zip(self.columns, row, strict=True)) for row in zip(*columns, strict=True)]
        groups = []
        if self.source.read is None:
            groups = [self._at(index, _tokens, row) for index, row in zip(indices, rows, strict=True)]
        else:
            examples = [self._at(index, self._read, row) for index, row in zip(indices, rows, strict=True)]
            for example, sequences in zip(examples, self._tokenize(examples, indices), strict=True):
                groups.append(self._split(example, *sequences))
        for index, row, group in zip(indices, rows, groups, strict=True):
            if "ref_chosen_logps" in row:
                known = self._at(index, _reference_logps, row)
                group["ref_logps"] = known if group["completion_ids"] else []
            if "weight" in row:
                weight = self._at(index, row_weight, row)
                group["comparison_weights"] = [weight * each for each in group["comparison_weights"]]
            if "offset" in row:
                group["comparison_offsets"] = [self._at(index, row_offset, row)] * len(group["comparisons"])
        return {column: [group[column] for group in groups] for column in groups[0]}

    def _at(self, index: int, function, *args):
        try:
            return function(*args)
        except ValueError as error:
            raise InputError(f"{self.name} dataset, row {index}: {error}") from error

    def _read(self, row: Row) -> Example:
        example = self.source.read(row)
        if taken := sorted(_TAKEN & example.template_arguments.keys()):
            raise InputError(
                f"column 'chat_template_kwargs': {taken[0]!r} ({example.template_arguments[taken[0]]!r}) is no "
                "argument of a chat template but of apply_chat_template, and would change what it returns; leave it out"
            )
        if example.conversational:
            template = example.template_arguments.get("chat_template") or getattr(self.tokenizer, "chat_template", None)
            if role := unknown_role([*example.prompt, *chain(*example.completions)], template):
                raise InputError(
                    f"messages: role {role!r} is unknown, and the chat template does not name it; use one of "
                    f"{', '.join(sorted(KNOWN_ROLES))}"
                )
        return example

    def _refuse_parts_as_they_are(self, example: Example, sequences: list[list[int]]) -> None:
        """Refuse a content in parts where the template wrote the list of parts instead of their text."""
        for completion, ids in zip(example.completions, sequences, strict=True):
            parts = [
                part for message in example.prompt + completion if in_parts(message) for part in message["content"]
            ]
            if parts:
                whole, said = self.tokenizer.decode(ids), "\n".join(part[part["type"]] for part in parts)
                if any(whole.count(mark) > said.count(mark) for mark in _WRITTEN_OUT):
                    raise InputError(
                        "messages: the chat template writes a content in parts, [{'type': 'text', …}], as it is; give "
                        "the content as text"
                    )

    def _split(self, example: Example, prompt: list[int], *whole: list[int]) -> Row:
        if whole:
            start = min(_common_prefix_length(prompt, ids) for ids in whole)
            group = _group(prompt[:start], [ids[start:] for ids in whole], example.comparisons)
            group["lost_prompt"] = self.tokenizer.decode(prompt[start:]) if start < len(prompt) else ""
        else:
            group = _group([], [], [])
        if example.weights is not None and whole:
            group["comparison_weights"] = example.weights
        if example.scores is not None:
            group["completion_scores"] = example.scores if whole else []
        return group

    def _tokenize(self, examples: list[Example], indices: list[int]) -> list[list[list[int]]]:
        """Ids of the prompt and of every prompt+completion; alike examples share one call of the tokenizer."""
        sequences: list[list[list[int]]] = [[[]] for _ in examples]
        alike = defaultdict(list)
        for k, example in enumerate(examples):
            if not example.conversational:
                alike["text"].append(k)
            elif example.prompt:
                alike[json.dumps(example.template_arguments, sort_keys=True, default=repr)].append(k)
        for key, members in alike.items():
            group = [examples[k] for k in members]
            if key == "text":
                tokenized = self._tokenize_text(group, [indices[k] for k in members])
            else:
                tokenized = self._tokenize_conversations(group, [indices[k] for k in members])
            for k, ids in zip(members, tokenized, strict=True):
                sequences[k] = ids
        return sequences

    def _tokenize_text(self, examples: list[Example], indices: list[int]) -> list[list[list[int]]]:
        eos = self.tokenizer.eos_token
        if eos is None:
            raise InputError(
                "tokenizer: it has no eos_token, which ends every completion of plain text; set tokenizer.eos_token"
            )
        texts = []
        for example in examples:
            ended = [text if text.endswith(eos) else text + eos for text in example.completions]
            texts += [example.prompt, *(example.prompt + text for text in ended)]
        try:
            tokenized = iter(self.tokenizer(text=texts)["input_ids"])
        except Exception as error:
            return self._one_by_one(self._tokenize_text, examples, indices, "the tokenizer", error)
        return [[next(tokenized) for _ in range(1 + len(example.completions))] for example in examples]

    def _tokenize_conversations(self, examples: list[Example], indices: list[int]) -> list[list[list[int]]]:
        """The same for conversations whose template arguments are equal."""
        arguments = examples[0].template_arguments
        if "chat_template" not in arguments and getattr(self.tokenizer, "chat_template", None) is None:
            raise InputError(
                "tokenizer: it has no chat_template, which conversational rows need; use an instruct model's "
                "tokenizer, set tokenizer.chat_template, or give prompt, chosen and rejected as plain text"
            )
        whole = [example.prompt + completion for example in examples for completion in example.completions]
        try:
            prompts = self._render([example.prompt for example in examples], add_generation_prompt=True, **arguments)
            tokenized = iter(self._render(whole, **arguments))
        except Exception as error:
            return self._one_by_one(self._tokenize_conversations, examples, indices, "the chat template", error)
        found = []
        for example, prompt, index in zip(examples, prompts, indices, strict=True):
            sequences = [next(tokenized) for _ in example.completions]
            self._at(index, self._refuse_parts_as_they_are, example, sequences)
            found.append([prompt, *sequences])
        return found

    def _one_by_one(
        self, tokenize: Callable, examples: list[Example], indices: list[int], what: str, error: Exception
    ) -> list[list[list[int]]]:
        """Find the row to name: templates and tokenizers may refuse one with any exception."""
        if len(examples) == 1:
            raise InputError(f"{self.name} dataset, row {indices[0]}: {what} failed: {error}") from error
        pairs = zip(examples, indices, strict=True)
        return [ids for example, index in pairs for ids in tokenize([example], [index])]

    def _render(self, conversations: list[list[dict]], **arguments: Any) -> list[list[int]]:
        output = self.tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True, **arguments)
        return output["input_ids"]


def _common_prefix_length(left: list[int], right: list[int]) -> int:
    if right[: len(left)] == left:
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), len(right))


def _tokens(row: Row) -> Row:
    for column in TOKENIZED.required:
        check_type(row[column], COLUMNS["prompt_ids"].type, column)
    return _group(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]], [(0, 1)])


def _reference_logps(row: Row) -> list[float]:
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    for column in columns:
        check_type(row[column], element_type(COLUMNS["ref_logps"].type), column)
        check_logps([row[column]], column)
    return [row[column] for column in columns]


def _group(prompt: list[int], completions: list[list[int]], comparisons: list) -> Row:
    group = {"prompt_ids": prompt, "completion_ids": completions, "comparisons": comparisons}
    return {**with_defaults(group), "lost_prompt": ""}
