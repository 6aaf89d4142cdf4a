"""What FSDP2 and DeepSpeed make of a model, and how it runs like that before they have it.

An engine takes a model over when training starts. Until then it is whole, lies where it was loaded, on the host, and in
that precision. Yet the reference pass comes first, belongs on the device, and must round as training will: an engine in
bf16 casts weights, and nothing runs under autocast, which leaves in fp32 what layers add to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo_fast.errors import InputError
from dpo_fast.machine import free_memory

if TYPE_CHECKING:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

_SHARE = 0.8  # of the free memory that a whole model may take


def keep_numbers_exact(plugin: FullyShardedDataParallelPlugin) -> None:
    """Keeps FSDP2's mixed precision from rounding what goes into the loss, and log-probs and metrics that come out.

    Raises:
        ValueError: it is FSDP1.
    """
    if plugin.fsdp_version != 2:
        raise InputError(
            f"fsdp_version={plugin.fsdp_version} is not supported: its shards cannot be told from whole weights, and "
            "its mixed precision rounds reference log-probs. Take fsdp_version 2; `accelerate to-fsdp2` rewrites a "
            "configuration file"
        )
    if (policy := plugin.mixed_precision_policy) is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None, cast_forward_inputs=False)


def dtype_of_engine(accelerator: Accelerator) -> torch.dtype | None:
    """What FSDP2 or DeepSpeed casts weights to when it takes a model over; None where autocast, or nothing, does it."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return getattr(accelerator.state.fsdp_plugin.mixed_precision_policy, "param_dtype", None)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return None


def autocast_of_training(accelerator: Accelerator) -> contextlib.AbstractContextManager[None]:
    """accelerate's autocast, which it puts around a model's forward unless an engine casts the weights."""
    return contextlib.nullcontext() if dtype_of_engine(accelerator) is not None else accelerator.autocast()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has shared out weights of `model`, so that it runs on all ranks together."""
    return any(map(_is_shard, model.parameters()))


def _is_shard(weight: Tensor) -> bool:
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")


@contextlib.contextmanager
def weights_at_hand(model: nn.Module, accelerator: Accelerator | None = None) -> Iterator[None]:
    """Every module has its own weights while it runs, ZeRO-3's too where no engine sees to that. No gradients."""
    has_engine = getattr(accelerator, "deepspeed_engine_wrapped", None) is not None
    if has_engine or not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    from deepspeed import zero

    handles = []
    for module in model.modules():
        if own := [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")]:
            gathered = zero.GatheredParameters(own)
            handles.append(module.register_forward_pre_hook(lambda *_, gathered=gathered: gathered.__enter__()))
            handles.append(module.register_forward_hook(lambda *_, gathered=gathered: gathered.__exit__()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A whole model is on `device` meanwhile, if it was on the host and fits."""
    away = [tensor for tensor in (*model.parameters(), *model.buffers()) if _is_away(tensor, device)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in away)
    moves = bool(away) and not is_sharded(model) and size <= _SHARE * free_memory(device)
    if moves:
        model.to(device)
    try:
        yield
    finally:
        if moves:
            model.to("cpu")


def _is_away(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == "cpu" != device.type and not _is_shard(tensor)


@contextlib.contextmanager
def weights_in(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Modules of `model` run with their weights in `dtype`, and on `device` even where they are on the host.

    For passes without gradient. A module's copies exist while it runs; None leaves weights in their dtype.
    """
    handles, whole = [], {}

    def wanted(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
        casts = dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        return device if _is_away(tensor, device) else tensor.device, dtype if casts else tensor.dtype

    def others(module: nn.Module) -> Iterator[tuple[dict[str, Tensor | None], str, Tensor]]:
        """Weights and buffers of a module's own that are not so, but for those that an engine has in its hands."""
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not _is_shard(tensor) and wanted(tensor) != (tensor.device, tensor.dtype):
                    yield tensors, name, tensor

    def convert(module: nn.Module, *_) -> None:
        whole[module] = list(others(module))
        for tensors, name, tensor in whole[module]:
            copy = tensor.detach().to(*wanted(tensor))
            is_weight = isinstance(tensor, nn.Parameter)
            tensors[name] = nn.Parameter(copy, requires_grad=False) if is_weight else copy

    def restore(module: nn.Module, *_) -> None:
        for tensors, name, tensor in whole.pop(module):
            tensors[name] = tensor

    for module in model.modules():
        if any(others(module)):
            handles.append(module.register_forward_pre_hook(convert))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
