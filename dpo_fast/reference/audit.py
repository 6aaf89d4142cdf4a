"""The audit of a reference store: does it still say what the reference says?

Rows that another process has written are sampled before they are served, and the live reference runs the sample again.
240 groups drawn uniformly miss a store of which 2 % is wrong in 0.8 % of audits (0.98^240), whatever its size. They may
cost 1 % of a pass over the rows that are audited, but 512 tokens in any case. Where that is too little, 240 groups are
drawn from the cheaper half of the rows, the cheaper quarter, the cheapest eighth. Where no draw fits, the last one is
cut to what does: of 10 000 rows of one length 100 groups run, which miss 2 % in 13 % of audits.

A note in the store's folder says which rows were sampled, in which environment. Later runs there sample 512 tokens.
Parts that do not name their store may be anybody's: 240 groups of these run, whatever they cost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from dpo_fast.batches.groups import Layout, PreferenceGroup
from dpo_fast.data.columns import KEY_COLUMNS, token_tables
from dpo_fast.errors import InputError
from dpo_fast.reference.audit_notes import AuditNotes
from dpo_fast.reference.compute import Shard
from dpo_fast.reference.store.keys import CompletionKeys, group_keys, key_array, prompt_keys
from dpo_fast.reference.store.store import ReferenceStore

logger = logging.getLogger(__name__)

GROUPS = 240
SHARE = 0.01  # of a pass over the rows that are audited
TOKENS = 512  # that are run again in any case, but at least one group

SumGroups = Callable[[Sequence[PreferenceGroup]], np.ndarray]  # log-probs of their completions, fp32, in their order


def sample(
    costs: np.ndarray,  # int64 [groups], tokens
    budget: float,
    generator: np.random.Generator,
    count: int = GROUPS,
    at_least: int = 1,
) -> np.ndarray:
    """Draw groups to run again, within a budget of tokens: their numbers, in any order.

    Args:
        at_least: groups, the cheapest, that are taken where none fits.
    """
    pool = np.arange(len(costs))
    for divisor in (1, 2, 4, 8):
        if divisor == 2:
            pool = np.argsort(costs, kind="stable")
        pool = pool[: -(-len(costs) // divisor)]
        chosen = generator.choice(pool, min(count, len(pool)), replace=False)
        if costs[chosen].sum() <= budget:
            return chosen
    fitting = chosen[np.cumsum(costs[chosen]) <= budget]
    return fitting if len(fitting) else pool[:at_least]


@dataclass
class Difference:
    """What running some groups again has shown.

    Attributes:
        wrong: which completions the store has wrong, bool [completions].
        stored, found, allowed: log-probs of the store, those of the reference now, and how far rounding may move them.
    """

    wrong: np.ndarray
    stored: np.ndarray
    found: np.ndarray
    allowed: np.ndarray


def compare(
    groups: Sequence[PreferenceGroup], store: ReferenceStore, run: SumGroups, *, layout: Layout, dtype: torch.dtype
) -> Difference:
    """Run groups without comparisons again, in other company than before, and compare with what the store has.

    Rounding may move a log-prob by 1e-4 nat, 2e-6 of itself, and four of the dtype's steps (0.03 nat in bf16) for each
    token, adding up as errors of either sign do. Where that does not explain a difference, the groups run once more in
    another batch, and four times the largest difference of these two runs is what rounding may do on top.
    """
    stored = store.lookup(key_array([key for group in groups for key in group_keys(group)]))[1]
    found = run(groups)
    tokens = np.array([len(ids) for group in groups for ids in group.completion_ids])
    allowed = 1e-4 + 2e-6 * np.abs(found) + 4 * torch.finfo(dtype).eps * np.sqrt(tokens)
    wrong = ~(np.abs(stored - found) <= allowed)  # of NaN too
    if wrong.any():
        of_group = np.repeat(np.arange(len(groups)), [len(group.completion_ids) for group in groups])
        again = _with_company(groups, np.unique(of_group[wrong]).tolist(), layout)
        here = np.concatenate([np.flatnonzero(of_group == number) for number in again])
        few = [groups[number] for number in again]
        twice = run([*few, *few])[: len(here)]
        allowed[here] += 4 * np.abs(twice - found[here]).max()
        error = np.minimum(np.abs(stored - found)[here], np.abs(stored[here] - twice))
        wrong[here] = ~(error <= allowed[here])
    return Difference(wrong, stored, found, allowed)


def _with_company(groups: Sequence[PreferenceGroup], numbers: list[int], layout: Layout) -> list[int]:
    """Some groups, and others beside them until the tokens of a small audit are reached."""
    tokens = sum(groups[number].num_tokens(layout) for number in numbers)
    for number in sorted({*range(len(groups))}.difference(numbers), key=lambda n: groups[n].num_tokens(layout)):
        tokens += groups[number].num_tokens(layout)
        if tokens > TOKENS:
            break
        numbers.append(number)
    return numbers


def refuse_wrong(difference: Difference, folder: str) -> None:
    """Raise where a difference shows anything wrong.

    Raises:
        ValueError: the store's numbers are not the reference's.
    """
    if not difference.wrong.any():
        return
    error = np.abs(difference.stored - difference.found) / difference.allowed
    worst = int(np.where(difference.wrong, np.nan_to_num(error, nan=np.inf), -1).argmax())
    raise InputError(
        f"reference_cache_dir: {folder} holds a reference log-prob of {difference.stored[worst]:.6f} nat where the "
        f"reference gives {difference.found[worst]:.6f} now, further off than the {difference.allowed[worst]:.1g} that "
        f"rounding explains ({difference.wrong.sum()} of {len(difference.wrong)} rows that ran again). Likely another "
        "version of PyTorch or of a kernel, another device or TF32 setting computed it. Name another "
        "reference_cache_dir (under TRL, set the environment variable DPO_FAST_CACHE to another folder) to compute all "
        "anew beside it. Remove the folder instead only if no other program uses it"
    )


class _Population(NamedTuple):
    """Groups of which an audit takes a sample.

    Attributes:
        costs: tokens of each, int64 [groups].
        take: their rows, by their numbers.
    """

    keys: CompletionKeys
    costs: np.ndarray
    take: Callable[[np.ndarray], pa.Table]


@dataclass
class _Account:
    """Tokens of an audit: of the rows that it is about, and of those that ran again."""

    share: float
    seen: int = 0
    spent: int = 0

    def sample(self, costs: np.ndarray, generator: np.random.Generator, count: int) -> np.ndarray:
        self.seen += int(costs.sum())
        left = max(TOKENS, self.share * self.seen) - self.spent
        chosen = sample(costs, left, generator, count, at_least=not self.spent)
        self.spent += int(costs[chosen].sum())
        return chosen


def _accounts() -> dict[bool, _Account]:
    """One for rows that need a full sample, another for those that have had it."""
    return {full: _Account(SHARE if full else 0.0) for full in (True, False)}


class _Origins(NamedTuple):
    """Where rows come from.

    Attributes:
        names: of parts; "" for rows of this process and missing ones.
        number: of each completion's in `names`, int64 [completions].
    """

    names: list[str]
    number: np.ndarray

    def are_in(self, names: Collection[str]) -> np.ndarray:  # bool [completions]
        return np.array([name in names for name in self.names], bool)[self.number]

    def counts(self, completions: np.ndarray) -> dict[str, int]:
        """Rows of each part among some completions, by their numbers or bool [completions]."""
        counts = np.bincount(self.number[completions], minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, counts, strict=True) if name and count}

    def marks(self, keys: np.ndarray) -> np.ndarray:  # uint64 [completions]
        """What tells rows apart, each by its key and its part."""
        of_part = [int(name[5:21], 16) if name else 0 for name in self.names]  # the beginning of its hash
        return keys[:, 0] ^ np.array(of_part, np.uint64)[self.number]


class StoreAudit:
    """Samples what a store has from other processes, before it is served.

    Args:
        run: runs groups on the reference, whatever the store has.
        layout: of the packed batches.
        dtype: of the computation.
        shard: whose prompts this process runs and audits.
    """

    def __init__(self, store: ReferenceStore, run: SumGroups, *, layout: Layout, dtype: torch.dtype, shard: Shard):
        self._store, self._run, self._layout, self._dtype, self._shard = store, run, layout, dtype, shard
        self._generator = np.random.default_rng()
        self._notes = AuditNotes(store.folder)
        self._covered = np.zeros(0, np.uint64)  # marks of rows whose dataset was audited
        self._counts: dict[str, int] = {}  # the same, for each part
        self._of_stream = _accounts()
        self._unnamed_groups = 0  # of a stream, that were found right since parts were adopted
        self._warned = False

    def of_dataset(self, dataset: Dataset, keys: CompletionKeys) -> None:
        """Audit what the store has of a dataset and was not audited yet.

        Raises:
            ValueError: the store's numbers are not the reference's.
        """
        known, origins = self._known(keys)
        if len(known):
            rows = dataset.select_columns([name for name in KEY_COLUMNS if name in dataset.column_names])
            rows = rows.with_format("arrow")
            if self._shard.count > 1:
                prompts = [prompt for table in token_tables(dataset) for prompt in prompt_keys(table)]
                known = np.array([number for number in known if self._shard.has(prompts[number])], np.int64)
            costs = np.concatenate([group_costs(table, self._layout) for table in token_tables(dataset)])
            population = _Population(keys, costs, lambda numbers: rows[numbers.tolist()])
            known, origins = self._audit(known, origins, population, _accounts(), adopted_at=0)
            here = _of_groups(keys, known)
            self._covered = np.union1d(self._covered, origins.marks(keys.values)[here])
            for name, count in origins.counts(here).items():
                self._counts[name] = self._counts.get(name, 0) + count
        self._notes.add({**self._counts, **dict.fromkeys(self._store.own_parts)})

    def of_rows(self, rows: pa.Table, keys: CompletionKeys) -> None:
        """Audit some rows of a stream: as they come, a hundredth of the tokens that others have computed runs again.

        Raises:
            ValueError: the store's numbers are not the reference's.
        """
        known, origins = self._known(keys)
        if len(known):
            population = _Population(keys, group_costs(rows, self._layout), rows.take)
            self._audit(known, origins, population, self._of_stream, GROUPS - self._unnamed_groups)

    def warn_of_unaudited(self, keys: CompletionKeys) -> None:
        """Say once that rows are served which the reference, which is gone, can run no more."""
        known, origins = self._known(keys)
        if len(known) and not self._warned and self._uncovered(known, origins, keys):
            self._warned = True
            logger.warning(
                "%d of %d groups come from parts of %s that no audit has covered, and the reference is not there to "
                "run them again; give their dataset to the constructor (eval_dataset=…), and they are audited",
                len(known), len(keys), self._store.folder,
            )  # fmt: skip

    def _known(self, keys: CompletionKeys) -> tuple[np.ndarray, _Origins]:
        """Groups that have rows in the store from another process that were not audited yet."""
        own, numbers = {None, *self._store.own_parts}, {"": 0}
        parts = ("" if name in own else name for name in self._store.parts_of(keys.values))
        number = np.fromiter((numbers.setdefault(name, len(numbers)) for name in parts), np.int64, len(keys.values))
        origins, fresh = _Origins([*numbers], number), number > 0
        if not fresh.any():
            return np.zeros(0, np.int64), origins
        fresh &= ~np.isin(origins.marks(keys.values), self._covered)
        return np.flatnonzero(_any(keys, fresh)), origins

    def _uncovered(self, known: np.ndarray, origins: _Origins, keys: CompletionKeys) -> set[str]:
        """Parts of which no audit has covered as many rows as this process reads."""
        counts = origins.counts(_of_groups(keys, known)).items()
        return {name for name, count in counts if not self._notes.cover(name, count + self._counts.get(name, 0))}

    def _audit(
        self,
        known: np.ndarray,
        origins: _Origins,
        population: _Population,
        accounts: dict[bool, _Account],
        adopted_at: int,
    ) -> tuple[np.ndarray, _Origins]:
        """Return what is known afterwards, as `_known` does: without what was set aside, in the parts of now."""
        right = np.zeros(0, np.int64)
        if not {*self._store.unnamed_parts}.isdisjoint(origins.names):
            right = self._check_unnamed(known, origins, population, adopted_at)
            again, origins = self._known(population.keys)
            known = np.intersect1d(known, again)
        self._check(np.setdiff1d(known, right), origins, population, accounts)
        return known, origins

    def _compare(self, chosen: np.ndarray, population: _Population) -> tuple[Difference, np.ndarray]:
        """Run what the store has of some groups again; return what that shows, and the completions' numbers."""
        numbers = _completions(population.keys, chosen)
        found, _, _ = self._store.lookup(population.keys.values[numbers])
        kept, groups = iter(found.tolist()), []
        for row in population.take(chosen).to_pylist():
            group = PreferenceGroup.from_row(row)
            here = [completion for completion in range(len(group.completion_ids)) if next(kept)]
            ids, contexts = (
                [values[completion] for completion in here] for values in (group.completion_ids, group.contexts)
            )
            groups.append(PreferenceGroup(group.prompt_ids, ids, (), (), context_lengths=contexts))
        difference = compare(groups, self._store, self._run, layout=self._layout, dtype=self._dtype)
        return difference, numbers[found]

    def _check_unnamed(
        self, known: np.ndarray, origins: _Origins, population: _Population, adopted_at: int
    ) -> np.ndarray:
        """Set parts aside that do not name their store and are wrong; adopt others once enough groups were right.

        Returns:
            the groups that were found right, int64 [groups].
        """
        keys, right = population.keys, np.zeros(0, np.int64)
        while unnamed := {*self._store.unnamed_parts}.intersection(origins.names):
            groups = known[_any(keys, origins.are_in(unnamed))[known]]
            if not len(groups):
                break
            chosen = groups[sample(population.costs[groups], np.inf, self._generator)]
            difference, completions = self._compare(chosen, population)
            wrong = unnamed & origins.counts(completions[difference.wrong]).keys()
            if wrong:
                self._store.reject(sorted(wrong), "names no store, and has rows that the reference does not give")
                again, origins = self._known(keys)
                known = np.intersect1d(known, again)
                continue
            refuse_wrong(difference, self._store.folder)
            self._unnamed_groups += len(chosen)
            right = chosen
            if len(chosen) >= adopted_at:
                self._store.adopt(sorted(origins.counts(_of_groups(keys, groups)).keys() & unnamed))
                self._unnamed_groups, right = 0, groups
            break
        return right

    def _check(
        self, known: np.ndarray, origins: _Origins, population: _Population, accounts: dict[bool, _Account]
    ) -> None:
        uncovered = _any(population.keys, origins.are_in(self._uncovered(known, origins, population.keys)))[known]
        count = -(-GROUPS // self._shard.count)
        chosen = [
            groups[accounts[full].sample(population.costs[groups], self._generator, count)]
            for full, groups in ((True, known[uncovered]), (False, known[~uncovered]))
            if len(groups)
        ]
        numbers = np.concatenate([np.zeros(0, np.int64), *chosen])
        if len(numbers):
            refuse_wrong(self._compare(numbers, population)[0], self._store.folder)


# ---- of many groups ----


def group_costs(table: pa.Table, layout: Layout) -> np.ndarray:  # int64 [groups]
    """Return the tokens that each group occupies alone, as `PreferenceGroup.num_tokens` does."""
    prompts, groups = (table[name].combine_chunks() for name in ("prompt_ids", "completion_ids"))
    counts, prompts = (np.asarray(pc.list_value_length(lists), np.int64) for lists in (groups, prompts))
    lengths = np.asarray(pc.list_value_length(groups.flatten()), np.int64)
    starts = np.cumsum(counts) - counts
    if layout == "shared":
        return prompts + np.add.reduceat(lengths, starts)
    return (prompts + np.maximum.reduceat(lengths, starts)) * counts


def _any(keys: CompletionKeys, of_completions: np.ndarray) -> np.ndarray:
    """Which groups have a completion of which it is true, bool [groups]."""
    before = np.cumsum(np.concatenate([[0], of_completions]))
    return before[keys.bounds[1:]] > before[keys.bounds[:-1]]


def _of_groups(keys: CompletionKeys, groups: np.ndarray) -> np.ndarray:
    """Which completions are of some groups, bool [completions]."""
    chosen = np.zeros(len(keys), bool)
    chosen[groups] = True
    return np.repeat(chosen, np.diff(keys.bounds))


def _completions(keys: CompletionKeys, groups: np.ndarray) -> np.ndarray:
    """The numbers of the completions of some groups, in the order of these."""
    return np.concatenate([np.arange(*keys.bounds[group : group + 2]) for group in groups])
