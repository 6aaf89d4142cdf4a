"""Shared-prefix attention for Hugging Face models, through transformers' AttentionInterface.

A model that runs on packed rows keeps working as before without them (generation, evaluation on plain batches): the
function registered here hands every call without a packed row to transformers' own SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_fast_kernels import PrefixLayout, prefix_attention

ATTENTION_NAME = "dpo_fast_prefix"
_SHARING_LAYERS = {"full_attention", "sliding_attention"}


def _attention_forward(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,  # [1, Hkv, T, Dv]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    prefix: PrefixLayout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function: returns ([1, T, Hq, Dv], None)."""
    if prefix is None and softcap is not None:  # which SDPA would leave out
        return _softcapped_attention(module, query, key, value, attention_mask, scaling, dropout, softcap), None
    if prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(
            f"attention dropout of {type(module).__name__} is {dropout}, and the shared layout has none: set "
            "disable_dropout=True, or attention_dropout=0 in the model's configuration"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return prefix_attention(q, k, v, prefix, scale=scaling, window=sliding_window, softcap=softcap)[None], None


def _softcapped_attention(
    module: nn.Module,
    query: Tensor,  # [B, Hq, T, D]
    key: Tensor,  # [B, Hkv, S, D]
    value: Tensor,  # [B, Hkv, S, Dv]
    attention_mask: Tensor | None,  # bool [B, 1, T, S], True where attended; None for plain causal
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> Tensor:  # [B, T, Hq, Dv]
    """softmax(softcap · tanh(scaling · QKᵀ / softcap)) V (Gemma 2), for calls without a packed row."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[..., : scores.shape[-1]], torch.finfo(scores.dtype).min)
    weights = nn.functional.dropout(scores.float().softmax(-1).to(value.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION_NAME, _attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def sharing_obstacle(model: PreTrainedModel) -> str | None:
    """Why the architecture of `model` cannot share one copy of a prompt; None when nothing speaks against it."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _SHARING_LAYERS
    if config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if getattr(model, "_is_stateful", False):
        return "its layers carry a recurrent state, which would run from one completion into the next"
    if kinds:
        return f"its layers mix tokens by {', '.join(sorted(kinds))}, not by causal attention"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention is not reached through transformers' AttentionInterface"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "its attention has sink logits"
    return None


def use_shared_prefix(model: PreTrainedModel) -> None:
    """Switches `model` to shared-prefix attention for packed rows, and checks on a few tokens that its results stay
    the same.

    The check is skipped where parameters are not at hand yet (meta device, ZeRO-3 shards).

    Raises:
        ValueError: the architecture cannot share prompts; the message says why. The model is left as it was.
    """
    reason = sharing_obstacle(model)
    if reason is None:
        before, training = model.config._attn_implementation, model.training
        try:
            reason = _switch_and_compare(model.eval())
        except Exception as error:  # whatever a foreign architecture trips over, it cannot run on packed rows
            reason = f"it fails on a packed row ({type(error).__name__}: {error})"
        model.train(training)
        if reason is not None:
            model.set_attn_implementation(before)
    if reason is not None:
        raise ValueError(f"layout='shared' does not work for {type(model).__name__}: {reason}. Use layout='padded'.")


@torch.no_grad()
def _switch_and_compare(model: PreTrainedModel) -> str | None:
    """Runs two short completions of one prompt alone under eager attention and together in a packed row."""
    if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        model.set_attn_implementation(ATTENTION_NAME)
        return None
    body, device = model.base_model, model.get_input_embeddings().weight.device
    tokens = torch.arange(2, 12, device=device) % model.config.get_text_config().vocab_size
    prompt, first, second = tokens.split([4, 3, 3])

    model.set_attn_implementation("eager")
    alone = [
        body(input_ids=torch.cat([prompt, completion])[None], use_cache=False).last_hidden_state[0]
        for completion in (first, second)
    ]
    expected = torch.cat([alone[0], alone[1][len(prompt) :]]).float()
    model.set_attn_implementation(ATTENTION_NAME)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]], device=device)
    prefix = PrefixLayout.build([(4, 3, 3)]).to(device)
    packed = body(**packed_arguments(tokens[None], positions, prefix), use_cache=False)

    error = (packed.last_hidden_state[0].float() - expected).norm() / expected.norm()
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    if error <= tolerance:
        return None
    return f"completions that share a prompt came out different from the same completions alone (by {error:.1%})"


def packed_arguments(input_ids: Tensor, position_ids: Tensor, prefix: PrefixLayout) -> dict[str, Any]:
    """What the body of a model takes to run on a packed row: `input_ids` and `position_ids` [1, T]."""
    # transformers takes a 4D mask as it is: this one keeps it from building a mask, and ours ignores it.
    unused_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": unused_mask, "prefix": prefix}
