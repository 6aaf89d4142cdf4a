"""What tells completions apart: a 128-bit hash of what the model sees.

blake2b(int64 prompt length + context length, int32 token ids of the prompt and of the completion)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from dpo_fast.errors import InputError

if TYPE_CHECKING:  # PyTorch is not needed to ask a store
    from dpo_fast.batches.groups import PreferenceGroup


def completion_key(prompt_ids: Sequence[int], completion_ids: Sequence[int], context_length: int = 0) -> bytes:
    """The key, 16 bytes, of a completion after its prompt; leading context of the completion counts as prompt."""
    started = _started(len(prompt_ids) + context_length, np.asarray(prompt_ids, "<i4"))
    started.update(np.asarray(completion_ids, "<i4"))
    return started.digest()


def _started(boundary: int, prompt_ids: np.ndarray | memoryview) -> hashlib.blake2b:
    started = hashlib.blake2b(boundary.to_bytes(8, "little"), digest_size=16)
    started.update(prompt_ids)
    return started


def key_array(keys: Sequence[bytes]) -> np.ndarray:
    """Keys of 16 bytes as their two big-endian halves, uint64 [n, 2]."""
    if any(len(key) != 16 for key in keys):
        raise InputError("keys: every key has 16 bytes, take them from completion_key")
    return np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).astype(np.uint64)


def group_keys(group: PreferenceGroup) -> list[bytes]:
    """The key of each completion."""
    completions = zip(group.completion_ids, group.contexts, strict=True)
    return [completion_key(group.prompt_ids, ids, context) for ids, context in completions]


# ---- of many rows ----


@dataclass(frozen=True)
class CompletionKeys:
    """The keys of all completions of some groups.

    Attributes:
        values: uint64 [completions, 2].
        bounds: int64 [groups + 1], where the completions of each group begin and end.
    """

    values: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of_tables(cls, tables: Iterable[pa.Table]) -> CompletionKeys:
        parts = [cls.of_table(table) for table in tables]
        values = np.concatenate([np.zeros((0, 2), np.uint64), *(part.values for part in parts)])
        counts = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.bounds) for part in parts)])
        return cls(values, np.cumsum(counts))

    @classmethod
    def of_table(cls, table: pa.Table) -> CompletionKeys:
        """Of groups in Arrow columns named as the attributes of `PreferenceGroup`."""
        prompts, groups = _array(table["prompt_ids"]), _array(table["completion_ids"])
        completions = groups.flatten()
        contexts = _contexts(table, groups)
        prompt_ids, completion_ids = _numbers(prompts), _numbers(completions)
        prompt_bounds, group_bounds, bounds = _bounds(prompts), _bounds(groups), _bounds(completions)
        keys = []
        for row in range(len(table)):
            prompt = prompt_ids[prompt_bounds[row] : prompt_bounds[row + 1]]
            started, known = None, -1
            for number in range(group_bounds[row], group_bounds[row + 1]):
                if contexts[number] != known:
                    known = contexts[number]
                    started = _started(len(prompt) + known, prompt)
                key = started.copy()
                key.update(completion_ids[bounds[number] : bounds[number + 1]])
                keys.append(key.digest())
        return cls(key_array(keys), np.asarray(group_bounds, np.int64))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def window(self, start: int, stop: int) -> CompletionKeys:
        """Of the groups from `start` to `stop`."""
        bounds = self.bounds[start : stop + 1]
        return CompletionKeys(self.values[bounds[0] : bounds[-1]], bounds - bounds[0])


def prompt_keys(table: pa.Table) -> list[bytes]:
    """The key of each prompt, the same for the same tokens."""
    ids, bounds = _numbers(_array(table["prompt_ids"])), _bounds(_array(table["prompt_ids"]))
    prompts = (ids[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False))
    return [_started(len(prompt), prompt).digest() for prompt in prompts]


def _contexts(table: pa.Table, groups: pa.ListArray) -> list[int]:
    if "context_lengths" not in table.column_names:
        return [0] * len(groups.flatten())
    given = table["context_lengths"]
    if not given.null_count:
        return _numbers(_array(given)).tolist()
    rows = zip(given.to_pylist(), groups.value_lengths().to_pylist(), strict=True)
    return [context for contexts, count in rows for context in contexts or [0] * count]


def _array(column: pa.ChunkedArray) -> pa.ListArray:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _bounds(lists: pa.ListArray) -> list[int]:
    """Where each list begins and ends in all of them, one after another."""
    return [0, *np.cumsum(lists.value_lengths().to_numpy()).tolist()]


def _numbers(lists: pa.ListArray) -> np.ndarray:
    """All of them, int32 [n]."""
    return lists.flatten().cast(pa.int32()).to_numpy().astype("<i4", copy=False)
