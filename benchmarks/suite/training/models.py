"""The models that run.py speed trains: a folder or name as everywhere, or random weights in a real model's shape.

Random weights train as fast as real ones and need no hub. Their configurations are the published ones, mixtral-small is
Mixtral 8x7B at a quarter of its width and depth, and `tiny` is for rehearsals.

Also what a training step of a model must compute, whatever way it goes:

    products    6 FLOP a parameter and token, 4 where weights are frozen (LoRA: no gradient of them; the adapter
                itself, one or two per cent, is not counted); in the body for every unique token, in the head for every
                score row; of a mixture the experts that a token visits
    attention   12 FLOP a layer, unit of all heads and pair of tokens that look at each other: two products, each once
                forward and twice backward

Unique tokens are prompt and completions once each, so the count is the same for every side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_QWEN_2_5 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "max_position_embeddings": 32768,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        **_QWEN_2_5,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "qwen2.5-1.5b": {
        **_QWEN_2_5,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "llama-3.2-1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "tiny": {
        **_LLAMA_3,
        "vocab_size": 2003,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "mixtral-small": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}


def model_config(name: str) -> PretrainedConfig:
    """Return the configuration of one of `RANDOM_MODELS`, or of a folder or a name on the Hub."""
    if name in RANDOM_MODELS:
        return AutoConfig.for_model(**{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **RANDOM_MODELS[name]})
    if "/" not in name and not Path(name).exists():
        raise ValueError(f"model={name!r} is no folder; give one, a name on the Hub, or one of {list(RANDOM_MODELS)}")
    return AutoConfig.from_pretrained(name)


def build_model(name: str, *, dtype: torch.dtype, device: torch.device, attention: str | None) -> PreTrainedModel:
    """Return the model to train, with the same weights in every process."""
    options = {"dtype": dtype, **({"attn_implementation": attention} if attention else {})}
    if name not in RANDOM_MODELS:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(model_config(name), **options)


def step_flops(config: PretrainedConfig, groups: Sequence[Mapping[str, Any]], *, frozen: bool) -> float:
    """Return the FLOP that a training step on `groups` cannot do without."""
    config = config.get_text_config()
    body, head, _ = model_parameters(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    units = config.num_hidden_layers * config.num_attention_heads * width
    each = 4 if frozen else 6
    products = each * (body * sum(map(unique_tokens, groups)) + head * sum(map(_score_rows, groups)))
    return products + 12 * units * sum(map(_attended_pairs, groups))


def unique_tokens(group: Mapping[str, Any]) -> int:
    """Return the number of tokens of the prompt, once, and of the completions."""
    return len(group["prompt_ids"]) + _score_rows(group)


def _score_rows(group: Mapping[str, Any]) -> int:
    return sum(map(len, group["completion_ids"]))


def _attended_pairs(group: Mapping[str, Any]) -> int:
    prompt, completions = len(group["prompt_ids"]), list(map(len, group["completion_ids"]))
    return prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in completions)


def model_parameters(config: PretrainedConfig) -> tuple[float, int, int]:
    """Return how many weights multiply a token in the body (of a mixture the visited share) and the head, and all."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    visited = config.num_experts_per_tok / experts if experts else 1.0
    embeddings = model.get_input_embeddings().weight
    body = sum(
        parameter.numel() * (visited if ".experts." in name else 1.0)
        for name, parameter in model.base_model.named_parameters()
        if parameter.dim() > 1 and parameter is not embeddings
    )
    return body, model.get_output_embeddings().weight.numel(), model.num_parameters()
