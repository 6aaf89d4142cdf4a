"""The reference pass runs what the store lacks and nothing else, in batches that an interruption does not change."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import PackedBatch
from dpo_fast.data.columns import token_tables
from dpo_fast.reference.audit import StoreAudit, compare, refuse_wrong
from dpo_fast.reference.compute import (
    ReferencePass,
    Shard,
    _end_of_batch,
    with_reference_logps,
)
from dpo_fast.reference.store.keys import CompletionKeys
from dpo_fast.reference.store.store import ReferenceStore


class Model:
    """Token log-probs that depend on the token, and in the last bits on the batch, as rounding does."""

    def __init__(self, rounding: float = 1e-6, memory: float = float("inf"), stops_after: int | None = None):
        self.batches: list[PackedBatch] = []
        self.rounding, self.memory, self.stops_after = rounding, memory, stops_after

    def __call__(self, packed: PackedBatch) -> torch.Tensor:
        if packed.num_tokens > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        if self.stops_after is not None and len(self.batches) == self.stops_after:
            raise KeyboardInterrupt
        self.batches.append(packed)
        noise = self.rounding * (packed.num_tokens % 97)
        return -0.01 * packed.targets.float() - noise

    @property
    def completions(self) -> int:
        return sum(len(packed.completion_lengths) for packed in self.batches)


def rows(count: int, seed: int = 0, completions: int = 2) -> Dataset:
    generator = random.Random(seed)

    def ids(longest: int) -> list[int]:
        return [generator.randrange(1, 300) for _ in range(generator.randrange(1, longest))]

    groups = [
        {
            "prompt_ids": ids(12),
            "completion_ids": [ids(20) for _ in range(completions)],
            "context_lengths": [0] * completions,
            "comparisons": [[0, 1]],
        }
        for _ in range(count)
    ]
    return Dataset.from_list(groups)


def with_stored(dataset: Dataset, store: ReferenceStore, column: str = "ref_logps") -> Dataset:
    return with_reference_logps(dataset, CompletionKeys.of_tables(token_tables(dataset)), store, column)


def expected(dataset: Dataset) -> list[list[float]]:
    return [[-0.01 * sum(ids) for ids in row["completion_ids"]] for row in dataset]


def run(dataset: Dataset, store: ReferenceStore, model: Model, **options) -> ReferencePass:
    reference = ReferencePass(store, model, layout="shared", max_tokens=options.pop("max_tokens", 100), **options)
    reference.over(dataset, CompletionKeys.of_tables(token_tables(dataset)), "train")
    return reference


@pytest.fixture
def store(tmp_path):
    return ReferenceStore(tmp_path / "store", {"model": "of a test"})


def test_every_completion_gets_its_own_log_probs(store):
    dataset = rows(40, completions=3)
    run(dataset, store, Model(rounding=0.0))
    for column in ("ref_logps", "ref_token_logps"):
        found = with_stored(dataset, store, column)[column]
        for row, values in zip(dataset, found, strict=True):
            for ids, value in zip(row["completion_ids"], values, strict=True):
                truth = -0.01 * np.array(ids)
                assert value == pytest.approx(truth.sum() if column == "ref_logps" else truth, rel=1e-6)


def test_a_store_that_lacks_rows_is_refused(store):
    run(rows(4), store, Model())
    with pytest.raises(ValueError, match="lacks 4 of 12 reference log-probs"):
        with_stored(rows(6), store)


def test_log_probs_that_are_nan_are_refused_and_not_kept(store):
    class Diverged(Model):
        def __call__(self, packed):
            return super().__call__(packed).index_fill(0, torch.tensor([0]), torch.nan)

    dataset = rows(4)
    with pytest.raises(ValueError, match="^ref_model: 1 of a batch's .* token log-probs are NaN"):
        run(dataset, store, Diverged())
    assert run(dataset, store, Model()).report.computed == 8


def test_only_missing_completions_run_and_each_once(store):
    dataset = rows(30)
    first, again, more = Model(), Model(), Model()
    run(Dataset.from_list([*dataset, *dataset]), store, first)
    assert first.completions == 60, "every row stands in the dataset twice"
    report = run(dataset.shuffle(seed=1), store, again).report
    assert again.batches == [] and report.completions == 60 and report.computed == 0
    added = run(Dataset.from_list([*rows(10, seed=8), *dataset]), store, more).report
    assert more.completions == added.computed == 20


def test_a_prompt_runs_once_with_all_of_its_completions(store):
    """Pairs of one prompt in different rows; one completion in two of them."""
    dataset = [{"prompt_ids": [1, 2, 3], "completion_ids": ids} for ids in ([[4], [5, 6]], [[5, 6], [7]], [[8], [4]])]
    model = Model()
    run(Dataset.from_list(dataset), store, model)
    (packed,) = model.batches
    assert packed.num_tokens == 3 + 5 and len(packed.completion_lengths) == 4
    more = Dataset.from_list([{"prompt_ids": [1, 2, 3], "completion_ids": [[4], [9, 9]]}])
    run(more, store, model)
    assert model.batches[1].num_tokens == 3 + 2, "the known completion does not run again"


def test_a_prompt_with_more_completions_than_a_batch_holds_is_cut(store):
    dataset = Dataset.from_list([{"prompt_ids": [1] * 10, "completion_ids": [[k] * 20 for k in range(2, 12)]}])
    model = Model()
    run(dataset, store, model)
    assert model.completions == 10 and max(packed.num_tokens for packed in model.batches) <= 100


def test_context_before_a_completion_is_not_scored(store):
    dataset = Dataset.from_list(
        [{"prompt_ids": [5], "completion_ids": [[6, 7, 8], [6, 7, 8]], "context_lengths": [1, 2]}]
    )
    run(dataset, store, Model(rounding=0.0))
    assert with_stored(dataset, store)["ref_logps"][0] == pytest.approx([-0.15, -0.08])


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(10, 200))
def test_batches_are_equal_and_do_not_depend_on_what_has_run(costs, max_tokens):
    costs = sorted(costs, reverse=True)
    totals = np.array([0, *np.cumsum(costs)])

    def batches(totals: np.ndarray) -> list[tuple[int, int]]:
        found, start = [], 0
        while start < len(totals) - 1:
            stop = _end_of_batch(totals, start, max_tokens)
            found.append((start, stop))
            start = stop
        return found

    whole = batches(totals)
    loads = [int(totals[stop] - totals[start]) for start, stop in whole]
    assert all(load <= max_tokens or stop - start == 1 for load, (start, stop) in zip(loads, whole, strict=True))
    for position, (start, _) in enumerate(whole):
        rest = batches(totals[start:] - totals[start])
        assert [(a + start, b + start) for a, b in rest] == whole[position:]


def test_batches_have_equal_token_counts(store):
    model = Model()
    run(rows(300), store, model, max_tokens=500)
    tokens = [packed.num_tokens for packed in model.batches]
    assert len(tokens) > 5 and max(tokens) <= 500 and min(tokens) >= 0.85 * max(tokens)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 12))
def test_an_interrupted_pass_ends_with_the_same_bits(tmp_path_factory, batches):
    """Although the numbers depend on the batch: the batches are the same ones, whatever the order of the rows."""
    dataset, folder = rows(60), tmp_path_factory.mktemp("stores")
    whole, cut = (ReferenceStore(folder / name, {}) for name in ("whole", "cut"))
    run(dataset, whole, Model())
    with pytest.raises(KeyboardInterrupt):
        run(dataset, cut, Model(stops_after=batches))
    cut.flush()  # the part that was being written
    cut = ReferenceStore(folder / "cut", {})
    rest = Model()
    run(dataset.shuffle(seed=3), cut, rest)
    assert rest.completions >= 120 - whole.computed
    keys = CompletionKeys.of_tables(token_tables(dataset)).values
    assert np.array_equal(whole.lookup(keys)[1], cut.lookup(keys)[1])


def test_shards_share_out_the_prompts(store):
    dataset = rows(60)
    models = [Model() for _ in range(3)]
    for index, model in enumerate(models):
        run(dataset, store, model, shard=Shard(index, 3))
    assert sum(model.completions for model in models) == 120
    assert min(model.completions for model in models) > 20
    assert len(with_stored(dataset, store)) == 60


def test_memory_that_does_not_suffice_halves_the_batch(store, caplog):
    dataset, model = rows(60), Model(memory=60)
    run(dataset, store, model, max_tokens=200)
    assert model.completions == 120 and "it goes on with" in caplog.text
    for row, values in zip(expected(dataset), with_stored(dataset, store)["ref_logps"], strict=True):
        assert values == pytest.approx(row, abs=0.01)


def test_a_prompt_too_large_for_the_memory_is_an_error_and_nothing_is_lost(store):
    long = {
        "prompt_ids": [1] * 50,
        "completion_ids": [[2] * 40, [3]],
        "context_lengths": [0, 0],
        "comparisons": [[0, 1]],
    }
    dataset = Dataset.from_list([*rows(5), long])
    with pytest.raises(ValueError, match="max_length: the memory does not suffice .* 91 tokens"):
        run(dataset, store, Model(memory=80))


def test_other_errors_of_the_model_pass_through(store):
    def broken(packed):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(rows(3), store, broken)


def audit(groups: list[PreferenceGroup], store: ReferenceStore, score, dtype: torch.dtype) -> None:
    run = ReferencePass(store, score, layout="shared").sums
    groups = [replace(group, comparisons=(), comparison_weights=()) for group in groups]
    refuse_wrong(compare(groups, store, run, layout="shared", dtype=dtype), store.folder)


def some_groups(count: int = 4) -> list[PreferenceGroup]:
    return [PreferenceGroup.from_row(row) for row in rows(count)]


def test_the_audit_allows_rounding_and_nothing_else(store):
    """What rounding may do is what a second run in another batch shows."""
    run(rows(4), store, Model(rounding=0.0))

    def score(off: float, rounding: float = 0.0):
        return lambda packed: (
            Model(rounding=0.0)(packed) + off + (rounding if len(packed.completion_lengths) > 8 else 0.0)
        )

    audit(some_groups(), store, score(0.0), torch.float32)
    audit(some_groups(), store, score(1e-6), torch.float32)
    audit(some_groups(), store, score(2e-4, rounding=1e-4), torch.float32)
    for wrong in (score(2e-4), score(0.01, rounding=1e-4), score(float("nan"))):
        with pytest.raises(ValueError, match="holds a reference log-prob of .* Remove the folder"):
            audit(some_groups(), store, wrong, torch.float32)


def test_the_audit_knows_how_coarse_16_bits_are(store):
    """A second run in another batch may round alike, where the batch of the store did not."""
    run(rows(4), store, Model(rounding=0.0))

    def score(off: float):
        return lambda packed: Model(rounding=0.0)(packed) + off

    audit(some_groups(), store, score(2e-3), torch.bfloat16)
    for off, dtype in ((0.1, torch.bfloat16), (2e-3, torch.float32)):
        with pytest.raises(ValueError, match="Remove the folder"):
            audit(some_groups(), store, score(off), dtype)


def test_the_audit_runs_few_tokens(store):
    dataset = Dataset.from_list(
        [{"prompt_ids": [1] * n, "completion_ids": [[2] * 9, [3]]} for n in (300, 400, 100, 350)]
    )
    run(dataset, store, Model(rounding=0.0))
    store, model = ReferenceStore(store.folder.rpartition("/")[0], {"model": "of a test"}), Model(rounding=0.0)
    score = ReferencePass(store, model, layout="shared").sums
    audit = StoreAudit(store, score, layout="shared", dtype=torch.float32, shard=Shard())
    audit.of_dataset(dataset, CompletionKeys.of_tables(token_tables(dataset)))
    assert [packed.num_tokens for packed in model.batches] == [420]


# A pass in a process of its own: parts of 20 rows, a pause in every batch, each completion that ran noted in a file.


def slow_pass(root: str, noted: str, pause: float) -> None:
    from dpo_fast.reference.store import store as store_module

    torch.set_num_threads(1)
    store_module.ROWS_PER_PART = 20
    notes = os.open(noted, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    model = Model()

    def score(packed: PackedBatch) -> torch.Tensor:
        time.sleep(pause)
        os.write(notes, b"1\n" * len(packed.completion_lengths))
        return model(packed)

    run(rows(250), ReferenceStore(root, {}), score)


@pytest.mark.parametrize("most", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_pass_killed_at_some_moments_ends_with_the_same_bits(tmp_path, most):
    """And repeats at most a part and the two batches that are under way, each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_reference_pass"])
    root, noted, generator, kills = tmp_path / "killed", tmp_path / "noted", random.Random(0), 0
    while True:
        process = context.Process(target=slow_pass, args=(str(root), str(noted), 0.004 if kills < most else 0.0))
        process.start()
        process.join(None if kills == most else generator.uniform(0.05, 0.35))
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    assert kills > most // 2, "of a pass that takes seconds"
    whole, killed = ReferenceStore(tmp_path / "whole", {}), ReferenceStore(root, {})
    run(rows(250), whole, Model())
    keys = CompletionKeys.of_tables(token_tables(rows(250))).values
    assert np.array_equal(whole.lookup(keys)[1], killed.lookup(keys)[1])
    tokens = zip(whole.token_logps(keys), killed.token_logps(keys), strict=True)
    assert all(np.array_equal(one, other) for one, other in tokens)
    ran = len(noted.read_text().split())
    batch = 2 * 100 // 14  # completions, about
    assert ran - 500 <= kills * (20 + 2 * batch), f"{ran - 500} completions ran again after {kills} kills"
