"""Liger's kernels for the norms, activations and rotary products of one model, for `layer_kernels="liger"`.

Liger replaces functions and classes in the module of a family, for every model in the process. Here the module is put
back as it was. A method of the given model that looks a replaced function up in its module becomes a copy that finds
Liger's. Liger's head and cross-entropy stay out: head and loss are ours, and `model.forward` is the packed one.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dpo_fast.config import DPOConfig
from dpo_fast.errors import InputError
from dpo_fast.model.adapters import base_of
from dpo_fast.model.compilation import is_compiled

_HEAD = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def check_layer_kernels(model: nn.Module, args: DPOConfig) -> None:
    """Refuse Liger's kernels for a family that Liger does not know, and where they cannot run.

    Raises:
        InputError: it is so, or `args.liger_kernel_config` names kernels that the family does not have.
    """
    if args.layer_kernels != "liger":
        return
    if args.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError("layer_kernels='liger' needs a GPU, and training runs on a CPU; take 'none' or 'compile'")
    _check_family(base_of(model), args.liger_kernel_config or {})


def use_liger(model: PreTrainedModel, options: Mapping[str, bool]) -> None:
    """Let Liger's kernels compute the layers of `model`, and of no other model. Repeating it is harmless.

    Args:
        model: bare, adapters in its layers included.
        options: `liger_kernel_config`: whether each kernel of the family's `apply_liger_kernel_to_…` is used.

    Raises:
        InputError: Liger does not know the family, or fails on this release of transformers.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _check_family(model, options)
    homes = {name: vars(sys.modules[name]) for name in {"torch.nn", *(type(m).__module__ for m in model.modules())}}
    before = {name: dict(home) for name, home in homes.items()}
    try:
        _apply_liger_kernel_to_instance(model=model, **{**options, **_HEAD})
    except Exception as error:  # whatever it does not find in this release
        raise InputError(
            f"layer_kernels='liger': liger-kernel fails on {type(model).__name__} of this transformers "
            f"({type(error).__name__}: {error}); take 'none' or 'compile', or another release of liger-kernel"
        ) from error
    finally:
        replaced = {name: _put_back(home, before[name]) for name, home in homes.items()}
    for module in model.modules():
        forward, home = getattr(module.forward, "__func__", None), type(module).__module__
        looks_up = isinstance(forward, FunctionType) and forward.__globals__ is homes[home]
        if looks_up and not replaced[home].keys().isdisjoint(forward.__code__.co_names):
            module.forward = MethodType(_looking_up(forward, replaced[home]), module)


def computed_by(model: nn.Module) -> dict[str, object]:
    """Return what computes `model` beside PyTorch's own operations, in JSON's types; nothing for those alone."""
    liger = sorted({function.__qualname__ for function in _functions(model) if _is_ligers(function)})
    return {**({"compiled": True} if is_compiled(model) else {}), **({"layer_kernels": liger} if liger else {})}


def _functions(model: nn.Module) -> Iterator[FunctionType]:
    """Yield the forwards of all modules, and the functions that these look up unless they are Liger's."""
    for module in model.modules():
        forward = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
        if isinstance(forward, FunctionType):
            called = () if _is_ligers(forward) else map(forward.__globals__.get, forward.__code__.co_names)
            yield from (function for function in (forward, *called) if isinstance(function, FunctionType))


def _is_ligers(function: FunctionType) -> bool:
    return str(function.__module__).startswith("liger_kernel.")


def _check_family(model: PreTrainedModel, options: Mapping[str, bool]) -> None:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as functions

    kind = model.config.model_type
    if kind not in functions:
        raise InputError(
            f"layer_kernels='liger': liger-kernel has no kernels for model type {kind!r}; take 'none' or 'compile'"
        )
    known = inspect.signature(functions[kind]).parameters.keys() - {"model", *_HEAD}
    if unknown := options.keys() - known - _HEAD.keys():
        raise InputError(
            f"liger_kernel_config has {sorted(unknown)}, which liger-kernel does not know for model type {kind!r}; "
            f"choose from {sorted(known)}"
        )


def _put_back(names: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Make `names` what they were `before`; return what they were meanwhile, where that is something else."""
    replaced = {name: value for name, value in names.items() if before.get(name) is not value}
    for name in replaced.keys() - before.keys():
        del names[name]
    names.update(before)
    return replaced


def _looking_up(function: FunctionType, replaced: Mapping[str, Any]) -> FunctionType:
    """Return a copy of `function` that finds `replaced` among the names of its module."""
    names = {**function.__globals__, **replaced}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
