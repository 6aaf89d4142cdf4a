"""The reference pass: a tokenised dataset → reference log-probs, running only completions that the store lacks.

Completions of one prompt run together, in whatever rows they stand, and one that occurs twice runs once. Prompts go
longest first into batches of equal token counts under a budget. A batch depends on nothing but the prompts that are
still to come, so a pass that was killed goes on with the very batches that it would have run, and ends with the same
numbers bit by bit. Packing the next batch and writing the last one happen beside the running one. On a CUDA device
another is queued behind that, so the device waits neither for the host nor for the store.

A dataset is gone through in windows, which bounds the memory that the plan takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from torch import Tensor

from dpo_fast.batches.groups import Layout, PreferenceGroup
from dpo_fast.batches.packing import PackedBatch, pack
from dpo_fast.data.columns import WINDOW, token_tables
from dpo_fast.errors import InputError
from dpo_fast.reference.progress import show_pass
from dpo_fast.reference.readback import Readback, in_order
from dpo_fast.reference.store.keys import CompletionKeys, key_array, prompt_keys
from dpo_fast.reference.store.parts import sequence_logp
from dpo_fast.reference.store.store import ReferenceStore

logger = logging.getLogger(__name__)

RunReference = Callable[[PackedBatch], Tensor]  # a packed batch on the host → token log-probs [N], without gradient
Column = Literal["ref_logps", "ref_token_logps"]

TOKENS_PER_BATCH = {"cuda": 32768}  # others: 8192


class Shard(NamedTuple):
    """A share of the prompts: those that one of several processes runs."""

    index: int = 0
    count: int = 1

    def has(self, prompt_key: bytes) -> bool:
        return int.from_bytes(prompt_key[:8], "big") % self.count == self.index


@dataclass
class PassReport:
    """What a pass found and did.

    Attributes:
        completions: different ones per window of the dataset.
        computed: those that the store lacked and this process ran.
    """

    completions: int = 0
    computed: int = 0


# ---- the plan ----


@dataclass(frozen=True)
class _Unit:
    """A prompt and the completions that run after it, without comparisons."""

    group: PreferenceGroup
    keys: list[bytes]
    cost: int


def _plan(
    rows: pa.Table,
    keys: CompletionKeys,
    found: np.ndarray,  # bool [completions]
    layout: Layout,
    max_tokens: int,
    shard: Shard,
) -> list[_Unit]:
    """What is to run, longest first.

    Which completions run together is decided over all of a prompt's, those in the store included, so that it stays the
    same when a pass goes on.
    """
    prompts = prompt_keys(rows)
    lacking = {prompts[row] for row in np.flatnonzero(~_whole(keys, found)) if shard.has(prompts[row])}
    chosen = [row for row, prompt in enumerate(prompts) if prompt in lacking]
    completions: dict[bytes, dict[bytes, tuple[Sequence[int], int]]] = {prompts[row]: {} for row in chosen}
    prompt_ids: dict[bytes, Sequence[int]] = {}
    missing: set[bytes] = set()
    for row, group in zip(chosen, _groups(rows, chosen), strict=True):
        here = slice(*keys.bounds[row : row + 2])
        names = [value.astype(">u8").tobytes() for value in keys.values[here]]
        prompt_ids[prompts[row]] = group.prompt_ids
        tokens = zip(group.completion_ids, group.contexts, strict=True)
        completions[prompts[row]].update(zip(names, tokens, strict=True))
        missing.update(name for name, known in zip(names, found[here], strict=True) if not known)
    units = []
    for prompt, of_prompt in completions.items():
        for part in _parts(prompt_ids[prompt], list(of_prompt.items()), max_tokens):
            to_run = {key: value for key, value in part if key in missing}
            if to_run:
                units.append(_unit(prompt_ids[prompt], to_run, layout))
    return sorted(units, key=lambda unit: (-unit.cost, unit.keys[0]))


def _whole(keys: CompletionKeys, found: np.ndarray) -> np.ndarray:
    """Which groups lack nothing, bool [groups]."""
    lacking = np.cumsum(np.concatenate([[0], ~found]))
    return lacking[keys.bounds[1:]] == lacking[keys.bounds[:-1]]


def _groups(rows: pa.Table, chosen: Sequence[int]) -> list[PreferenceGroup]:
    return [PreferenceGroup.from_row(row) for row in rows.take(np.array(chosen, np.int64)).to_pylist()]


def _parts(prompt_ids: Sequence[int], completions: list[tuple[bytes, Any]], max_tokens: int) -> Iterator[list]:
    """Cuts the completions of a prompt that are too many for one batch."""
    part, cost = [], len(prompt_ids)
    for key, (ids, context) in completions:
        if part and cost + len(ids) > max_tokens:
            yield part
            part, cost = [], len(prompt_ids)
        part.append((key, (ids, context)))
        cost += len(ids)
    yield part


def _unit(prompt_ids: Sequence[int], completions: dict[bytes, tuple[Sequence[int], int]], layout: Layout) -> _Unit:
    ids, contexts = zip(*completions.values(), strict=True)
    group = PreferenceGroup(prompt_ids, ids, (), (), context_lengths=contexts)
    return _Unit(group, list(completions), group.num_tokens(layout))


def _end_of_batch(
    totals: np.ndarray,  # [units + 1], tokens before each unit, and all of them
    start: int,
    max_tokens: int,
) -> int:
    """Where the batch that begins at `start` ends: what is left, in as few batches as fit, of equal size."""
    remaining = totals[-1] - totals[start]
    size = remaining / -(-remaining // max_tokens)
    stop = int(np.searchsorted(totals, totals[start] + size))
    if totals[stop] - totals[start] > max_tokens:
        stop -= 1
    return max(stop, start + 1)


# ---- running it ----


class ReferencePass:
    """Runs the reference on completions that a store lacks, and puts what it finds into the store.

    Args:
        store: what is known already, and where the results go.
        score: runs the reference.
        layout: of the packed batches.
        max_tokens: bound on the packed tokens of a forward pass; unless given 32768 on CUDA, 8192 on other devices.
            Where the memory does not suffice it is halved.
        shard: which prompts to run.
        device: where the reference runs; batches for a CUDA device are in pinned memory.

    Attributes:
        report: what it found and did so far.
    """

    def __init__(
        self,
        store: ReferenceStore,
        score: RunReference,
        *,
        layout: Layout,
        max_tokens: int | None = None,
        shard: Shard = Shard(),  # noqa: B008 (frozen)
        device: torch.device = torch.device("cpu"),  # noqa: B008 (frozen)
    ):
        self._store, self._score, self._layout, self._shard = store, score, layout, shard
        self._max_tokens = max_tokens or TOKENS_PER_BATCH.get(device.type, 8192)
        self._pins = device.type == "cuda"
        self.report = PassReport()

    def over(self, dataset: Dataset, keys: CompletionKeys, name: str) -> None:
        """Runs on a tokenised dataset, columns named as the attributes of `PreferenceGroup`, and saves the store.

        Raises:
            ValueError: a single prompt with a completion does not fit the device's memory, or the reference's
                log-probs are NaN.
        """
        start = 0
        try:
            for rows in token_tables(dataset):
                stop = start + len(rows)
                self.run(rows, keys.window(start, stop), name)
                start = stop
        finally:  # what was computed is kept, whatever ends the pass
            self._store.save()
        logger.info(
            "reference log-probs of %s: %d of %d completions computed, the others were in %s",
            name, self.report.computed, self.report.completions, self._store.folder,
        )  # fmt: skip

    def run(self, rows: pa.Table, keys: CompletionKeys, name: str | None = None) -> None:
        """Runs on some groups that are planned together; with a name, a person sees how far the pass is."""
        found, _, _ = self._store.lookup(keys.values)
        self.report.completions += len(np.unique(keys.values[:, 0]))
        if found.all():
            return
        units = _plan(rows, keys, found, self._layout, self._max_tokens, self._shard)
        title = name and f"Reference log-probs of {name}"
        with show_pass(title, sum(unit.cost for unit in units), "tokens") as have_run:
            for (batch, bounds), logps in in_order(self._scored(units)):
                pieces = np.split(_checked(logps), bounds)
                self._store.add(key_array([key for unit in batch for key in unit.keys]), pieces)
                self.report.computed += len(pieces)
                have_run(sum(unit.cost for unit in batch))

    def sums(self, groups: Sequence[PreferenceGroup]) -> np.ndarray:
        """Runs groups, whatever the store has, and keeps nothing.

        Returns:
            the log-probs of their completions, fp32, in the order of the groups.
        """
        units = [_Unit(group, [], group.num_tokens(self._layout)) for group in groups]
        order = sorted(range(len(units)), key=lambda number: -units[number].cost)
        pieces: list[np.ndarray] = []
        for (_, bounds), logps in in_order(self._scored([units[number] for number in order])):
            pieces += np.split(logps, bounds)
        found, of_group = iter(pieces), {}
        for number in order:
            of_group[number] = [sequence_logp(next(found)) for _ in groups[number].completion_ids]
        return np.array([logp for number in range(len(units)) for logp in of_group[number]], np.float32)

    def _scored(self, units: list[_Unit]) -> Iterator[tuple[tuple[list[_Unit], list[int]], Readback]]:
        """Yields batches, where their completions end, and their token log-probs; the next is packed meanwhile."""
        totals = np.array([0, *accumulate(unit.cost for unit in units)])

        def prepare(start: int) -> tuple[int, PackedBatch | None]:
            if start == len(units):
                return start, None
            stop = _end_of_batch(totals, start, self._max_tokens)
            packed = pack([unit.group for unit in units[start:stop]], self._layout)
            return stop, packed.pin_memory() if self._pins else packed

        start = 0
        with ThreadPoolExecutor(1, thread_name_prefix="dpo_fast-pack") as executor:
            ahead = executor.submit(prepare, start)
            while start < len(units):
                stop, packed = ahead.result()
                ahead = executor.submit(prepare, stop)
                try:
                    readback = Readback(self._score(packed))
                except RuntimeError as error:
                    if not should_reduce_batch_size(error):
                        raise
                    self._shrink(packed.num_tokens, stop - start, error)
                    ahead = executor.submit(prepare, start)
                else:
                    yield (units[start:stop], packed.score_layout.host_cu_scores[1:-1].tolist()), readback
                    start = stop

    def _shrink(self, tokens: int, prompts: int, error: RuntimeError) -> None:
        if prompts == 1:
            raise InputError(
                f"max_length: the memory does not suffice for the reference pass on a single prompt and completions of "
                f"{tokens} tokens; lower max_length, or take a larger device"
            ) from error
        self._max_tokens = tokens // 2
        logger.warning("out of memory in the reference pass: it goes on with %d tokens a batch", self._max_tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _checked(values: np.ndarray) -> np.ndarray:
    if np.isnan(values).any():  # kept, it would spoil every later run
        raise InputError(
            f"ref_model: {int(np.isnan(values).sum())} of a batch's {len(values)} token log-probs are NaN and were not "
            "kept; a weight of the reference is NaN or inf, or it overflows in its dtype: take a checkpoint that has "
            "not diverged, or load it in bf16 or fp32"
        )
    return values


# ---- results ----


def with_reference_logps(
    dataset: Dataset, keys: CompletionKeys, store: ReferenceStore, column: Column = "ref_logps"
) -> Dataset:
    """Adds reference log-probs, of completions or of all their tokens, from a store that has them all.

    Raises:
        ValueError: the store lacks some.
    """
    if column in dataset.column_names:
        dataset = dataset.remove_columns(column)
    parts = [keys.window(start, start + WINDOW) for start in range(0, len(keys), WINDOW)]
    return dataset.add_column(column, pa.chunked_array([reference_column(part, store, column) for part in parts]))


def reference_column(keys: CompletionKeys, store: ReferenceStore, column: Column) -> pa.ListArray:
    """Reference log-probs of some groups, a list for each, or for `ref_token_logps` a list of lists."""
    found, logps, _ = store.lookup(keys.values)
    if not found.all():
        raise InputError(
            f"store: {store.folder} lacks {int((~found).sum())} of {len(found)} reference log-probs; run the reference "
            "pass on this dataset, all of its shards, to the end, and let all machines see its reference_cache_dir"
        )
    if column == "ref_logps":
        values = pa.array(logps, pa.float32())
    else:
        values = pa.array(store.token_logps(keys.values), pa.list_(pa.float32()))
    return pa.ListArray.from_arrays(pa.array(keys.bounds, pa.int32()), values)
