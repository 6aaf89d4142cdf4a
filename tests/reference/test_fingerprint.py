"""The fingerprint of a model changes with everything that its log-probs depend on, and with nothing else.

It is the formula's, the same however the weights lie in memory and are sharded; the description of a reference is the
same for a model built twice, saved and loaded, wrapped or sharded.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from dpo_fast.reference import fingerprint, lanes
from dpo_fast.reference.fingerprint import weights_fingerprint
from dpo_fast.reference.lanes import fold
from families import FAMILIES, tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.bool, torch.int64, torch.float64]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bits, among them those of infinities and NaNs."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    bits = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, count, dtype=np.uint8)
    return torch.from_numpy(bits).view(dtype).view(shape)


def whole(tensor: torch.Tensor) -> list[int]:
    return fold(tensor, [0] * tensor.ndim, tensor.shape).tolist()


@contextlib.contextmanager
def small_blocks(block: int, chunk: int):
    """Tables of `block` numbers and steps of `chunk` words, so that little tensors have many of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "BLOCK", block)
        patch.setattr(lanes, "CPU_CHUNK", chunk)
        lanes.table.cache_clear()
        yield
    lanes.table.cache_clear()


def splitmix(index: int) -> int:
    z = (index + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_pseudo_random_numbers_are_splitmix64():
    assert splitmix(0) == 0xE220A8397B1DCDAF and splitmix(1) == 0x6E789E6AA1B965F4  # its published outputs for seed 0
    numbers = lanes._odd_numbers(3, 1000).view(np.uint64).tolist()
    assert numbers == [splitmix(3 + i) | 1 for i in range(1000)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block", "chunk"), [(8, 16), (8, 3), (2**20, 2**16)])
def test_sums_are_the_formula(dtype, block, chunk):
    tensor = random_tensor((7, 9), dtype)
    word = {1: np.uint8, 2: np.int16}.get(dtype.itemsize, np.int32)
    expected = [0, 0]
    for i, value in enumerate(tensor.view(torch.uint8).numpy().reshape(-1).view(word).tolist()):
        for lane in range(2):
            key = (splitmix(lane * block + i % block) | 1) * (splitmix(2 * block + 2 * (i // block) + lane) | 1)
            expected[lane] = (expected[lane] + value * key + 2**63) % 2**64 - 2**63
    with small_blocks(block, chunk):
        assert whole(tensor) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_counts_in_both_lanes(dtype):
    tensor = random_tensor((5,), dtype)
    bits = tensor.view(torch.uint8)
    seen = [whole(tensor)]
    for byte in range(bits.numel()):
        for bit in range(1 if dtype == torch.bool else 8):
            bits[byte] ^= 1 << bit
            seen.append(whole(tensor))
            bits[byte] ^= 1 << bit
    for lane in range(2):
        assert len({sums[lane] for sums in seen}) == len(seen)


def test_signs_flipped_in_pairs_and_values_exchanged_are_noticed():
    tensor = random_tensor((60,), torch.float32).nan_to_num()
    before = whole(tensor)
    for pair in map(list, itertools.combinations(range(60), 2)):
        flipped, exchanged = tensor.clone(), tensor.clone()
        flipped[pair], exchanged[pair] = -tensor[pair], tensor[pair].flip(0)
        for lane in range(2):
            assert len({before[lane], whole(flipped)[lane], whole(exchanged)[lane]}) == 3, pair


@given(st.data())
def test_the_sums_of_all_pieces_add_up(data):
    """Pieces of every rectangular sharding: even, uneven, empty, along each dimension and several at once."""
    shape = tuple(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4), "shape"))
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    cuts = [sorted(data.draw(st.lists(st.integers(0, size), max_size=3), "cuts")) for size in shape]
    tensor = random_tensor(shape, dtype)
    total = torch.zeros(2, dtype=torch.int64)
    with small_blocks(16, data.draw(st.sampled_from((8, 40)), "chunk")):
        spans = [zip([0, *cut], [*cut, size], strict=True) for cut, size in zip(cuts, shape, strict=True)]
        for ends in itertools.product(*spans):
            piece = tensor[tuple(slice(*end) for end in ends)]
            piece = piece.clone() if data.draw(st.booleans(), "contiguous") else piece
            total += fold(piece, [begin for begin, _ in ends], shape)
        assert total.tolist() == whole(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_count(dtype):
    tensor = random_tensor((6, 5, 7), dtype)
    with small_blocks(16, 24):
        for order in itertools.permutations(range(3)):
            view = tensor.permute(order)
            assert whole(view) == whole(view.contiguous())
    assert whole(tensor[0, 0, 0]) == whole(tensor[0, 0, :1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 8)


def changed(module: nn.Module, change) -> bool:
    other = copy.deepcopy(module)
    with torch.no_grad():
        change(other)
    return weights_fingerprint(other, True) != weights_fingerprint(module, True)


def test_the_fingerprint_stays_as_it_is():
    """Stores on disk are found by it: a change of this value needs a new STORE_VERSION."""
    assert weights_fingerprint(Tied(), True) == "01ac43e6b0053995d4e52f1f013c1d6b"


def test_names_shapes_dtypes_and_buffers_count():
    assert changed(Tied(), lambda m: m.head.bias[10].mul_(1 + 2**-23))
    assert changed(Tied(), lambda m: m.scale[1].neg_())
    assert changed(Tied(), lambda m: m.register_buffer("scale", m.scale.view(1, 3)))
    assert changed(nn.Linear(2, 2), lambda m: m.weight.copy_(m.weight.T.clone()))
    assert changed(Tied(), lambda m: setattr(m, "head2", m._modules.pop("head")))
    zeros = Tied()
    zeros.scale.zero_()
    assert changed(zeros, lambda m: m.register_buffer("scale", m.scale.to(torch.int32)))
    assert not changed(Tied(), lambda m: m.scratch.zero_())
    assert not changed(Tied(), lambda m: m.requires_grad_(False).eval())


def test_tied_weights_are_hashed_once(monkeypatch):
    calls, fold_all = [], lanes.fold_all
    monkeypatch.setattr(fingerprint, "fold_all", lambda pieces: calls.extend(pieces) or fold_all(pieces))
    tied, untied = Tied(), Tied()
    untied.head.weight = nn.Parameter(tied.embedding.weight.detach().clone())
    assert weights_fingerprint(tied, True) == weights_fingerprint(untied, True)
    assert len(calls) == 3 + 4


def test_a_weight_without_content_is_refused():
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="model has 'bias' on the meta device"):
        weights_fingerprint(model, True)


def test_tensors_made_of_tensors_count_with_all_their_parts():
    def module(first: float, second: float) -> nn.Module:
        made = nn.Module()
        made.weight = nn.Parameter(TwoTensor(torch.full((3,), first), torch.full((3,), second)), requires_grad=False)
        return made

    prints = {weights_fingerprint(module(*values), True) for values in [(1, 2), (2, 1), (1, 1), (1, 2)]}
    assert len(prints) == 3


def test_parameters_that_deepspeed_has_partitioned_are_gathered(monkeypatch):
    """ZeRO-3 leaves an empty parameter with an id; DeepSpeed's context fills it."""
    full, partitioned = nn.Linear(5, 3), nn.Linear(5, 3)
    contents = [parameter.data for parameter in full.parameters()]
    for number, parameter in enumerate(partitioned.parameters()):
        parameter.ds_id, parameter.data = number, torch.empty(0)

    @contextlib.contextmanager
    def gathered(parameters):
        (parameter,) = parameters
        parameter.data = contents[parameter.ds_id]
        yield
        parameter.data = torch.empty(0)

    deepspeed = types.SimpleNamespace(zero=types.SimpleNamespace(GatheredParameters=gathered))
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    assert weights_fingerprint(partitioned, True) == weights_fingerprint(full, True)
    assert partitioned.weight.numel() == 0


@pytest.mark.gpu
def test_a_gpu_finds_the_fingerprint_of_the_cpu():
    model = nn.ParameterList(random_tensor((1100, 1031), dtype, 1) for dtype in DTYPES if dtype.is_floating_point)
    model.append(nn.Parameter(random_tensor((2**22 + 2**21 + 17,), torch.float32)))
    expected = weights_fingerprint(model, True)
    piece = model[0].detach()[:, 100:700]
    partial = fold(piece, [0, 100], (1100, 1031)).tolist()
    assert weights_fingerprint(model.cuda(), True) == expected
    assert fold(piece.cuda(), [0, 100], (1100, 1031)).tolist() == partial


def on_a_rank(rank: int, world: int, rendezvous: str) -> None:
    """Compares every way of sharding with the whole model, and a change that only the last rank sees."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    plain = tiny_model("llama-tied", num_hidden_layers=2)
    expected = describe(plain)

    def agrees(model: nn.Module, what: str) -> None:
        found = describe(model)
        assert found == expected, f"{what} on rank {rank}: {found} != {expected}"

    def fully_sharded(mesh, model: nn.Module | None = None) -> nn.Module:
        model = copy.deepcopy(plain) if model is None else model
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    line = init_device_mesh("cpu", (world,), mesh_dim_names=("line",))
    sharded = fully_sharded(line)
    agrees(sharded, "fully_shard")
    sharded(input_ids=torch.tensor([[3, 4, 5]]))
    agrees(sharded, "fully_shard after a forward")
    for placement in (Shard(1), Replicate()):
        placed = copy.deepcopy(plain)
        for module in placed.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim > 1 and parameter is not placed.lm_head.weight:
                    setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), line, [placement])))
        agrees(placed, str(placement))
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        agrees(fully_sharded(grid), "replicas of shards")
        parallel = copy.deepcopy(plain)
        for layer in parallel.model.layers:
            plan = {"mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
            parallelize_module(layer, grid["inner"], plan)
        agrees(parallel, "tensor parallel")
        agrees(fully_sharded(grid["outer"], parallel), "tensor parallel and fully_shard")
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight[-1, -1] *= -1
        if rank == world - 1:
            sharded.model.layers[1].mlp.up_proj.weight.to_local()[-1, -1] *= -1
    expected = {**expected, "weights": weights_fingerprint(plain, False)}
    agrees(sharded, "a change")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_of_a_sharded_model_find_the_fingerprint_of_the_whole(world, tmp_path):
    torch.multiprocessing.spawn(on_a_rank, (world, str(tmp_path / "rendezvous")), nprocs=world)


def wrapped(model, *, kind: str = "LoraConfig", **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    if kind != "PromptTuningConfig":
        options = {"target_modules": ["q_proj", "down_proj"], **options}
    return peft.get_peft_model(copy.deepcopy(model), getattr(peft, kind)(**{"task_type": "CAUSAL_LM", **options}))


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", num_hidden_layers=2)


def describe(model, adapters: bool = False, **options) -> dict[str, object]:
    options = {"dtype": torch.bfloat16, "attention": "shared/sdpa", **options}
    return fingerprint.reference_description(model, adapters=adapters, **options)


ADAPTERS = {
    "rank 2": {"r": 2},
    "rank 8, dora": {"r": 8, "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "modules to save": {"modules_to_save": ["lm_head", "norm"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "ia3": {"kind": "IA3Config", "feedforward_modules": ["down_proj"]},
    "vera": {"kind": "VeraConfig", "target_modules": ["q_proj"]},
    "lokr": {"kind": "LoKrConfig"},
    "prompt": {"kind": "PromptTuningConfig", "num_virtual_tokens": 3},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_without_adapters_a_wrapped_model_is_its_base(llama, name):
    model = wrapped(llama, **ADAPTERS[name])
    assert describe(model) == describe(llama)
    with_adapter = describe(model, adapters=True)
    assert with_adapter["weights"] != describe(llama)["weights"]
    assert json.loads(json.dumps(with_adapter)) == with_adapter


def test_adapters_of_transformers_own_integration_are_like_wrapped_ones(llama):
    model, peft = copy.deepcopy(llama), pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]), "mine")
    assert describe(model) == describe(llama) == describe(llama, adapters=True)
    assert list(describe(model, adapters=True)["adapters"]) == ["mine"]


def test_weights_of_active_adapters_count_and_of_others_not(llama):
    model = wrapped(llama, init_lora_weights=False)
    before = describe(model, adapters=True)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    assert describe(model, adapters=True) == before, "an adapter that is not active"
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight[0, 0] += 1
    assert describe(model, adapters=True)["weights"] != before["weights"]
    model.set_adapter("other")
    assert list(describe(model, adapters=True)["adapters"]) == ["other"]
    assert describe(model) == describe(llama)


@pytest.mark.parametrize("change", [{"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}], ids=str)
def test_what_scales_an_adapter_counts_only_with_it(llama, change):
    one, other = wrapped(llama), wrapped(llama, **change)
    assert describe(one, adapters=True)["weights"] == describe(other, adapters=True)["weights"]
    assert describe(one, adapters=True)["adapters"] != describe(other, adapters=True)["adapters"]
    assert describe(one) == describe(other)


def test_where_from_and_how_an_adapter_is_trained_does_not_count(llama):
    before, moved = describe(wrapped(llama), adapters=True), copy.deepcopy(llama)
    moved.name_or_path = "elsewhere"
    assert describe(wrapped(moved), adapters=True) == before
    for change in ({"lora_dropout": 0.5}, {"revision": "main"}, {"bias": "all"}, {"task_type": None}):
        assert describe(wrapped(llama, **change), adapters=True) == before, change


def test_settings_in_a_set_have_an_order(llama):
    model = wrapped(llama, kind="IA3Config", feedforward_modules=["q_proj", "down_proj"])
    assert describe(model, adapters=True)["adapters"]["default"]["feedforward_modules"] == ["down_proj", "q_proj"]


def test_an_adapter_is_the_same_from_disk(llama, tmp_path):
    model = wrapped(llama, init_lora_weights=False, use_rslora=True, rank_pattern={"down_proj": 3})
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(copy.deepcopy(llama), tmp_path)
    assert describe(loaded, adapters=True) == describe(model, adapters=True)


def test_a_merged_adapter_is_refused_where_the_base_is_meant(llama):
    model = wrapped(llama, init_lora_weights=False)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        weights_fingerprint(model, False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_the_same_built_twice_and_from_disk(family, tmp_path):
    model = tiny_model(family)
    description = describe(model)
    assert json.loads(json.dumps(description)) == description
    assert describe(tiny_model(family)) == description
    model.save_pretrained(tmp_path)
    assert describe(type(model).from_pretrained(tmp_path, dtype=torch.float32)) == description


def altered(model, name: str, value: object):
    other = copy.deepcopy(model)
    setattr(other.config, name, value)
    return other


COUNTING = (
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10001.0}, "rms_norm_eps": 1e-5, "hidden_act": "gelu"},
    {"num_attention_heads": 2, "max_position_embeddings": 128, "final_logit_softcapping": 30.0, "of_tomorrow": 1},
    {"quantization_config": {"quant_method": "fp8", "_private": 1}, "_experts_implementation": "batched_mm"},
)


@pytest.mark.parametrize(("name", "value"), [item for settings in COUNTING for item in settings.items()])
def test_what_shapes_the_computation_counts(llama, name, value):
    assert describe(altered(llama, name, value)) != describe(llama)


HOUSEKEEPING = (
    {"use_cache": False, "return_dict": False, "output_hidden_states": True, "gradient_checkpointing": True},
    {"pad_token_id": 5, "bos_token_id": None, "eos_token_id": [2, 3], "sep_token_id": 4, "decoder_start_token_id": 1},
    {"_name_or_path": "elsewhere", "transformers_version": "5.17.0", "auto_map": {"AutoConfig": "there.Config"}},
    {"architectures": ["Other"], "dtype": torch.bfloat16, "_pre_quantization_dtype": torch.float32},
    {"temperature": 0.7, "top_k": 3, "max_length": 99, "do_sample": True, "forced_eos_token_id": 2},
    {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 7}, "problem_type": "regression"},
    {"attention_dropout": 0.1, "resid_pdrop": 0.1, "layerdrop": 0.1, "initializer_range": 0.5},
    {"_attn_implementation": "eager", "router_aux_loss_coef": 0.5, "output_router_logits": True},
)


@pytest.mark.parametrize(("name", "value"), [item for settings in HOUSEKEEPING for item in settings.items()])
def test_what_does_not_shape_the_computation_does_not_count(llama, name, value):
    assert describe(altered(llama, name, value)) == describe(llama)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("gemma2", "attn_logit_softcapping", 4.0),
        ("gemma2", "sliding_window", 9),
        ("gemma3_text", "layer_types", ["full_attention"] * 4),
        ("cohere2", "logit_scale", 0.5),
    ],
)
def test_settings_of_a_family_count(family, name, value):
    model = tiny_model(family)
    assert describe(altered(model, name, value)) != describe(model)


def test_a_setting_of_generation_counts_where_the_models_own_class_has_it(llama, monkeypatch):
    """Declared by a class of transformers, or perhaps read by code that comes with a model."""
    declaring = {"__module__": "transformers.models.own", "__annotations__": {"top_k": int}, "top_k": 1}
    for attributes in (declaring, {"__module__": "elsewhere"}):
        own = copy.deepcopy(llama)
        own.config.__class__ = type("Config", (type(llama.config),), attributes)
        before = describe(own)
        assert describe(altered(own, "top_k", 3)) != before
        assert describe(altered(own, "pad_token_id", 3)) == before
    monkeypatch.setattr("transformers.configuration_utils.__version__", "5.17.0")
    assert describe(own) == before


def test_weights_dtype_and_attention_count(llama):
    described = [describe(llama), describe(llama, dtype=torch.float32), describe(llama, attention="padded/sdpa")]
    other = copy.deepcopy(llama)
    other.model.norm.weight.data.view(torch.int32)[3] ^= 1
    described += [describe(other), describe(copy.deepcopy(llama).to(torch.bfloat16))]
    for one, another in itertools.combinations(described, 2):
        assert one != another
    assert describe(llama)["version"] == fingerprint.STORE_VERSION == 3
