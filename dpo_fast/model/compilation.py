"""torch.compile of a model's layers, for `torch_compile=True`.

A model repeats one layer, so one layer is compiled and serves all: in seconds, where a whole model takes minutes. The
length is a variable of what is compiled: packs of all lengths share it and need no padding to a few sizes. Layers are
compiled in place, so that parameters keep their names and engines, adapters and checkpoints see the modules they know.
"""

from __future__ import annotations

from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from transformers import PreTrainedModel


def compile_layers(model: PreTrainedModel, plugin: TorchDynamoPlugin) -> None:
    """Compiles the layers of `model` as `plugin` says, and leaves the plugin nothing to do.

    Args:
        model: bare, or inside an adapter; its layers are those that its class says must not be split among devices.
            Without any such, its whole body is compiled.
        plugin: what accelerate would compile the whole model with.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for layer in layers or [model.base_model]:
        layer.compile(**{**plugin.to_kwargs(), "dynamic": True})
    plugin.backend = DynamoBackend.NO


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of `model` is compiled in place."""
    return any(module._compiled_call_impl is not None for module in model.modules())
