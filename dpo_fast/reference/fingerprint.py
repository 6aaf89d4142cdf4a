"""What reference log-probs depend on besides tokens: the model's weights, hashed, and what is computed with them.

The weights are hashed as they lie in memory. Their files say less: they may be replaced after loading, or lack a layer.
A tensor's bits are summed where it lies (`lanes.py`). Names, shapes, dtypes and sums then go through blake2b.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import NamedTuple

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
from dpo_fast.reference.lanes import Piece, fold_all, table

logger = logging.getLogger(__name__)

STORE_VERSION = 3  # of the description below and of the keys, and so of every store that is found by it

# Where PEFT's wrappers keep the module that they wrap, and what else lies on the way to it.
_ORIGINALS = ("base_layer", "original_module")
_ON_THE_WAY = (*_ORIGINALS, "token_adapter")


class _Weight(NamedTuple):
    """A tensor, or this process's piece of it.

    Attributes:
        shape: of the whole tensor.
        lanes: the sums of a tensor that is not there any more; else `piece` is to be summed.
        device: where the sums of the ranks are added up.
        groups: the ranks to add up over, in turn.
    """

    shape: tuple[int, ...]
    piece: Piece | None = None
    lanes: Tensor | None = None
    device: str | torch.device | None = None
    groups: tuple[dist.ProcessGroup, ...] = ()


def _weight(tensor: Tensor) -> _Weight:
    shape, whole = tuple(tensor.shape), [0] * tensor.ndim
    if hasattr(tensor, "ds_id"):  # ZeRO-3: empty outside its module's forward
        from deepspeed import zero

        with zero.GatheredParameters([tensor]):
            shape, whole = tuple(tensor.shape), [0] * tensor.ndim
            return _Weight(shape, lanes=fold_all([Piece(tensor.data, whole, shape)])[0])
    if not isinstance(tensor, DTensor):
        return _Weight(shape, Piece(tensor.detach(), whole, shape))
    mesh, placements = tensor.device_mesh, tensor.placements
    if not all(type(placement) in (Shard, Replicate) for placement in placements):  # strided shards: not rectangular
        return _Weight(shape, lanes=fold_all([Piece(tensor.full_tensor(), whole, shape)])[0])
    # Each group of a sharded dimension has the tensor once: replicas are not summed over.
    groups = tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if placement.is_shard())
    _, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return _Weight(shape, Piece(tensor.to_local(), offsets, shape), device=mesh.device_type, groups=groups)


def weights_fingerprint(model: nn.Module, adapters: bool) -> str:
    """Hash of names, shapes, dtypes and content of all parameters and persistent buffers, 32 hexadecimal digits.

    It is the same on every device, and on every rank of a sharded model; there, all ranks must call it together.

    Args:
        adapters: whether PEFT's active adapters count. Without them a wrapped model has the fingerprint of its base.

    Raises:
        ValueError: a weight has no content, or an adapter that does not count is merged into the weights.
    """
    began = time.perf_counter()
    tensors = sorted(_named_weights(model, adapters), key=lambda weight: weight[0])
    weights: dict[int, _Weight] = {}  # by the tensor's id: tied weights have several names
    for name, tensor in tensors:
        if tensor.is_meta:
            raise InputError(
                f"model has {name!r} on the meta device, without content; load it without offloading by device_map"
            )
        if id(tensor) not in weights:
            weights[id(tensor)] = _weight(tensor)
    pieces = {key: weight.piece for key, weight in weights.items() if weight.piece is not None}
    sums = {key: weight.lanes for key, weight in weights.items()}
    sums |= zip(pieces, fold_all([*pieces.values()]), strict=True)
    table.cache_clear()
    sharded: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for key, weight in weights.items():
        if weight.groups:
            sharded.setdefault(weight.groups, []).append(key)
    for groups, keys in sharded.items():
        total = torch.stack([sums[key].to(weights[key].device) for key in keys])
        for group in groups:
            dist.all_reduce(total, group=group)
        sums.update(zip(keys, total, strict=True))
    device = next(iter(sums.values())).device
    numbers = torch.stack([lanes.to(device) for lanes in sums.values()]).tolist()  # the one wait for the device
    lanes = dict(zip(sums, numbers, strict=True))
    size = sum(piece.local.nbytes for piece in pieces.values()) / 1e9
    seconds = time.perf_counter() - began
    logger.info("hashed %.2f GB of weights in %.2f s, %.1f GB/s", size, seconds, size / seconds)
    return digest_of(
        [[name, weights[id(tensor)].shape, str(tensor.dtype), lanes[id(tensor)]] for name, tensor in tensors]
    )


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
) -> dict[str, object]:
    """Everything that reference log-probs depend on besides the tokens, in JSON's types, and nothing else.

    Args:
        model: bare, wrapped by PEFT or sharded; then all ranks must call this together.
        adapters: whether PEFT's active adapters count.
        dtype: of the computation.
        attention: names the layout and the backend of the attention.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    form = base.dpo_fast.head_form if "dpo_fast" in vars(base) else read_head(base)
    architecture = next(kind for kind in type(base).__mro__ if not issubclass(kind, FSDPModule))
    description = {
        "version": STORE_VERSION,
        "architecture": architecture.__name__,
        "weights": weights_fingerprint(model, adapters),
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
