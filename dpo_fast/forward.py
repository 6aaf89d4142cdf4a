"""Packed batch → sequence log-probs, inside `model.forward`.

The forward of the causal language model itself is extended, `model(packed=batch)`, so that every wrapper around it
(PEFT, autocast, DDP, FSDP, DeepSpeed) does its work as for any other forward: parameters are gathered, gradients are
hooked.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from dpo_fast.attention import packed_arguments
from dpo_fast.groups import PackedBatch
from dpo_fast.head import head_of
from dpo_fast_kernels import gather_rows, linear_logps


@dataclass
class PackedOutput(ModelOutput):
    """What a packed forward returns; S completions, N score rows.

    Attributes:
        logps: fp32 [S], log-prob of each completion in nats; differentiable.
        token_logps: fp32 [N], differentiable.
        entropy, mean_logit: fp32 [N], without gradient, when statistics were asked for.
        is_top1: bool [N], whether the target is the most likely token, likewise.
        aux_loss: scalar, the load-balancing loss of a mixture of experts, when it was asked for.
    """

    logps: Tensor | None = None
    token_logps: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    aux_loss: Tensor | None = None


def add_dpo_forward(model: PreTrainedModel) -> None:
    """Extends `model.forward` in place: `model(packed=PackedBatch, statistics=False, aux_loss=False)` → `PackedOutput`.

    Any other call is the original forward, so generation is unchanged. Call it on the causal language model before
    PEFT or an engine wraps it, and `attention.use_shared_prefix(model)` beside it for the shared layout. Repeating it
    is harmless.
    """
    if getattr(model.forward, "is_dpo_forward", False):
        return
    original = model.forward

    @functools.wraps(original)
    def forward(
        self, *args, packed: PackedBatch | None = None, statistics: bool = False, aux_loss: bool = False, **kwargs
    ):
        if packed is None:
            return original(*args, **kwargs)
        return _packed_forward(self, packed, statistics, aux_loss)

    forward.is_dpo_forward = True
    model.forward = types.MethodType(forward, model)


def _packed_forward(model: PreTrainedModel, packed: PackedBatch, statistics: bool, aux_loss: bool) -> PackedOutput:
    head = head_of(model)
    body = model.base_model(
        **_body_arguments(packed), use_cache=False, **({"output_router_logits": True} if aux_loss else {})
    )
    hidden = body.last_hidden_state
    hidden = gather_rows(hidden.reshape(-1, hidden.shape[-1]), packed.scores)
    scored = linear_logps(
        hidden, head.weight, packed.targets, head.bias, transform=head.transform, statistics=statistics
    )
    return PackedOutput(
        logps=_sequence_sums(scored.logps, packed.cu_scores),
        token_logps=scored.logps,
        entropy=scored.entropy,
        mean_logit=scored.mean_logit,
        is_top1=scored.is_top1,
        aux_loss=_load_balancing_loss(model, body.router_logits, packed) if aux_loss else None,
    )


def _body_arguments(packed: PackedBatch) -> dict[str, Any]:
    if packed.prefix is not None:
        return packed_arguments(packed.input_ids, packed.position_ids, packed.prefix)
    return {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "attention_mask": packed.attention_mask,
    }


def _sequence_sums(token_logps: Tensor, cu_scores: Tensor) -> Tensor:
    """Sum of each completion's token log-probs, in fp64 and ascending order, as fp32 [S]."""
    return torch.segment_reduce(token_logps.double(), "sum", offsets=cu_scores, unsafe=True).float()


def _load_balancing_loss(model: PreTrainedModel, router_logits: tuple[Tensor, ...], packed: PackedBatch) -> Tensor:
    """Mixture-of-experts auxiliary loss over the sequences as if each completion had its own copy of the prompt."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    if packed.prefix is None:
        return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, packed.attention_mask)
    router_logits = tuple(gather_rows(logits, packed.prefix.keys) for logits in router_logits)
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok)
