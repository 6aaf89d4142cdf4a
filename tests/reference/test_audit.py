"""The audit finds 2 % of wrong rows in 99 of 100 stores at a hundredth of a pass, and covers what others computed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.data.columns import token_tables
from dpo_fast.reference import audit_notes
from dpo_fast.reference.audit import GROUPS, SHARE, TOKENS, StoreAudit, group_costs, sample
from dpo_fast.reference.compute import ReferencePass, Shard
from dpo_fast.reference.store import parts
from dpo_fast.reference.store.files import is_note, is_ours
from dpo_fast.reference.store.keys import CompletionKeys
from dpo_fast.reference.store.maintenance import verify
from dpo_fast.reference.store.store import ReferenceStore

LOGP = -0.5  # of every token, as the reference of these tests has it


def rows(count: int, seed: int = 0, longest: int = 4) -> Dataset:
    """Pairs of short completions, of which no two are equal."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, (count, 3)).tolist()
    table = pa.table(
        {
            "prompt_ids": pa.array([[seed, number, *[1] * n] for number, (n, _, _) in enumerate(lengths)]),
            "completion_ids": pa.array([[[2] * a, [3] * b] for _, a, b in lengths]),
        }
    )
    return Dataset(table)


def keys_of(dataset: Dataset) -> CompletionKeys:
    return CompletionKeys.of_tables(token_tables(dataset))


class Run:
    """The reference: log-probs from a table, and a count of tokens."""

    def __init__(self) -> None:
        self.groups: list[PreferenceGroup] = []
        self.first: list[PreferenceGroup] = []  # of the first call

    def __call__(self, groups: list[PreferenceGroup]) -> np.ndarray:
        self.groups += groups
        self.first = self.first or groups
        return np.array([LOGP * len(ids) for group in groups for ids in group.completion_ids], np.float32)

    @property
    def tokens(self) -> int:
        return sum(group.num_tokens() for group in self.groups)


def fill(root: Path, dataset: Dataset, wrong: np.ndarray | None = None) -> ReferenceStore:
    """A store as another process leaves it, wrong for some of the completions."""
    store, keys = ReferenceStore(root, {}), keys_of(dataset)
    lengths = [
        len(ids) for table in token_tables(dataset) for row in table["completion_ids"].to_pylist() for ids in row
    ]
    off = np.zeros(len(lengths)) if wrong is None else 0.1 * wrong
    values = [np.full(n, LOGP - error, np.float32) for n, error in zip(lengths, off, strict=True)]
    store.add(keys.values, values)
    store.close()
    return store


def audit_of(root: Path, run: Run, shard: Shard = Shard(), seed: int = 0) -> StoreAudit:  # noqa: B008
    audit = StoreAudit(ReferenceStore(root, {}), run, layout="shared", dtype=torch.float32, shard=shard)
    audit._generator = np.random.default_rng(seed)
    return audit


# ---- the sample ----


def test_a_fiftieth_of_wrong_rows_is_found_in_99_of_100_audits():
    costs = np.random.default_rng(0).integers(5, 15, 25_000)
    budget, missed, spent, seeds = SHARE * costs.sum(), 0, [], 4000
    wrong = np.zeros(len(costs), bool)
    wrong[np.random.default_rng(1).choice(len(costs), len(costs) // 50, replace=False)] = True
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        chosen = sample(costs, budget, generator)
        missed += not wrong[chosen].any()
        spent.append(costs[chosen].sum())
    assert missed <= 0.01 * seeds and max(spent) <= budget


def test_the_same_in_stores_on_disk(tmp_path):
    """From files to the error: 25 000 groups of which one completion in fifty is wrong."""
    dataset = rows(25_000)
    total = sum(group_costs(table, "shared").sum() for table in token_tables(dataset))
    wrong = np.zeros(50_000, bool)
    wrong[np.random.default_rng(0).choice(25_000, 500, replace=False) * 2] = True
    fill(tmp_path, dataset, wrong)
    keys, found = keys_of(dataset), 0
    for seed in range(20):
        run = Run()
        with pytest.raises(ValueError, match="holds a reference log-prob of"):
            audit_of(tmp_path, run, seed=seed).of_dataset(dataset, keys)
        found += 1
        assert len({tuple(group.prompt_ids) for group in run.first}) == GROUPS
        assert sum(group.num_tokens() for group in run.first) <= SHARE * total
    assert found == 20


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=600), st.integers(1, 10**6), st.integers(0, 99))
def test_a_sample_stays_within_its_budget(costs, budget, seed):
    costs = np.array(costs)
    chosen = sample(costs, budget, np.random.default_rng(seed))
    assert len({*chosen.tolist()}) == len(chosen) >= 1
    if costs[chosen].sum() > budget:
        assert chosen.tolist() == [costs.argmin()], "no group fits, and one runs in any case"
    elif costs.sum() <= budget:
        assert len(chosen) == min(GROUPS, len(costs))
    if len(costs) > GROUPS and budget >= GROUPS * costs.max():
        assert len(chosen) == GROUPS


def test_dear_groups_are_left_out_before_the_sample_shrinks():
    costs = np.array([10_000] * 4000 + [10] * 4000)
    chosen = sample(costs, 20_000, np.random.default_rng(0))
    assert len(chosen) == GROUPS and (costs[chosen] == 10).all()


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_costs_are_those_of_groups(layout):
    dataset = rows(50, longest=9)
    dataset = Dataset.from_list([*dataset, {"prompt_ids": [7], "completion_ids": [[1], [2, 3], [4, 5, 6]]}])
    (table,) = token_tables(dataset)
    assert group_costs(table[3:], layout).tolist() == [
        PreferenceGroup.from_row({**row, "comparisons": []}).num_tokens(layout) for row in dataset.select(range(3, 51))
    ]


# ---- what it covers ----


def test_rows_of_others_are_audited_once_and_rows_of_this_process_never(tmp_path):
    theirs, ours, later = rows(30, seed=1), rows(30, seed=2), rows(30, seed=3)
    fill(tmp_path, concatenate_datasets([theirs, later]))
    run = Run()
    audit = audit_of(tmp_path, run)
    audit.of_dataset(theirs, keys_of(theirs))
    first = run.tokens
    assert first > 0
    audit.of_dataset(theirs.shuffle(seed=1), keys_of(theirs.shuffle(seed=1)))
    assert run.tokens == first, "they were audited before"
    audit._store.add(keys_of(ours).values, [np.zeros(3, np.float32)] * 60)
    audit.of_dataset(ours, keys_of(ours))
    audit._store.save()
    audit.of_dataset(ours, keys_of(ours))
    assert run.tokens == first, "this process has computed them"
    audit.of_dataset(later, keys_of(later))
    assert run.tokens > first, "rows of the same part that were not audited"


def test_a_row_that_another_process_has_added_meanwhile_is_audited(tmp_path):
    """Of equal keys the alphabetically first part is served, whoever computed the row first."""
    for seed in range(20):  # until the other process's part precedes
        dataset, keys, run = rows(20, seed), keys_of(rows(20, seed)), Run()
        audit = audit_of(tmp_path / str(seed), run)
        audit.of_dataset(dataset, keys)
        assert run.tokens == 0
        audit._store.add(keys.values, [np.full(1, LOGP, np.float32)] * 40)
        fill(tmp_path / str(seed), dataset, np.ones(40))
        audit._store.save()
        if any(part not in audit._store.own_parts for part in audit._store.parts_of(keys.values)):
            break
    with pytest.raises(ValueError, match="holds a reference log-prob of"):
        audit.of_dataset(dataset, keys)


def test_processes_share_the_sample_out(tmp_path):
    dataset = rows(2000)
    fill(tmp_path, dataset)
    runs = [Run() for _ in range(4)]
    for index, run in enumerate(runs):
        audit_of(tmp_path, run, Shard(index, 4)).of_dataset(dataset, keys_of(dataset))
    prompts = [{tuple(group.prompt_ids) for group in run.groups} for run in runs]
    assert all(prompts) and len(set.union(*prompts)) == sum(map(len, prompts))


def test_rows_of_a_stream_are_sampled_as_they_come(tmp_path):
    dataset = rows(20_000)
    total = sum(group_costs(table, "shared").sum() for table in token_tables(dataset))
    fill(tmp_path, dataset)
    run = Run()
    audit = audit_of(tmp_path, run)
    for start in range(0, len(dataset), 200):
        (table,) = token_tables(dataset.select(range(start, start + 200)))
        audit.of_rows(table, CompletionKeys.of_table(table))
        assert run.groups, "the first rows are not served without"
    assert 0.8 * SHARE * total <= run.tokens <= max(TOKENS, SHARE * total)
    fill(tmp_path / "wrong", dataset, np.ones(40_000))
    with pytest.raises(ValueError, match="holds a reference log-prob of"):
        audit_of(tmp_path / "wrong", Run()).of_rows(table, CompletionKeys.of_table(table))


def test_of_a_group_that_the_store_has_in_part_that_part_is_audited(tmp_path):
    dataset = rows(5)
    store, keys = ReferenceStore(tmp_path, {}), keys_of(dataset)
    store.add(keys.values[::2], [np.full(len(row["completion_ids"][0]), LOGP, np.float32) for row in dataset])
    store.close()
    for use in ("of_dataset", "of_rows"):
        run = Run()
        getattr(audit_of(tmp_path, run), use)(dataset if use == "of_dataset" else next(token_tables(dataset)), keys)
        assert sorted(group.completion_ids[0] for group in run.groups) == sorted(
            r["completion_ids"][0] for r in dataset
        )
        assert all(len(group.completion_ids) == 1 for group in run.groups)


# ---- what it remembers ----


def tokens_of_an_audit(root: Path, dataset: Dataset) -> int:
    run = Run()
    audit_of(root, run).of_dataset(dataset, keys_of(dataset))
    return run.tokens


def notes(root: Path) -> list[Path]:
    return [path for path in root.glob("*/*") if is_note(path.name)]


def test_a_full_sample_is_drawn_once_for_rows_and_environment(tmp_path, monkeypatch):
    dataset = rows(10_000)
    fill(tmp_path, dataset)
    few, many = dataset.select(range(6000)), dataset
    full = tokens_of_an_audit(tmp_path, few)
    assert full > TOKENS
    assert 0 < tokens_of_an_audit(tmp_path, few) <= TOKENS, "a note says that they were sampled"
    assert tokens_of_an_audit(tmp_path, many) > TOKENS, "more rows of the same part"
    assert tokens_of_an_audit(tmp_path, many) <= TOKENS and len(notes(tmp_path)) == 1
    added = rows(6000, seed=9)
    fill(tmp_path, added)
    both = concatenate_datasets([many, added])
    run = Run()
    audit_of(tmp_path, run).of_dataset(both, keys_of(both))
    of_new = [group for group in run.groups if group.prompt_ids[0] == 9]
    assert sum(group.num_tokens() for group in of_new) > TOKENS, "a part that the note does not know"
    assert sum(group.num_tokens() for group in run.groups) - sum(g.num_tokens() for g in of_new) <= TOKENS
    assert tokens_of_an_audit(tmp_path, both) <= TOKENS and len(notes(tmp_path)) == 1
    monkeypatch.setattr(audit_notes, "environment", lambda: {"torch": "another"})
    assert tokens_of_an_audit(tmp_path, both) > TOKENS and len(notes(tmp_path)) == 2


def test_another_precision_is_another_environment():
    before = audit_notes.environment()
    assert before == audit_notes.environment() and json.loads(json.dumps(before)) == before
    torch.set_float32_matmul_precision("high")
    try:
        assert audit_notes.environment() != before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_this_process_has_written_needs_no_sample_later(tmp_path):
    dataset = rows(8000)
    audit = audit_of(tmp_path, Run())
    keys = keys_of(dataset)
    lengths = [len(ids) for row in dataset["completion_ids"] for ids in row]
    audit._store.add(keys.values, [np.full(n, LOGP, np.float32) for n in lengths])
    audit._store.save()
    audit.of_dataset(dataset, keys)
    assert 0 < tokens_of_an_audit(tmp_path, dataset) <= TOKENS


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"environment": 1}', b"\xff"])
def test_a_note_that_is_damaged_or_foreign_says_nothing(tmp_path, damage):
    dataset = rows(2500, longest=20)
    fill(tmp_path, dataset)
    tokens_of_an_audit(tmp_path, dataset)
    (note,) = notes(tmp_path)
    note.write_bytes(damage)
    assert tokens_of_an_audit(tmp_path, dataset) > TOKENS
    assert is_ours(note.name) and verify(note.parent).foreign == ()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_that_may_only_be_read_has_no_note(tmp_path):
    dataset = rows(100)
    folder = Path(fill(tmp_path, dataset).folder)
    folder.chmod(0o500)
    try:
        assert tokens_of_an_audit(tmp_path, dataset) > 0 and notes(tmp_path) == []
    finally:
        folder.chmod(0o700)


def test_a_note_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, caplog):
    dataset = rows(100)
    fill(tmp_path, dataset)

    def refuse(*args):
        raise PermissionError("read-only")

    monkeypatch.setattr(audit_notes, "write_bytes", refuse)
    assert tokens_of_an_audit(tmp_path, dataset) > 0 and notes(tmp_path) == [] and caplog.text == ""


# ---- parts that do not name their store ----


def without_name(root: Path, dataset: Dataset, wrong: np.ndarray | None = None) -> ReferenceStore:
    """A store of an earlier version, and its parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "STORE", b"of another version")
        store = fill(root, dataset, wrong)
    for index in Path(store.folder).glob("index-*"):
        index.unlink()
    return store


def test_unnamed_parts_that_are_right_are_adopted_after_a_full_sample(tmp_path):
    dataset = rows(1000)
    without_name(tmp_path, dataset)
    assert len(ReferenceStore(tmp_path, {}).unnamed_parts) == 1
    run = Run()
    audit_of(tmp_path, run).of_dataset(dataset, keys_of(dataset))
    assert len({tuple(group.prompt_ids) for group in run.groups}) == GROUPS, "whatever they cost"
    store = ReferenceStore(tmp_path, {})
    assert store.unnamed_parts == [] and store.lookup(keys_of(dataset).values)[0].all()
    assert tokens_of_an_audit(tmp_path, dataset) <= TOKENS


def test_unnamed_parts_that_are_wrong_are_set_aside_and_others_adopted(tmp_path):
    good, bad, named = rows(300, seed=1), rows(300, seed=2), rows(300, seed=3)
    without_name(tmp_path, good)
    without_name(tmp_path, bad, np.ones(600))
    fill(tmp_path, named)
    dataset = concatenate_datasets([good, bad, named])
    audit = audit_of(tmp_path, Run())
    audit.of_dataset(dataset, keys_of(dataset))
    for store in (audit._store, ReferenceStore(tmp_path, {})):
        assert store.unnamed_parts == []
        found = [store.lookup(keys_of(some).values)[0].mean() for some in (good, bad, named)]
        assert found == [1.0, 0.0, 1.0]
    assert audit._store.lost_rows(), "the pass computes them"


def test_unnamed_parts_of_a_stream_are_adopted_once_enough_of_their_rows_were_right(tmp_path):
    dataset = rows(400)
    without_name(tmp_path, dataset)
    run = Run()
    audit = audit_of(tmp_path, run)
    for start in range(0, 400, 40):
        (table,) = token_tables(dataset.select(range(start, start + 40)))
        audit.of_rows(table, CompletionKeys.of_table(table))
        assert bool(audit._store.unnamed_parts) == (start + 40 < GROUPS)
    without_name(tmp_path / "wrong", dataset, np.ones(800))
    audit = audit_of(tmp_path / "wrong", Run())
    audit.of_rows(table, CompletionKeys.of_table(table))
    assert not audit._store.lookup(CompletionKeys.of_table(table).values)[0].any()


def test_sums_of_a_pass_are_in_the_order_of_the_groups(tmp_path):
    groups = [PreferenceGroup.from_row(row) for row in rows(60, longest=30)]
    groups = [replace(group, comparisons=(), comparison_weights=()) for group in groups]
    run = ReferencePass(
        ReferenceStore(tmp_path, {}), lambda packed: -0.01 * packed.targets.float(), layout="shared", max_tokens=70
    )
    expected = [-0.01 * sum(ids) for group in groups for ids in group.completion_ids]
    assert run.sums(groups) == pytest.approx(expected)
