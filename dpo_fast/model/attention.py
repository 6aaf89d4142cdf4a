"""Shared-prefix attention for Hugging Face models, through transformers' AttentionInterface.

A model that runs on packed rows keeps working as before without them (generation, evaluation on plain batches): the
function registered here hands every call without a packed row to transformers' own SDPA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_fast.errors import InputError
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
    if prefix is None and (look := _look.get()) is not None:
        look.compare(module, attention_mask, sliding_window)
    if prefix is None and softcap is not None:  # which SDPA would leave out
        return _softcapped_attention(module, query, key, value, attention_mask, scaling, dropout, softcap), None
    if prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise InputError(
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


def _mask(**arguments: Any) -> Tensor | None:
    """transformers' mask function: SDPA's, which carries what its last query sees while layers are looked at."""
    look = _look.get()
    if look is None:
        return sdpa_mask(**arguments)
    last = {"batch_size": 1, "q_length": 1, "q_offset": look.length - 1, "kv_length": look.length, "kv_offset": 0}
    whole = {"attention_mask": None, "allow_is_causal_skip": False}
    mask = sdpa_mask(**arguments | {"allow_is_causal_skip": False})
    with contextlib.suppress(IndexError):  # a mask that is bound to the tokens of this call
        mask.dpo_fast_seen = sdpa_mask(**arguments | last | whole)[0, 0, 0]
    return mask


AttentionInterface.register(ATTENTION_NAME, _attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, _mask)


@dataclass
class _Look:
    """What is found about a sequence of `length` tokens while a model runs on two."""

    length: int
    config: PretrainedConfig
    problems: list[str] = field(default_factory=list)

    def compare(self, module: nn.Module, mask: Tensor | None, window: int | None) -> None:
        seen = getattr(mask, "dpo_fast_seen", None)
        if seen is None:
            seen = self._configured(module)
        elif torch.equal(seen, torch.arange(self.length, device=seen.device) >= self.length - int(seen.sum())):
            seen = int(seen.sum())
        if seen != min(window or self.length, self.length):
            keys = f"{seen} of" if isinstance(seen, int) else "some of"
            self.problems.append(
                f"its {type(module).__name__} sees {keys} {self.length} tokens by the mask of the model, but gives "
                f"sliding_window={window} to the attention function"
            )

    def _configured(self, module: nn.Module) -> int | None:
        """Return how many keys the last query sees by the configuration, where the mask does not tell."""
        kinds, windows = getattr(self.config, "layer_types", None), short_windows(self.config, self.length)
        if kinds is None or not hasattr(module, "layer_idx"):
            return None if windows else self.length
        kind = kinds[module.layer_idx]
        if kind == "sliding_attention":
            return min(self.config.sliding_window, self.length)
        return self.length if kind == "full_attention" and windows <= {"sliding_window"} else None


def short_windows(config: PretrainedConfig, length: int) -> set[str]:
    """Return the settings that name a window or a chunk of fewer than `length` tokens."""
    return {
        name for name, value in vars(config).items()
        if ("window" in name or "chunk_size" in name) and isinstance(value, int) and 0 < value < length
    }  # fmt: skip


_look: ContextVar[_Look | None] = ContextVar("look", default=None)


def hidden_window(model: PreTrainedModel, run: Callable[[Tensor], Any], length: int) -> str | None:
    """Return where the mask of `model` hides tokens that the attention function is not told of; None for nowhere.

    Args:
        model: attends by `ATTENTION_NAME`.
        run: runs the model on tokens, int64 [1, T].
        length: tokens of the longest sequence to come; the model runs on two.
    """
    look = _Look(length, model.config.get_text_config())
    token = _look.set(look)
    try:
        run(torch.zeros(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device))
    finally:
        _look.reset(token)
    return look.problems[0] if look.problems else None


@contextmanager
def attending_by(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within it `model` attends by the implementation `name`."""
    restore = implementations(model)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        restore()


def implementations(model: PreTrainedModel) -> Callable[[], None]:
    """Return what brings back how `model` and its parts attend."""
    parts = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = [(config, config._attn_implementation_internal) for config in [*parts, model.config.get_text_config()]]

    def restore() -> None:
        for config, name in before:
            config._attn_implementation_internal = name

    return restore


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
    if getattr(config, "index_topk", None) is not None:
        return "its layers choose the keys that a query sees (index_topk)"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "its attention has sink logits"
    return None


def packed_arguments(input_ids: Tensor, position_ids: Tensor, prefix: PrefixLayout) -> dict[str, Any]:
    """What the body of a model takes to run on a packed row: `input_ids` and `position_ids` [1, T]."""
    # transformers takes a 4D mask as it is: this one keeps it from building a mask, and ours ignores it.
    unused_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": unused_mask, "prefix": prefix}
