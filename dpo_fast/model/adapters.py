"""Adapters: PEFT's wrapper around a model, and the reference that a model in it has."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_fast.config import DPOConfig
from dpo_fast.errors import InputError


def base_of(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model in PEFT's wrapper, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def prepare_peft(model: nn.Module, peft_config: Any | None, args: DPOConfig) -> nn.Module:
    """Wraps `model` in the adapter of `peft_config`; returns it as it is when there is none.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model already has an adapter, or the adapter is of a kind that adds prompt tokens.
    """
    if peft_config is not None:
        try:
            from peft import PeftConfig, PromptLearningConfig, get_peft_model
        except ImportError as error:
            raise ImportError('peft_config needs the peft package: pip install "dpo-fast[peft]"') from error
        if not isinstance(peft_config, PeftConfig):
            raise InputError(
                f"peft_config is a {type(peft_config).__name__}; pass a peft.LoraConfig or another PeftConfig"
            )
        if isinstance(peft_config, PromptLearningConfig):
            raise InputError(f"peft_config is a {type(peft_config).__name__}, which adds prompt tokens; use a LoRA")
        if getattr(peft_config, "alora_invocation_tokens", None):
            raise InputError(
                "peft_config has alora_invocation_tokens: such an adapter works from certain tokens on, which it does "
                "not see in a packed batch; use a LoRA without them"
            )
        if hasattr(model, "peft_config"):
            raise InputError(
                "peft_config is given, but model already has an adapter: leave peft_config out to train that one, or "
                "merge it first (model.merge_and_unload())"
            )
        with quiet_peft():
            model = get_peft_model(model, peft_config)
    let_recompute(model, args)
    return model


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep a warning of transformers about a name that peft uses, up to 0.21, from users, who cannot change it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def weights_of_reference(model: nn.Module, adapters: bool) -> list[nn.Parameter]:
    """Return the weights that train, and that the reference in PEFT's wrapper reads nevertheless.

    Args:
        model: in PEFT's wrapper.
        adapters: whether the adapters belong to the reference; else it is the model without them.
    """
    training = [weight for weight in model.parameters() if weight.requires_grad]
    if adapters:
        return training
    with adapters_off(model):  # which takes their gradients away
        return [weight for weight in training if weight.requires_grad]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it `model` runs without its adapters. What is frozen stays so, where PEFT would let it train after it."""
    training = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers")  # biases: copies stand in for them
            with model.disable_adapter():
                yield
    finally:
        for weight, trains in training:
            weight.requires_grad_(trains)


@contextmanager
def standing_in(copies: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Within it weights have the content of their copies. No gradients."""
    own = [weight.data for weight, _ in copies]
    for weight, copy in copies:
        weight.data = copy
    try:
        yield
    finally:
        for (weight, _), data in zip(copies, own, strict=True):
            weight.data = data


def let_recompute(model: nn.Module, args: DPOConfig) -> None:
    """Gives the layers below an adapter a gradient to pass on, which some kinds of checkpointing need."""
    if hasattr(model, "peft_config") and args.gradient_checkpointing:
        model.enable_input_require_grads()
