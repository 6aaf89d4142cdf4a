"""The LM head of a Hugging Face model as arguments of the kernels: weight, bias and what is done to the logits.

Under tensor parallelism a rank holds some rows of the weight, all of hidden, and makes the logits of its own words.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from dpo_fast_kernels import LogitTransform, VocabularyShards


@dataclass(frozen=True)
class Head:
    """logits = transform(hidden · weightᵀ + bias)."""

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


def head_of(model: PreTrainedModel) -> Head:
    """Reads the head of a causal language model, tied or not; call it where its parameters are materialised.

    Raises:
        ValueError: the model has no output embeddings, or an adapter sits on them.
    """
    embeddings = model.get_output_embeddings()
    if embeddings is None:
        raise ValueError(f"model is a {type(model).__name__} without an LM head; load it with AutoModelForCausalLM")
    if hasattr(embeddings, "base_layer"):
        raise ValueError(
            "peft_config targets the LM head, whose weight is used directly: take it out of target_modules"
        )
    return Head(embeddings.weight, getattr(embeddings, "bias", None), logit_transform(model.config.get_text_config()))


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """Softcap and scale of the logits, in all spellings that transformers' configurations use."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = getattr(config, name)
            break
    else:
        if getattr(config, "logits_scaling", None) is not None:
            multiplies = config.model_type == "hyperclovax"
            scale = config.logits_scaling if multiplies else 1 / config.logits_scaling
    return LogitTransform(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))
