"""A tensor-parallel model gives what the whole one gives, and what the trainer cannot do it refuses at once.

Two ranks load a model with transformers' tensor-parallel plan. Its log-probs, its loss and the gradient of every
parameter equal the whole model's within 1e-5 of their largest entry, in both layouts, with a head that is tied or not,
and no rank gathers the head.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from packaging.version import Version
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel, __version__
from transformers.distributed import DistributedConfig

from dpo_fast import PreferenceGroup, add_dpo_forward, pack, use_shared_prefix
from dpo_fast.config import DPOConfig
from dpo_fast.config.rules import check_parallelism
from dpo_fast.model.loading import load_model
from dpo_fast_kernels import SequenceLoss
from families import VOCAB, tiny_model
from interpreting import environment

TOLERANCE = 1e-5  # of the largest entry
HIDDEN = 32  # of a tiny model
# Shards of the head differ in size, which transformers allows since 5.21.
ENTRIES = VOCAB if Version(__version__) >= Version("5.21") else VOCAB + 1
GROUPS = [
    PreferenceGroup([3, 4, 5], [[6, 7], [8, 96, 10, 11]]),
    PreferenceGroup([13, 14], [[48, 49, 17], [18], [19, 20, 21, 22, 2]]),
]


SIDES = {"outside": "a loss of log-probs", "inside": "a loss that the head knows"}


class LargestGathered(TorchDispatchMode):
    """The entries of the largest tensor that a rank got from others by a gather."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional") and "gather" in function.__name__:
            tensors = [x for x in tree_leaves((args, found)) if isinstance(x, Tensor)]
            self.entries = max([self.entries, *(x.numel() for x in tensors)])
        return found


def squared(logps: Tensor, references: Tensor) -> Tensor:
    return ((logps - references) ** 2).sum()


def solutions(model: PreTrainedModel, layout: str) -> dict[str, Tensor]:
    """What a packed forward returns and the gradients it leaves, for a loss outside the head and one inside it."""
    packed, references, loss = pack(GROUPS, layout), torch.linspace(-30, -3, 5), SequenceLoss(squared)
    found: dict[str, Tensor] = {}
    for side in SIDES:
        model.zero_grad()
        known = {"loss": loss, "loss_inputs": (references,)} if side == "inside" else {}
        output = model(packed=packed, statistics=("entropy", "mean_logit"), **known)
        value = output.loss if known else squared(output.logps, references)
        value.backward()
        named = {"loss": value, **{name: getattr(output, name) for name in ("logps", "entropy", "mean_logit")}}
        named |= {f"d {name}": parameter.grad for name, parameter in model.named_parameters()}
        found |= {f"{name}, {SIDES[side]}": tensor.detach() for name, tensor in named.items()}
    return found


def compare(path: str) -> None:
    """Compares this rank's model, one of two tensor-parallel ones, with the whole model."""
    whole = AutoModelForCausalLM.from_pretrained(path)
    sharded = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2))
    assert sharded.get_output_embeddings().weight.placements == (Shard(0),), "else there is nothing to test"
    with LargestGathered() as gathered:
        sharded(torch.arange(80)[None] % VOCAB)
    assert gathered.entries >= VOCAB * HIDDEN, "the counter does not see transformers' own head gather logits"
    for layout in ("padded", "shared"):
        for model in (whole, sharded):
            add_dpo_forward(model)
            if layout == "shared":
                use_shared_prefix(model)
        with LargestGathered() as gathered:
            found = solutions(sharded, layout)
        assert gathered.entries < VOCAB * HIDDEN // 2, f"a rank gathered {gathered.entries} entries at once"
        expected = solutions(whole, layout)
        assert found.keys() == expected.keys()
        for name, right in expected.items():
            value = found[name].full_tensor() if isinstance(found[name], DTensor) else found[name]
            assert value.shape == right.shape and right.abs().max() > 0, name
            error = (value - right).abs().max() / right.abs().max()
            assert error <= TOLERANCE, f"{Path(path).name}, {layout}, {name}: off by {error:.1e} of its largest entry"


def compare_on_a_rank(*paths: str) -> None:
    dist.init_process_group("gloo")
    for path in paths:
        compare(path)
    dist.destroy_process_group()  # gloo's threads may abort a process that ends with them at work


def test_tensor_parallel_ranks_find_what_the_whole_model_finds(tmp_path):
    for family in ("llama", "gemma2"):  # whose head is its own, and the embeddings with a softcap
        tiny_model(family, vocab_size=ENTRIES).save_pretrained(tmp_path / family)
    paths = [str(path) for path in tmp_path.iterdir()]
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    call = f"import test_parallelism; test_parallelism.compare_on_a_rank(*{paths})"
    done = subprocess.run(
        [*program, sys.executable, "-c", call], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-5000:]


# ---- refusals ----


@pytest.mark.parametrize("name", ["cp_size", "sp_size", "tp_size"])
@pytest.mark.parametrize("by", ["argument", "launcher"])
def test_a_parallelism_that_the_trainer_cannot_do_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, name, by):
    options = {"output_dir": str(tmp_path), "use_cpu": True}
    if by == "argument":
        if name not in inspect.signature(ParallelismConfig).parameters:
            pytest.skip("accelerate has it since 1.12")
        options["parallelism_config"] = ParallelismConfig(**{name: 2})
    else:
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "2")
    with pytest.raises(ValueError, match=f"parallelism_config.{name}=2.*FSDP2"):
        DPOConfig(**options)


@pytest.mark.parametrize("given", [{"sequence_parallel_size": 2}, {"tensor_parallel": {"autotp_size": 2}}])
def test_that_of_deepspeed_is_refused_too(tmp_path, given):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    check_parallelism(args)
    args.deepspeed_plugin.deepspeed_config |= given
    with pytest.raises(ValueError, match=r"deepspeed\..*size=2.*FSDP2"):
        check_parallelism(args)


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_rows_that_accelerate_would_share_out_are_refused(tmp_path, monkeypatch, name):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "accelerator_config": {name: True}}
    assert getattr(DPOConfig(**options).accelerator_config, name)
    monkeypatch.setattr(DPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match=f"accelerator_config.{name}=True.*leave it out"):
        DPOConfig(**options)


def test_parallelism_over_rows_is_not_refused(tmp_path, monkeypatch):
    sharded = ParallelismConfig(dp_shard_size=2)
    assert DPOConfig(output_dir=str(tmp_path), use_cpu=True, parallelism_config=sharded).parallelism_config == sharded
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")  # which accelerate does not look at either
    DPOConfig(output_dir=str(tmp_path), use_cpu=True)


@pytest.mark.parametrize("given", [{"tp_plan": "auto"}, {"tp_size": 2}, {"distributed_config": {"tp_size": 2}}])
def test_a_tensor_parallel_plan_is_refused_before_the_model_is_loaded(tmp_path, given):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, model_init_kwargs=given)
    with pytest.raises(ValueError, match=rf"model_init_kwargs\['{next(iter(given))}'\].*add_dpo_forward"):
        load_model("no/such-model", args, None)


def test_a_tensor_parallel_model_is_refused(tmp_path):
    model, args = tiny_model("llama"), DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert load_model(model, args, None) is model
    model._tp_size = 2  # as loading it on two ranks leaves it
    with pytest.raises(ValueError, match="model.tp_size=2.*add_dpo_forward"):
        load_model(model, args, None)
