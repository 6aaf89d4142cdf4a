"""Loading a policy, and what is read off its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dpo_fast.config import DPOConfig
from dpo_fast.config.rules import tensor_parallel_refusal
from dpo_fast.data.loading import looks_local
from dpo_fast.errors import InputError, reading
from dpo_fast.model.adapters import quiet_peft
from dpo_fast.model.checkpoint_weights import CURE, load_whole_adapter, load_whole_model


def load_model(
    model: str | PreTrainedModel | nn.Module, args: DPOConfig, quantization_config: Any | None, name: str = "model"
) -> PreTrainedModel:
    """Return `model`, loaded when it is a name or path of a model or an adapter.

    Weights are in fp32 unless `args.model_init_kwargs` has a dtype. `name` is the argument's, for messages.

    Raises:
        InputError: options for loading beside a loaded model, a tensor-parallel model, or a path that does not hold a
            model, or not all of its weights.
    """
    options = dict(args.model_init_kwargs or {})
    if not isinstance(model, str):
        if options or quantization_config is not None:
            given = "quantization_config" if quantization_config is not None else "args.model_init_kwargs"
            raise InputError(f"{given} is for loading a model by name, but {name} is a loaded {type(model).__name__}")
        if (size := getattr(model, "tp_size", None) or 1) > 1:
            raise InputError(tensor_parallel_refusal(f"{name}.tp_size={size}"))
        return model
    if quantization_config is not None:
        if "quantization_config" in options:
            raise InputError("quantization_config is given twice, also in args.model_init_kwargs; keep one")
        options["quantization_config"] = quantization_config
    for option in ("tp_plan", "tp_size", "distributed_config"):
        if options.get(option) not in (None, 1):
            raise InputError(tensor_parallel_refusal(f"model_init_kwargs[{option!r}]={options[option]!r}"))
    check_model_path(model, options, name)
    path = Path(model).expanduser()
    if (path / "adapter_config.json").is_file():
        return _load_adapter(path, args, quantization_config, name)
    if isinstance(options.get("dtype"), str) and options["dtype"] != "auto":
        dtype = getattr(torch, options["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise InputError(
                f"model_init_kwargs['dtype']={options['dtype']!r} is no dtype of PyTorch; give one such as "
                "'bfloat16', or 'auto'"
            )
        options["dtype"] = dtype
    options.setdefault("dtype", torch.float32)
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if args.distributed_state is not None and args.distributed_state.num_processes > 1:
        options["device_map"] = None
    return load_whole_model(str(path) if path.exists() else model, options, name, args.allow_missing_weights)


def _load_adapter(path: Path, args: DPOConfig, quantization_config: Any | None, name: str) -> nn.Module:
    """Return the model that an adapter was trained on, loaded like any other, with the adapter in place."""
    from peft import PeftConfig

    with reading(name, str(path), CURE):
        base = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    if base and not isinstance(base, str):
        raise InputError(f"{name}={str(path)!r} names the model {base!r} in adapter_config.json; give a folder or name")
    if not base:
        raise InputError(f"{name}={str(path)!r} holds an adapter that does not name its model; give a loaded PeftModel")
    model = load_model(base, args, quantization_config, name)
    with quiet_peft():
        return load_whole_adapter(model, path, name, args.allow_missing_weights)


def check_model_path(model: str, options: Mapping[str, Any] | None = None, name: str = "model") -> None:
    """Raises InputError when `model` is meant as a folder and is none that a model can be loaded from.

    `options` are the keyword arguments for loading; with `gguf_file` the folder holds that file instead of a config.
    `name` is the argument's, for messages.
    """
    with reading(name, model, "give a folder, or a model on the Hub as owner/name"):
        path = Path(model).expanduser()
        wanted = [gguf] if (gguf := (options or {}).get("gguf_file")) else ["config.json", "adapter_config.json"]
        if path.exists() and not any((path / file).is_file() for file in wanted):
            raise InputError(f"{name}={model!r} holds no {wanted[0]}; give the folder that a model was saved to")
        if not path.exists() and looks_local(model):
            raise InputError(f"{name}={model!r} does not exist; give a folder, or a model on the Hub as owner/name")


def vocabulary_size(model: nn.Module) -> int:
    """Token embeddings of a model, also of one whose weights are sharded and not at hand."""
    embeddings = model.get_input_embeddings()
    return getattr(embeddings.weight, "ds_shape", embeddings.weight.shape)[0]


def check_reference(ref_model: nn.Module, vocab_size: int) -> None:
    """Refuse a reference for a policy of `vocab_size` token embeddings.

    Raises:
        InputError: it has fewer, or is tensor-parallel.
    """
    if (size := getattr(ref_model, "tp_size", None) or 1) > 1:
        raise InputError(tensor_parallel_refusal(f"ref_model.tp_size={size}"))
    if vocabulary_size(ref_model) < vocab_size:
        raise InputError(
            f"ref_model has {vocabulary_size(ref_model)} token embeddings and model has {vocab_size}; use a reference "
            "with the same tokenizer"
        )


def aux_loss_weight(base: PreTrainedModel, coefficient: float | None) -> float:
    """Weight of the load-balancing loss: 0 unless the model is a mixture of experts that returns its router logits."""
    config = base.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if coefficient:
            raise InputError(
                f"router_aux_loss_coef is {coefficient}, but {type(base).__name__} returns no router logits: "
                "leave it out"
            )
        return 0.0
    return getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
