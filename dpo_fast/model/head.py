"""The LM head of a Hugging Face model as arguments of the kernels: weight, bias and what is done to the logits.

How a model makes logits is read off what its forward does, not off its configuration, where the same word means a
factor in one family and a divisor in another.

Under tensor parallelism a rank holds some rows of the weight, all of hidden, and makes the logits of its own words.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dpo_fast.model.replacing import runs_instead
from dpo_fast_kernels import LogitTransform, VocabularyShards

_PRODUCTS = torch.linspace(-90.0, 90.0, 61)  # what the head is made to say, to see what becomes of it
_SAME = 1e-5  # relative difference that one formula makes in another order


@dataclass(frozen=True)
class Head:
    """The module that runs as the head: logits = transform(hidden · weightᵀ + bias)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    transform: LogitTransform

    @property
    def shards(self) -> VocabularyShards | None:
        """How the words lie on tensor-parallel ranks; None where the weight is whole. Ask inside the model's forward.

        There FSDP2 has gathered what it shards, so that a weight which is still a DTensor is a tensor-parallel one.

        Raises:
            ValueError: the weight is sharded otherwise than by rows.
        """
        return VocabularyShards.of(self.weight) if isinstance(self.weight, DTensor) else None


def linear_heads(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that may run as the LM head of `model`: hidden · weightᵀ + bias each.

    There are several where an adapter trains a copy of the head; none where an adapter adds to what the head makes.
    """
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    heads = [head] if copies is None else [head.original_module, *copies.values()]
    return heads if all(_is_linear(head) for head in heads) else []


def _is_linear(head: nn.Module | None) -> bool:
    weight = getattr(head, "weight", None)
    if not isinstance(weight, nn.Parameter) or hasattr(head, "base_layer") or list(head.children()):
        return False
    return weight.is_floating_point() and len(getattr(weight, "ds_shape", weight.shape)) == 2


class HeadForm(NamedTuple):
    """How a model comes from its decoder's hidden states to logits.

    Attributes:
        decoder: name of the module whose `last_hidden_state` the head reads, maybe times a constant.
        transform: what is done to the head's products, the constant included.
    """

    decoder: str
    transform: LogitTransform


def read_head(model: PreTrainedModel) -> HeadForm | None:
    """Return how `model` makes logits, or None where it does more than a linear head and a transform.

    The model's forward runs with its decoder and its head replaced, so it takes no time, and no weights. The head says
    numbers of our choice, and what comes out tells the formula; its constants are numbers of the configuration.
    """
    if not linear_heads(model):
        return None
    config = model.config.get_text_config()
    names = [name for name, module in model.named_modules() if isinstance(module, PreTrainedModel) and name]
    first = next((name for name in names if model.get_submodule(name) is model.base_model), None)
    for name in dict.fromkeys([first, *names] if first else names):
        factor, logits = _run_on_stubs(model, model.get_submodule(name))
        if factor is not None and (transform := _formula(logits, config)) is not None:
            return HeadForm(name, replace(transform, scale=factor * transform.scale))
    return None


class _StubbedOutput(BaseModelOutputWithPast):
    """Has every field that a model may look for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _run_on_stubs(model: PreTrainedModel, decoder: nn.Module) -> tuple[float | None, Tensor]:
    """Return by what the forward multiplies the output of `decoder` before the head reads it, and its logits.

    The factor is None where it does anything else, and the logits are what it makes of `_PRODUCTS`.
    """
    hidden, products, read = torch.tensor([[[1.0, 3.0]]]), _PRODUCTS[None, None], []
    head = model.get_output_embeddings()

    def say_products(_, given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        read.append(given)
        return products

    with torch.no_grad(), ExitStack() as replaced:
        replaced.enter_context(runs_instead(decoder, lambda *_, **__: _StubbedOutput(last_hidden_state=hidden)))
        replaced.enter_context(runs_instead(head, say_products))
        try:
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False, return_dict=True).logits
        except Exception:  # a forward that needs more than the decoder's output
            return None, products
    if len(read) != 1 or read[0].shape != hidden.shape or logits.shape != products.shape:
        return None, products
    factor = read[0].flatten()[0].item()
    plain = factor == 1 or (factor != 0 and all(getattr(part, "bias", None) is None for part in linear_heads(model)))
    return factor if plain and torch.allclose(read[0].float(), factor * hidden) else None, logits


def _formula(logits: Tensor, config: PretrainedConfig) -> LogitTransform | None:
    """Find scale and softcap, among the configuration's numbers, that make `logits` of the products."""
    numbers = [float(value) for value in vars(config).values() if isinstance(value, int | float) and value > 0]
    scales = [1.0, *dict.fromkeys(scale for value in numbers for scale in (value, 1 / value))]
    found, products = logits.double().flatten(), _PRODUCTS.double()
    for softcap, scale in itertools.product([None, *dict.fromkeys(numbers)], scales):
        transform = LogitTransform(scale, softcap)
        if (transform(products) - found).abs().max() <= _SAME * found.abs().max():
            return transform
    return None
