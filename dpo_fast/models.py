"""Loading a policy and wrapping it in an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_fast.config import DPOConfig


def load_model(
    model: str | PreTrainedModel | nn.Module, args: DPOConfig, quantization_config: Any | None
) -> PreTrainedModel:
    """Returns `model`, loaded when it is a name or path; in fp32 unless `args.model_init_kwargs` has a dtype.

    Raises:
        ValueError: options for loading beside a loaded model, or a path that does not hold a model.
    """
    options = dict(args.model_init_kwargs or {})
    if not isinstance(model, str):
        if options or quantization_config is not None:
            given = "quantization_config" if quantization_config is not None else "args.model_init_kwargs"
            raise ValueError(f"{given} is for loading a model by name, but model is a loaded {type(model).__name__}")
        return model
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError("quantization_config is given twice, also in args.model_init_kwargs; keep one")
        options["quantization_config"] = quantization_config
    path = Path(model).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"model={model!r} holds no config.json; give a folder written by save_pretrained")
    if not path.exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ValueError(f"model={model!r} does not exist; give a folder written by save_pretrained, or a hub name")
    if isinstance(options.get("dtype"), str) and options["dtype"] != "auto":
        options["dtype"] = getattr(torch, options["dtype"])
    options.setdefault("dtype", torch.float32)
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if args.distributed_state is not None and args.distributed_state.num_processes > 1:
        options["device_map"] = None
    return AutoModelForCausalLM.from_pretrained(str(path) if path.exists() else model, **options)


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
            raise ValueError(
                f"peft_config is a {type(peft_config).__name__}; pass a peft.LoraConfig or another PeftConfig"
            )
        if isinstance(peft_config, PromptLearningConfig):
            raise ValueError(f"peft_config is a {type(peft_config).__name__}, which adds prompt tokens; use a LoRA")
        if hasattr(model, "peft_config"):
            raise ValueError(
                "peft_config is given, but model already has an adapter: leave peft_config out to train that one, or "
                "merge it first (model.merge_and_unload())"
            )
        model = get_peft_model(model, peft_config)
    if hasattr(model, "peft_config") and args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model
