"""What reference log-probs depend on besides tokens: the model's weights, hashed, and what is computed with them.

A tensor is hashed where it lies. Its raw bits are read as words v of at most 32 bits, and a lane is the sum

    Σ_i v_i · k(i)  mod 2^64,    k(i) = t(i mod 2^20) · m(i div 2^20),    t, m odd and pseudo-random (splitmix64),

over the words' positions i in the whole tensor; there are two lanes with numbers of their own. Sums do not care for
order, so they are the same on every device, and those of a tensor's pieces add up to the tensor's, however it is
sharded. Names, shapes, dtypes and sums then go through blake2b on the host.

When do two tensors collide? An odd k is invertible, so a change of any one word changes both lanes. Changes d_1, d_2, …
of several words have to cancel in Σ d·k. As |d| < 2^32 while sums have 64 bits, even the worst (sign bits: d = ±2^31)
leaves 32 random bits of Σ ±k: a chance of 2^-32 in a lane, which the factors m may raise to 2^-27, so at most 2^-54 in
both; changed low bits leave more. This guards against mistakes: who knows the numbers can construct a collision.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from dpo_fast.errors import InputError
from dpo_fast.model.adapters import base_of
from dpo_fast.model.frequencies import frequency_limit
from dpo_fast.model.head import read_head
from dpo_fast.model.layer_kernels import computed_by

STORE_VERSION = 3  # of the description below and of the keys, and so of every store that is found by it

LANES = 2
BLOCK = 2**20  # entries of the table
# Words a step: temporaries are 16 bytes a word, a core's cache on the CPU and 64 MiB elsewhere.
CPU_CHUNK, DEVICE_CHUNK = 2**16, 2**22

# Where PEFT's wrappers keep the module that they wrap, and what else lies on the way to it.
_ORIGINALS = ("base_layer", "original_module")
_ON_THE_WAY = (*_ORIGINALS, "token_adapter")


def _odd_numbers(first: int, count: int) -> np.ndarray:
    """Outputs first … first + count − 1 of splitmix64 with seed 0, made odd; int64 [count]."""
    z = (np.arange(count, dtype=np.uint64) + np.uint64(first + 1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)


@functools.cache
def _table(device: torch.device) -> Tensor:  # [LANES, BLOCK]
    return torch.from_numpy(_odd_numbers(0, LANES * BLOCK)).view(LANES, BLOCK).to(device)


def _multipliers(first: int, last: int, device: torch.device) -> Tensor:  # [LANES, last − first + 1]
    """The factors m of blocks first … last; their numbers follow those of the table."""
    numbers = _odd_numbers(LANES * (BLOCK + first), LANES * (last - first + 1))
    return torch.from_numpy(numbers).view(-1, LANES).T.to(device)


def fold(local: Tensor, offsets: Sequence[int], global_shape: Sequence[int]) -> Tensor:
    """The lanes of a rectangular piece of a tensor, int64 [LANES] on its device; all pieces' add up to the whole's.

    Args:
        local: the piece, of any dtype and strides.
        offsets: where it begins in the whole tensor, an index a dimension.
        global_shape: of the whole tensor.
    """
    local = local.detach()
    chunk = CPU_CHUNK if local.device.type == "cpu" else DEVICE_CHUNK
    if local.numel() == 0:
        return torch.zeros(LANES, dtype=torch.int64, device=local.device)
    if not local.is_contiguous():
        if local.numel() <= chunk:
            return fold(local.contiguous(), offsets, global_shape)
        split = next(dim for dim, size in enumerate(local.shape) if size > 1)
        half = local.shape[split] // 2
        after = [offset + half * (dim == split) for dim, offset in enumerate(offsets)]
        first, second = local.tensor_split([half], split)
        return fold(first, offsets, global_shape) + fold(second, after, global_shape)
    words = local.reshape(-1).view({1: torch.uint8, 2: torch.int16}.get(local.itemsize, torch.int32))
    per_element = words.numel() // local.numel()
    shape, whole = [*local.shape, per_element], [*global_shape, per_element]
    strides = [math.prod(whole[dim + 1 :]) for dim in range(len(whole))]
    start = sum(offset * stride for offset, stride in zip(offsets, strides, strict=False))
    # The piece is rows of consecutive words: it spans the dimensions after `split` entirely.
    split = max((dim for dim, size in enumerate(shape) if size != whole[dim]), default=0)
    if math.prod(shape[:split]) == 1:
        return _fold_row(words, start, chunk)
    starts = torch.tensor([start], device=words.device)
    for size, stride in zip(shape[:split], strides, strict=False):
        starts = (starts[:, None] + stride * torch.arange(size, device=words.device)).reshape(-1)
    last = start + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return _fold_rows(words, starts, (start, last), chunk)


def _fold_row(
    words: Tensor,  # [n], consecutive
    start: int,
    chunk: int,
) -> Tensor:
    table, block = _table(words.device), start // BLOCK
    multipliers = _multipliers(block, (start + words.numel() - 1) // BLOCK, words.device)
    sums = torch.zeros(LANES, dtype=torch.int64, device=words.device)
    position, end = start, start + words.numel()
    while position < end:
        column = position % BLOCK
        count = min(end - position, BLOCK - column, chunk)
        rows = 1
        if count == BLOCK:
            rows = min(end - position, chunk) // BLOCK
        values = words[position - start :][: rows * count].view(rows, count).to(torch.int64)
        row = position // BLOCK - block
        for lane in range(LANES):
            row_sums = (values * table[lane, column : column + count]).sum(1)
            sums[lane] += (row_sums * multipliers[lane, row : row + rows]).sum()
        position += rows * count
    return sums


def _fold_rows(
    words: Tensor,  # [rows · n]
    starts: Tensor,  # [rows], the position of each row's first word
    ends: tuple[int, int],  # positions of the first and the last word
    chunk: int,
) -> Tensor:
    table, block = _table(words.device), ends[0] // BLOCK
    multipliers = _multipliers(block, ends[1] // BLOCK, words.device)
    sums = torch.zeros(LANES, dtype=torch.int64, device=words.device)
    length = words.numel() // starts.numel()
    chunk //= 4  # there are more temporaries: positions and keys
    for begin in range(0, words.numel(), chunk):
        values = words[begin : begin + chunk].to(torch.int64)
        index = torch.arange(begin, begin + values.numel(), device=words.device)
        positions = starts[index // length] + index % length
        column, row = positions % BLOCK, positions // BLOCK - block
        for lane in range(LANES):
            sums[lane] += (values * table[lane, column] * multipliers[lane, row]).sum()
    return sums


def _lanes(tensor: Tensor) -> tuple[tuple[int, ...], Tensor, tuple[dist.ProcessGroup, ...]]:
    """Shape of the whole tensor, lanes of what this process has of it, and the groups to sum them over, in turn."""
    if hasattr(tensor, "ds_id"):  # ZeRO-3: empty outside its module's forward
        from deepspeed import zero

        with zero.GatheredParameters([tensor]):
            return tuple(tensor.shape), fold(tensor.data, [0] * tensor.ndim, tensor.shape), ()
    shape, whole = tuple(tensor.shape), [0] * tensor.ndim
    if not isinstance(tensor, DTensor):
        return shape, fold(tensor, whole, shape), ()
    mesh, placements = tensor.device_mesh, tensor.placements
    if not all(type(placement) in (Shard, Replicate) for placement in placements):
        return shape, fold(tensor.full_tensor(), whole, shape), ()  # strided shards are not rectangular
    # Each group of a sharded dimension has the tensor once: replicas are not summed over.
    groups = tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if placement.is_shard())
    _, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return shape, fold(tensor.to_local(), offsets, shape).to(mesh.device_type), groups


def weights_fingerprint(model: nn.Module, adapters: bool) -> str:
    """Hash of names, shapes, dtypes and content of all parameters and persistent buffers, 32 hexadecimal digits.

    It is the same on every device, and on every rank of a sharded model; there, all ranks must call it together.

    Args:
        adapters: whether PEFT's active adapters count. Without them a wrapped model has the fingerprint of its base.

    Raises:
        ValueError: a weight has no content, or an adapter that does not count is merged into the weights.
    """
    weights = sorted(_named_weights(model, adapters), key=lambda weight: weight[0])
    shapes: dict[int, tuple[int, ...]] = {}  # by the tensor's id: tied weights have several names
    sums: dict[int, Tensor] = {}
    sharded: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for name, tensor in weights:
        if tensor.is_meta:
            raise InputError(
                f"model has {name!r} on the meta device, without content; load it without offloading by device_map"
            )
        if id(tensor) not in sums:
            shapes[id(tensor)], sums[id(tensor)], groups = _lanes(tensor)
            if groups:
                sharded.setdefault(groups, []).append(id(tensor))
    _table.cache_clear()
    for groups, keys in sharded.items():
        total = torch.stack([sums[key] for key in keys])
        for group in groups:
            dist.all_reduce(total, group=group)
        sums.update(zip(keys, total, strict=True))
    device = next(iter(sums.values())).device
    numbers = torch.stack([lanes.to(device) for lanes in sums.values()]).tolist()  # the one wait for the device
    lanes = dict(zip(sums, numbers, strict=True))
    return digest_of([[name, shapes[id(tensor)], str(tensor.dtype), lanes[id(tensor)]] for name, tensor in weights])


def digest_of(content: object) -> str:
    """blake2b of what JSON can write, 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _active_adapters(model: nn.Module) -> list[str]:
    if not hasattr(model, "peft_config"):
        return []
    active = model.active_adapters  # a property of PEFT's wrapper, a method of transformers' models
    return sorted(active() if callable(active) else active)


def _named_weights(model: nn.Module, adapters: bool) -> Iterator[tuple[str, Tensor]]:
    """Weights of the base by the names that they have in the bare model, and those of active adapters by their own."""
    base = base_of(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    inactive = {*getattr(model, "peft_config", ())}.difference(_active_adapters(model))
    wrapped = {}  # path of a module that PEFT has wrapped → name of the original in the wrapper
    for path, module in base.named_modules() if hasattr(model, "peft_config") else ():
        wrapped.update((path, name) for name in _ORIGINALS if getattr(module, "_modules", {}).get(name) is not None)
        if not adapters and getattr(module, "merged", False):
            raise InputError(f"model has an adapter merged into {path!r}, adapters=False; call unmerge_adapter() first")
    for name, tensor in model.state_dict(keep_vars=True).items():
        path = name.removeprefix(prefix).split(".")
        inner = ((wrapped.get(".".join(path[:depth])), path[depth]) for depth in range(len(path)))
        of_base = name.startswith(prefix) and all(original in (None, part) for original, part in inner)
        if of_base:
            yield from _plain_tensors(".".join(part for part in path if not wrapped or part not in _ON_THE_WAY), tensor)
        elif adapters and inactive.isdisjoint(path):
            yield from _plain_tensors(name, tensor)


def _plain_tensors(name: str, tensor: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a tensor of a quantised type is made of; what is no tensor (extra state) is no weight."""
    if hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, DTensor):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))
    elif isinstance(tensor, Tensor):
        yield name, tensor


# Names for housekeeping, for training, for the text that is generated, and what is hashed elsewhere. All others count.
_NOT_COMPUTED_WITH = re.compile(
    r"_name_or_path|_pre_quantization_dtype|transformers_version|architectures"
    r"|auto_map|(torch_)?dtype|use_cache|return_dict|output_(attentions|hidden_states|router_logits)|gradient_checkpointing"
    r"|id2label|label2id|problem_type|(pad|bos|eos|sep|decoder_start|forced_bos|forced_eos)_token_id"
    r"|initializer_(range|factor)|router_(aux|z)_loss_coef|((resid|embd|emb|attn)_p|layer)drop"
    r"|((attention|attention_probs|activation|classifier|embedding|hidden|mlp|resid|residual)_)?dropout(_prob|_rate)?"
)
_NOT_COMPUTED_WITH_IN_ADAPTERS = re.compile(
    r"base_model_name_or_path|revision|task_type|inference_mode|auto_mapping|peft_version|rng_seed|\w*dropout|init_\w*"
    r"|(target|exclude)_modules|modules_to_save|layers_to_transform|layers_pattern|bias|ensure_weight_tying"
    r"|(loftq|eva|corda|lora_ga|runtime|megatron)_config|megatron_core"
)


def _json_value(value: object) -> str | list[object]:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value).removeprefix("torch.")


def _computed_with(settings: object) -> object:
    """A configuration without what its numbers do not depend on, in its parts too."""
    if not isinstance(settings, dict):
        return settings
    return {name: _computed_with(value) for name, value in settings.items() if not _NOT_COMPUTED_WITH.fullmatch(name)}


def _model_settings(config: PretrainedConfig) -> dict[str, object]:
    settings = json.loads(json.dumps(config.to_dict(), default=_json_value))
    quantization = settings.pop("quantization_config", None)
    if type(config).__module__.startswith("transformers."):
        # Old files hold settings of generation. Those that a model's own class declares shape its computation.
        generation = {*GenerationConfig().to_dict()}.difference(field.name for field in fields(config))
        settings = {name: value for name, value in settings.items() if name not in generation}
    return {**_computed_with(settings), **({"quantization_config": quantization} if quantization else {})}


def _adapter_settings(model: nn.Module) -> dict[str, dict[str, object]]:
    settings = {}
    for adapter in _active_adapters(model):
        config = json.loads(json.dumps(model.peft_config[adapter].to_dict(), default=_json_value))
        settings[adapter] = {k: v for k, v in config.items() if not _NOT_COMPUTED_WITH_IN_ADAPTERS.fullmatch(k)}
    return settings


def reference_description(
    model: PreTrainedModel,
    *,
    adapters: bool,
    dtype: torch.dtype,
    attention: str,
    weights: str | None = None,
) -> dict[str, object]:
    """Everything that reference log-probs depend on besides the tokens, in JSON's types, and nothing else.

    Args:
        model: bare, wrapped by PEFT or sharded; then all ranks must call this together.
        adapters: whether PEFT's active adapters count.
        dtype: of the computation.
        attention: names the layout and the backend of the attention.
        weights: the fingerprint of the weights, where it is known.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    form = base.dpo_fast.head_form if "dpo_fast" in vars(base) else read_head(base)
    architecture = next(kind for kind in type(base).__mro__ if not issubclass(kind, FSDPModule))
    description = {
        "version": STORE_VERSION,
        "architecture": architecture.__name__,
        "weights": weights_fingerprint(model, adapters) if weights is None else weights,
        "logits": "the model's own" if form is None else asdict(form.transform),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "experts": getattr(config, "_experts_implementation", None),
        "config": _model_settings(config),
    }
    if math.isfinite(frequency_limit(base)):
        description["frequencies"] = "of each sequence alone"
    description |= computed_by(base)
    if adapters and (settings := _adapter_settings(model)):
        description["adapters"] = settings
    return description
