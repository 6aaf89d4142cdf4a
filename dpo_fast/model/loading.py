"""Loading a policy, giving it the packed forward, and wrapping it in an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_fast.batches.groups import Layout
from dpo_fast.config import DPOConfig, tensor_parallel_refusal
from dpo_fast.data.loading import looks_local
from dpo_fast.model.forward import prepare_forward


def load_model(
    model: str | PreTrainedModel | nn.Module, args: DPOConfig, quantization_config: Any | None
) -> PreTrainedModel:
    """Return `model`, loaded when it is a name or path of a model or an adapter.

    Weights are in fp32 unless `args.model_init_kwargs` has a dtype.

    Raises:
        ValueError: options for loading beside a loaded model, a tensor-parallel model, or a path that does not hold a
            model.
    """
    options = dict(args.model_init_kwargs or {})
    if not isinstance(model, str):
        if options or quantization_config is not None:
            given = "quantization_config" if quantization_config is not None else "args.model_init_kwargs"
            raise ValueError(f"{given} is for loading a model by name, but model is a loaded {type(model).__name__}")
        if (size := getattr(model, "tp_size", None) or 1) > 1:
            raise ValueError(tensor_parallel_refusal(f"model.tp_size={size}"))
        return model
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError("quantization_config is given twice, also in args.model_init_kwargs; keep one")
        options["quantization_config"] = quantization_config
    for name in ("tp_plan", "tp_size", "distributed_config"):
        if options.get(name) not in (None, 1):
            raise ValueError(tensor_parallel_refusal(f"model_init_kwargs[{name!r}]={options[name]!r}"))
    check_model_path(model, options)
    path = Path(model).expanduser()
    if (path / "adapter_config.json").is_file():
        return _load_adapter(path, args, quantization_config)
    if isinstance(options.get("dtype"), str) and options["dtype"] != "auto":
        options["dtype"] = getattr(torch, options["dtype"])
    options.setdefault("dtype", torch.float32)
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if args.distributed_state is not None and args.distributed_state.num_processes > 1:
        options["device_map"] = None
    return AutoModelForCausalLM.from_pretrained(str(path) if path.exists() else model, **options)


def _load_adapter(path: Path, args: DPOConfig, quantization_config: Any | None) -> nn.Module:
    """Return the model that an adapter was trained on, loaded like any other, with the adapter in place."""
    from peft import PeftConfig, PeftModel

    name = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    if not name:
        raise ValueError(f"model={str(path)!r} holds an adapter that does not name its model; give a loaded PeftModel")
    base = load_model(name, args, quantization_config)
    with quiet_peft():
        return PeftModel.from_pretrained(base, str(path), is_trainable=True)


def check_model_path(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Raises ValueError when `name` is meant as a folder and is none that a model can be loaded from.

    `options` are the keyword arguments for loading; with `gguf_file` the folder holds that file instead of a config.
    """
    path = Path(name).expanduser()
    wanted = [gguf] if (gguf := (options or {}).get("gguf_file")) else ["config.json", "adapter_config.json"]
    if path.exists() and not any((path / file).is_file() for file in wanted):
        raise ValueError(f"model={name!r} holds no {wanted[0]}; give the folder that a model was saved to")
    if not path.exists() and looks_local(name):
        raise ValueError(f"model={name!r} does not exist; give a folder, or a model on the Hub as owner/name")


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


def let_recompute(model: nn.Module, args: DPOConfig) -> None:
    """Gives the layers below an adapter a gradient to pass on, which some kinds of checkpointing need."""
    if hasattr(model, "peft_config") and args.gradient_checkpointing:
        model.enable_input_require_grads()


def vocabulary_size(model: nn.Module) -> int:
    """Token embeddings of a model, also of one whose weights are sharded and not at hand."""
    embeddings = model.get_input_embeddings()
    return getattr(embeddings.weight, "ds_shape", embeddings.weight.shape)[0]


def prepare_reference(ref_model: PreTrainedModel, vocab_size: int, layout: Layout) -> None:
    """Gives `ref_model`, bare or in an adapter, the packed forward in the policy's `layout`.

    Raises:
        ValueError: it has fewer token embeddings than `vocab_size`, the policy's, or is tensor-parallel.
    """
    base = ref_model.get_base_model() if hasattr(ref_model, "peft_config") else ref_model
    if (size := getattr(base, "tp_size", None) or 1) > 1:
        raise ValueError(tensor_parallel_refusal(f"ref_model.tp_size={size}"))
    if vocabulary_size(base) < vocab_size:
        raise ValueError(
            f"ref_model has {vocabulary_size(base)} token embeddings and model has {vocab_size}; use a reference with "
            "the same tokenizer"
        )
    prepare_forward(base, layout)


def aux_loss_weight(base: PreTrainedModel, coefficient: float | None) -> float:
    """Weight of the load-balancing loss: 0 unless the model is a mixture of experts that returns its router logits."""
    config = base.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if coefficient:
            raise ValueError(
                f"router_aux_loss_coef is {coefficient}, but {type(base).__name__} returns no router logits: "
                "leave it out"
            )
        return 0.0
    return getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
