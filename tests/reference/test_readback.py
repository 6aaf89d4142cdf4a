"""The reference pass reads results back without holding the device up: each copy is queued right behind its batch, into
pinned memory, and while the host waits for it the device has another batch to run.

On a CPU, a stand-in for a CUDA device: it notes what is queued, and runs nothing before somebody waits for it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_reference_pass import Model, rows, run

from dpo_fast.batches.packing import PackedBatch
from dpo_fast.data.columns import token_tables
from dpo_fast.reference.compute import ReferencePass
from dpo_fast.reference.store.keys import CompletionKeys
from dpo_fast.reference.store.store import ReferenceStore

aten = torch.ops.aten


class Stream:
    """What was queued, as (kind, index of the batch); `done` of them have run."""

    def __init__(self):
        self.queued, self.effects, self.done = [], [], 0

    def queue(self, kind, batch, effect=lambda: None):
        self.queued.append((kind, batch))
        self.effects.append(effect)

    def wait(self, end):
        while self.done < end:
            self.effects[self.done]()
            self.done += 1

    @property
    def batches_left(self) -> int:
        return sum(kind == "batch" for kind, _ in self.queued[self.done :])


class OnDevice(torch.Tensor):
    """A result on the stand-in; its values are not to be had but by a copy that has run."""

    @staticmethod
    def __new__(cls, values, batch, stream):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device="cuda:0")

    def __init__(self, values, batch, stream):
        self.values, self.batch, self.stream = values, batch, stream

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        (source,) = (arg for arg in args if isinstance(arg, cls))
        stream = source.stream
        if func is aten.detach.default:
            return cls(source.values, source.batch, stream)
        target = args[0] if func is aten.copy_.default else torch.full_like(source.values, torch.nan)
        assert func in (aten.copy_.default, aten._to_copy.default), func
        stream.queue("copy", source.batch, lambda: target.copy_(source.values))
        if func is aten._to_copy.default or not args[2] or target.data_ptr() not in stream.pinned:
            stream.wait(len(stream.queued))
        return target


class Device(Model):
    """The model of the pass, on the stand-in."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __call__(self, packed):
        logps = super().__call__(packed)
        self.stream.queue("batch", len(self.batches) - 1)
        return OnDevice(logps, len(self.batches) - 1, self.stream)


@pytest.fixture
def stream(monkeypatch):
    stream, empty, kept = Stream(), torch.empty, []

    class Event:
        def __init__(self, **options):
            self.position = 0

        def record(self, of):
            assert of is stream
            self.position = len(stream.queued)

        def query(self):
            return stream.done >= self.position

        def synchronize(self):
            stream.wait(self.position)

    def pinned_or_not(*shape, pin_memory=False, **options):
        made = empty(*shape, **options)
        if pin_memory:
            kept.append(made)
            stream.pinned.add(made.data_ptr())
        return made

    stream.pinned = set()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch, "empty", pinned_or_not)
    return stream


class NotingStore(ReferenceStore):
    """Notes how many batches the device has left whenever log-probs come in."""

    def __init__(self, root, batches_left):
        super().__init__(root, {})
        self.batches_left, self.noted = batches_left, []

    def add(self, keys, token_logps):
        self.noted.append(self.batches_left())
        super().add(keys, token_logps)


def test_a_result_is_queued_for_reading_before_the_next_batch(tmp_path, stream):
    device, store = Device(stream), NotingStore(tmp_path / "device", lambda: stream.batches_left)
    run(rows(60), store, device)
    count = len(device.batches)
    assert count > 6
    assert stream.queued == [(kind, batch) for batch in range(count) for kind in ("batch", "copy")]
    assert store.noted == [2] * (count - 2) + [1, 0], "the store works while the device has two batches left"


def test_the_numbers_and_batches_are_those_of_the_host(tmp_path, stream):
    model, device = Model(), Device(stream)
    stores = [ReferenceStore(tmp_path / name, {}) for name in ("host", "device")]
    for store, runs in zip(stores, (model, device), strict=True):
        run(rows(60), store, runs)
    keys = CompletionKeys.of_tables(token_tables(rows(60))).values
    assert [packed.num_tokens for packed in model.batches] == [packed.num_tokens for packed in device.batches]
    assert np.array_equal(stores[0].lookup(keys)[1], stores[1].lookup(keys)[1])


def test_on_the_host_every_batch_is_kept_before_the_next_one_runs(tmp_path):
    model = Model()
    store = NotingStore(tmp_path, lambda: len(model.batches))
    run(rows(60), store, model)
    assert store.noted == list(range(1, len(model.batches) + 1))


@pytest.mark.parametrize(("device", "budget"), [("cpu", 8192), ("cuda", 32768)])
def test_batches_for_a_cuda_device_are_larger_and_lie_in_pinned_memory(tmp_path, monkeypatch, device, budget):
    pinned, model = [], Model()
    monkeypatch.setattr(PackedBatch, "pin_memory", lambda self: pinned.append(self) or self)
    dataset = rows(2500)
    keys = CompletionKeys.of_tables(token_tables(dataset))
    reference = ReferencePass(ReferenceStore(tmp_path, {}), model, layout="shared", device=torch.device(device))
    reference.over(dataset, keys, "train")
    assert 0.8 * budget < model.batches[0].num_tokens <= budget
    assert [*map(id, pinned)] == ([*map(id, model.batches)] if device == "cuda" else [])


@pytest.mark.gpu
def test_on_a_gpu_the_store_works_while_the_device_does(tmp_path):
    model, ends = Model(), []

    def score(packed):
        logps = model(packed.to("cuda", non_blocking=True))
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
        ends.append(torch.cuda.Event())
        ends[-1].record()
        return logps

    store = NotingStore(tmp_path, lambda: sum(not end.query() for end in ends))
    reference = ReferencePass(store, score, layout="shared", max_tokens=100, device=torch.device("cuda"))
    reference.over(rows(60), CompletionKeys.of_tables(token_tables(rows(60))), "train")
    assert min(store.noted[:-2]) >= 1, store.noted
