"""Before an engine has a model, it runs on the engine's device and in its arithmetic, and is as it was afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_parallelism import GROUPS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dpo_fast import add_dpo_forward, pack, use_shared_prefix
from dpo_fast.model import engines
from dpo_fast.model.engines import keep_numbers_exact, on_device, weights_in
from dpo_fast.reference import reference as reference_model
from families import tiny_model
from preferences import make_trainer, pairs

HOST, DEVICE = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def one_rank():
    """A process group of this process alone, which is enough for FSDP2 to cast what it shards."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_weights_in_bf16_give_the_very_log_probs_of_fsdp2(one_rank, family):
    models = [tiny_model(family), tiny_model(family)]
    for model in models:
        add_dpo_forward(model)
        use_shared_prefix(model)
    plain, sharded = models
    before = {name: weight.clone() for name, weight in plain.named_parameters()}
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh("cpu", (1,))
    (layers,) = (module for module in sharded.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 4)
    for part in (*layers, sharded):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    packed = pack(GROUPS)
    with torch.no_grad():
        expected, untouched = (model(packed=packed).token_logps for model in (sharded, plain))
        with weights_in(plain, torch.bfloat16, HOST):
            found = plain(packed=packed).token_logps
        with torch.autocast("cpu", torch.bfloat16):
            by_autocast = plain(packed=packed).token_logps
        again = plain(packed=packed).token_logps
    assert torch.equal(found, expected)
    assert not torch.equal(by_autocast, expected), "else the cast makes no difference"
    assert torch.equal(again, untouched), "hooks stay behind"
    for name, weight in plain.named_parameters():
        assert weight.requires_grad and torch.equal(weight, before[name]), name


class Layer(nn.Module):
    """With a weight and a buffer; remembers where they were when it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.weight.device.type, self.weight.dtype, self.scale.device.type, self.scale.dtype
        return x * self.weight * self.scale


def test_weights_on_the_host_are_on_the_device_while_their_module_runs():
    meta = torch.device("meta")  # a device that every machine has
    model = nn.Sequential(Layer(), Layer())
    before = dict(model.state_dict(keep_vars=True))
    with torch.no_grad(), weights_in(model, torch.bfloat16, meta):
        assert model(torch.ones(3, device=meta)).device == meta
        assert model[0].weight is before["0.weight"], "a copy lives only while its module runs"
    assert {layer.seen for layer in model} == {("meta", torch.bfloat16, "meta", torch.float32)}
    assert all(tensor is before[name] for name, tensor in model.state_dict(keep_vars=True).items())
    assert torch.equal(model(torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize("free, expected", [(60, [DEVICE, "cpu"]), (59, [])])
def test_a_whole_model_that_fits_is_on_the_device_meanwhile(monkeypatch, free, expected):
    """Two layers of 24 bytes, of which the device may give four fifths."""
    moves, model = [], nn.Sequential(Layer(), Layer())
    monkeypatch.setattr(model, "to", moves.append)
    monkeypatch.setattr(engines, "free_memory", lambda device: free)
    with pytest.raises(KeyError), on_device(model, DEVICE):
        assert moves == expected[:1]
        raise KeyError
    assert moves == expected
    monkeypatch.setattr(engines, "free_memory", lambda device: 10**9)
    with on_device(model, HOST):
        assert moves == expected, "it is there already"


def test_fsdp1_is_refused():
    with pytest.raises(ValueError, match="fsdp_version=1 is not supported.*to-fsdp2"):
        keep_numbers_exact(SimpleNamespace(fsdp_version=1, mixed_precision_policy=None))


def test_memory_that_runs_out_on_one_of_the_ranks_that_run_together_ends_the_pass(tmp_path, monkeypatch):
    """Where a model is whole, a rank goes on with smaller batches; the others would wait for it forever."""

    def fail(self, packed):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(reference_model, "is_sharded", lambda model: True)
    monkeypatch.setattr(reference_model.Reference, "_run", fail)
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch=100: the reference pass ran out of memory"):
        make_trainer(tmp_path, pairs(4), max_tokens_per_micro_batch=100)


@pytest.mark.gpu
def test_on_a_gpu_the_reference_runs_there_though_the_model_is_not_there_yet(tmp_path):
    """As FSDP and DeepSpeed have it, and full evaluation in half precision."""
    late = make_trainer(tmp_path, pairs(20), use_cpu=False, bf16=True, bf16_full_eval=True)
    assert late.reference.store.computed == 40 and next(late.model.parameters()).device == HOST
    there = make_trainer(tmp_path, pairs(20), use_cpu=False, bf16=True)
    assert there.reference.store.computed == 0 and next(there.model.parameters()).device.type == "cuda"
    late.train()
