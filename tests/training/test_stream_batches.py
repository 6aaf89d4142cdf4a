"""A stream trains as the same rows in a dataset do, and its references enter the store as the rows come."""

from __future__ import annotations

import json
from itertools import repeat
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import SequentialSampler

from dpo_fast.data import prepare as preparation
from dpo_fast.data.loading import load_preference_dataset
from dpo_fast.data.prepare import prepare, prepare_dataset
from dpo_fast.errors import InputError
from dpo_fast.trainer import DPOTrainer
from dpo_fast.training.stream_batches import StreamBatches
from families import tiny_tokenizer
from preferences import assert_same_weights, logged, make_trainer, pairs, ranked, trained

ROWS = [
    {"prompt": "w5 w6", "chosen": " w7 w8", "rejected": " w9"},
    {"prompt": "w5 w6", "chosen": " w7", "rejected": " w7"},  # no signal
    {"prompt": "w5", "chosen": " w3 w4 w5 w6 w7 w8 w9", "rejected": " w9"},  # too long
]


def as_stream(dataset: Dataset) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(dataset.to_list()))


@pytest.mark.parametrize("dataset", [Dataset.from_list(ROWS), ranked(6), pairs(80)], ids=["pairs", "ranked", "many"])
def test_a_stream_yields_the_groups_of_the_dataset(dataset):
    options = {"max_length": 7, "comparisons": "best_vs_rest", "vocab_size": 97}
    expected, _ = prepare_dataset(dataset, tiny_tokenizer(), **options)
    prepared = prepare(as_stream(dataset), tiny_tokenizer(), **options)[0]
    assert json.dumps(list(prepared)) == json.dumps(expected.to_list())
    again = prepare(as_stream(expected), tiny_tokenizer(), **options)[0]
    assert json.dumps(list(again)) == json.dumps(expected.to_list()), "prepared groups pass through"


def test_only_the_names_of_columns_are_read_ahead_and_once(tmp_path):
    """A stream may be slow to begin."""
    begun = []

    def generate():
        begun.append(True)
        yield from pairs(8)

    make_trainer(tmp_path, IterableDataset.from_generator(generate), max_steps=2)
    assert len(begun) == 1
    assert prepare(as_stream(ranked(6)), tiny_tokenizer(), max_length=9)[0].column_names


@pytest.fixture
def in_order(monkeypatch):
    monkeypatch.setattr(DPOTrainer, "_get_train_sampler", lambda self, dataset=None: SequentialSampler(dataset))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.5}], ids=["sigmoid", "LD-DPO"])
def test_training_on_a_stream_is_training_on_its_rows(tmp_path, in_order, lora, options):
    """Although the policy moves away from what the reference is while rows are yet to come."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
    options = {"max_steps": 22, "learning_rate": 3e-3, "peft_config": config, **options}
    dataset = pairs(88)  # more than are scored at once
    known = make_trainer(tmp_path / "dataset", dataset, **options)
    known.train()
    stream = make_trainer(tmp_path / "stream", as_stream(dataset), **options)
    assert stream.reference.store.computed == 0
    stream.train()
    assert logged(stream, "loss") == pytest.approx(logged(known, "loss"), rel=1e-4, abs=1e-6)
    assert logged(stream, "rewards/margins")[-1] != pytest.approx(0.0, abs=1e-3)
    assert stream.reference.store.computed == 176
    if not lora:
        policy, reference = (next(model.parameters()) for model in (stream.model, stream.reference.model))
        assert not torch.equal(policy, reference) and not reference.requires_grad


def test_what_a_stream_has_computed_is_in_the_store_for_the_next(tmp_path):
    dataset = pairs(8)
    first = make_trainer(tmp_path, as_stream(dataset), max_steps=2)
    first.train()
    again = make_trainer(tmp_path, as_stream(dataset), max_steps=2, eval_dataset=as_stream(pairs(4, seed=3)))
    again.train()
    assert again.reference.store.computed == 0
    assert "eval_loss" in again.evaluate() and again.reference.store.computed == 8
    for rows in (dataset, pairs(4, seed=3)):
        assert make_trainer(tmp_path, rows).reference.store.computed == 0


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_batch_is_that_of_one_process_and_each_row_goes_to_one_rank(ranks):
    """17 rows in batches of 8: the last is a single row, and two ranks of three get nothing of it."""
    groups = prepare(as_stream(pairs(17)), tiny_tokenizer(), max_length=64)[0]

    def cost(prompt: int, completions: list[int]) -> int:
        return prompt + sum(completions)

    def cost_of(row: dict) -> int:
        return cost(len(row["prompt_ids"]), [*map(len, row["completion_ids"])])

    everyone = []
    for rank in range(ranks):
        batches = StreamBatches(groups, 8, cost, SimpleNamespace(process_index=rank, num_processes=ranks))
        everyone.append(list(batches))
        assert json.dumps(list(batches)) == json.dumps(everyone[-1]), "another epoch is the same"
    found = []
    for parts in zip(*everyone, strict=True):
        batch = sorted((row for part in parts for row in part), key=lambda row: row["position"])
        assert [row.pop("position") for row in batch] == list(range(len(batch)))
        loads = [sum(map(cost_of, part)) for part in parts]
        assert len(batch) < ranks or max(loads) < 1.5 * min(loads)
        found.append(batch)
    assert list(map(len, found)) == [8, 8, 1]
    assert json.dumps(sum(found, [])) == json.dumps(list(groups))


UNUSABLE = {"prompt": "w5 w6", "chosen": " w7", "rejected": " w7"}


def batches_of(rows, ranks: int = 1, rank: int = 0) -> StreamBatches:
    groups = prepare(IterableDataset.from_generator(rows), tiny_tokenizer(), max_length=64)[0]
    place = SimpleNamespace(process_index=rank, num_processes=ranks)
    return StreamBatches(groups, 4, lambda prompt, completions: 1, place)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_stream_without_a_usable_row_is_refused_on_every_rank(monkeypatch, ranks):
    monkeypatch.setattr(preparation, "MOST_UNUSED", 500)
    for rank in range(ranks):
        with pytest.raises(InputError, match="stream ended without a usable row; raise max_length"):
            list(batches_of(lambda: iter([UNUSABLE] * 100), ranks, rank))
        with pytest.raises(InputError, match=r"none of 500 rows of the train stream.*\(500 × identical completions\)"):
            list(batches_of(lambda: repeat(UNUSABLE), ranks, rank))


def test_usable_rows_may_come_late_and_an_epoch_must_have_some(monkeypatch):
    monkeypatch.setattr(preparation, "MOST_UNUSED", 500)
    late = [*[UNUSABLE] * 499, ROWS[0], *[UNUSABLE] * 499, ROWS[0]]
    epochs = [late, late, [UNUSABLE]]
    batches = batches_of(lambda: iter(epochs.pop(0)) if epochs[0] is not late else iter(late))
    assert [len(batch) for batch in batches] == [2] == [len(batch) for batch in batches]
    del epochs[:2]
    with pytest.raises(InputError, match="without a usable row"):
        list(batches)


def test_training_and_evaluation_end_where_no_row_is_usable(tmp_path):
    unusable = as_stream(Dataset.from_list([UNUSABLE] * 3))
    with pytest.raises(InputError, match="stream ended without a usable row"):
        make_trainer(tmp_path, unusable).train()
    with pytest.raises(InputError, match="stream ended without a usable row"):
        make_trainer(tmp_path, pairs(4), eval_dataset=unusable).evaluate()
    for rows, words in (
        ([], "stream has no rows"),
        ([1], "row 0: expected a dict .* int 1"),
        ([{1: 2}], "row 0: .*{1"),
    ):
        with pytest.raises(InputError, match=words):
            make_trainer(tmp_path, IterableDataset.from_generator(lambda rows=rows: iter(rows)))


def test_a_row_that_cannot_be_read_ends_training_by_name(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected\nw5,w6,w7\nw5,w6,"w7\n')  # a quote that is not closed
    stream = load_preference_dataset(str(path), split="train", streaming=True)
    with pytest.raises(InputError, match="^dataset='stream' cannot be read .*EOF inside string.*; give rows"):
        make_trainer(tmp_path, stream).train()
    stream = as_stream(Dataset.from_list([*ROWS[:1] * 70, {**ROWS[0], "chosen": None}]))
    with pytest.raises(InputError, match="train dataset, row 70: column 'chosen'"):
        make_trainer(tmp_path, stream, max_steps=30).train()


class Calls:
    """A reference that says on how many rows it ran at a time."""

    def __init__(self) -> None:
        self.rows = []

    def share_rows(self) -> None:
        pass

    def with_logps_of_rows(self, rows: list[dict]) -> list[dict]:
        self.rows.append(len(rows))
        return [{**row, "ref_logps": [float(len(ids)) for ids in row["completion_ids"]]} for row in rows]


def test_the_reference_runs_on_about_64_own_rows_at_a_time():
    groups = prepare(as_stream(pairs(150)), tiny_tokenizer(), max_length=64)[0]
    reference, rank = Calls(), SimpleNamespace(process_index=1, num_processes=2)
    batches = list(StreamBatches(groups, 6, lambda prompt, completions: 1, rank, reference))
    assert reference.rows == [63, 12] and [len(batch) for batch in batches] == [3] * 25
    lengths = [([*map(len, row["completion_ids"])], row["ref_logps"]) for batch in batches for row in batch]
    assert all(counts == logps for counts, logps in lengths)


def test_a_stream_goes_on_where_it_was_stopped(tmp_path):
    """In its first epoch of three batches; then comes another."""
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, as_stream(pairs(10)), **options)
    expected = trained(whole)
    resumed = make_trainer(tmp_path, as_stream(pairs(10)), **options)
    assert_same_weights(trained(resumed, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2")), expected, 0.0)
    assert resumed.reference.store.computed == 0
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_a_stream_that_is_over_asks_no_other_rank(tmp_path, monkeypatch):
    """transformers goes on asking for the steps of an epoch whose length it does not know."""
    trainer = make_trainer(tmp_path, as_stream(pairs(8)))
    monkeypatch.setattr(trainer, "_equalize", lambda *args: pytest.fail("ranks met"))
    assert trainer._get_num_items_in_batch([], torch.device("cpu")) is None and trainer._balances == []


def test_what_the_reference_is_not_there_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataloader_num_workers=2: .* set it to 0"):
        make_trainer(tmp_path, as_stream(pairs(8)), dataloader_num_workers=2)
    make_trainer(tmp_path, as_stream(pairs(8)), dataloader_num_workers=1, loss_type="simpo").train()
    trainer = make_trainer(tmp_path)
    trainer.train()
    with pytest.raises(ValueError, match="eval_dataset 'eval' .*rows of a stream.* is not kept"):
        trainer.evaluate(as_stream(pairs(4, seed=3)))


def test_what_depends_on_all_rows_is_refused(tmp_path):
    stream = as_stream(pairs(4))
    with pytest.raises(ValueError, match="group_by_prompt: the train dataset is a stream"):
        make_trainer(tmp_path, stream, group_by_prompt=True)
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(tmp_path, stream, max_steps=-1)
    with_offset = as_stream(Dataset.from_list([{**ROWS[0], "offset": 1.0}]))
    with pytest.raises(ValueError, match="offset: the train dataset has offsets"):
        make_trainer(tmp_path, with_offset, loss_type="ipo")
    with pytest.raises(ValueError, match="the train stream has no rows"):
        make_trainer(tmp_path, IterableDataset.from_generator(lambda: iter(())))
    with pytest.raises(ValueError, match="matches no format|format"):
        make_trainer(tmp_path, as_stream(Dataset.from_list([{"text": "a"}])))


def test_reference_log_probs_of_a_row_that_was_cut_are_refused():
    rows = [{**row, "ref_chosen_logps": -3.0, "ref_rejected_logps": -1.0} for row in ROWS]
    short = prepare(as_stream(Dataset.from_list(rows[:2])), tiny_tokenizer(), max_length=7)[0]
    assert [row["ref_logps"] for row in short] == [[-3.0, -1.0]]
    cut = prepare(as_stream(Dataset.from_list(rows)), tiny_tokenizer(), max_length=7)[0]
    with pytest.raises(ValueError, match="a row of the stream was cut to max_length"):
        list(cut)
