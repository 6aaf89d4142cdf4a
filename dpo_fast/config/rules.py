"""What options must fulfil beyond their types: ranges of transformers' own, and options that go together or do not."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from dpo_fast.config.types import (
    Count,
    NotNegative,
    NotNegativeOrInfinite,
    Positive,
    Share,
    WholeNumber,
    nearest,
)
from dpo_fast.errors import InputError, check_writable, input_of
from dpo_fast.losses import LOSSES, named_loss, uses

_Seed = Annotated[int, Ge(0), Lt(2**32)]
_LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]

# Options of transformers whose annotation allows what training cannot do, or fails at only once it trains.
NARROWER_TYPES: dict[str, Any] = {
    "accelerator_config": dict | str | AcceleratorConfig | None,
    "loss_type": list[Any],  # names and functions: `check_loss`
    "per_device_train_batch_size": Count,
    "per_device_eval_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "eval_accumulation_steps": Count | None,
    "torch_empty_cache_steps": Count | None,
    "num_train_epochs": Positive,
    "max_steps": Annotated[int, Ge(-1), Lt(2**31)],
    "weight_decay": NotNegative,
    "adam_beta1": Share,
    "adam_beta2": Share,
    "adam_epsilon": NotNegative,
    "max_grad_norm": NotNegativeOrInfinite,
    "warmup_steps": NotNegative,
    "neftune_noise_alpha": NotNegative | None,
    "eval_delay": NotNegative,
    "eval_steps": NotNegative | None,
    "save_steps": Positive,
    "save_total_limit": WholeNumber | None,
    "seed": _Seed,
    "data_seed": _Seed | None,
    "dataloader_num_workers": WholeNumber,
    "dataloader_prefetch_factor": Count | None,
    "dataloader_multiprocessing_context": Literal[*multiprocessing.get_all_start_methods()] | None,
    "ddp_bucket_cap_mb": Count | None,
    "ddp_timeout": Count,
    "ddp_backend": Literal["nccl", "gloo", "mpi", "ccl", "xccl", "hccl", "cncl", "mccl"] | None,
    "include_num_input_tokens_seen": Literal["all", "non_padding", "no"] | bool,
    "fsdp": bool | str | list[str] | None,
    "debug": str | list[str] | None,  # `DebugOption`s, by names in one text
    "log_level": _LogLevel,
    "log_level_replica": _LogLevel,
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length", "batch_rebalance"],
    "torch_compile_mode": Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None,
}


def check_loss(config: TrainingArguments) -> None:
    """Name the losses, and refuse parameters that they cannot have."""
    if not config.loss_type:
        raise InputError(f"loss_type={config.loss_type!r} must name at least one loss of {sorted(LOSSES)}.")
    config.loss_type = [named_loss(loss) for loss in config.loss_type]
    if config.loss_weights is not None and len(config.loss_weights) != len(config.loss_type):
        raise InputError(
            f"loss_weights={config.loss_weights!r} must list one weight for each of the {len(config.loss_type)} "
            f"loss types {config.loss_type}; leave it out to weigh all of them 1."
        )
    config.loss_parameters.check(config.loss_type)
    if config.use_weighting and (coupled := [name for name in config.loss_type if uses(name, "step")]):
        raise InputError(
            f"use_weighting=True does not go with {coupled}, which look at a whole step before its pairs can be "
            f"weighed; turn it off, or leave them out of loss_type={config.loss_type}."
        )


def check_evaluation(config: TrainingArguments) -> None:
    """Refuse options of transformers' evaluation and sampling that mean nothing to packs of completions."""
    if set(config.include_for_metrics) - {"loss"}:
        raise InputError(
            f"include_for_metrics={config.include_for_metrics!r}: beside rewards and weights compute_metrics can "
            "have 'loss' alone, as inputs are packs; leave the others out."
        )
    if config.label_smoothing_factor:
        raise InputError(
            f"label_smoothing_factor={config.label_smoothing_factor!r} smooths targets of tokens, which no loss here "
            "looks at; leave it at 0. label_smoothing is the probability that a preference is flipped."
        )
    if config.label_names not in (None, [], ["labels"]):
        raise InputError(
            f"label_names={config.label_names!r} means nothing to preferences: compute_metrics gets the comparisons' "
            "weights as labels; leave it out."
        )
    if config.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise InputError(
            f"train_sampling_strategy={config.train_sampling_strategy!r} saves padding, which packs have none of; "
            "groups are assigned to ranks by their cost already; take 'random' or 'sequential'."
        )


def settle_layer_kernels(config: TrainingArguments) -> None:
    """Let `layer_kernels` and transformers' own options say the same; refuse those of Liger that cannot be had."""
    compiles = config.torch_compile or config.torch_compile_backend or config.torch_compile_mode
    for kernels, option, asked in (
        ("liger", "use_liger_kernel", config.use_liger_kernel),
        ("compile", "torch_compile", compiles),
    ):
        if asked and config.layer_kernels not in ("auto", kernels):
            raise InputError(
                f"{option}=True asks for layer_kernels={kernels!r}, which is {config.layer_kernels!r}; keep one of "
                "the two."
            )
        config.layer_kernels = kernels if asked else config.layer_kernels
    config.torch_compile = config.layer_kernels == "compile"
    config.use_liger_kernel = False  # with which transformers would apply Liger's kernels again, and its head
    if config.layer_kernels != "liger":
        return
    if importlib.util.find_spec("liger_kernel") is None:
        raise InputError(
            "layer_kernels='liger' needs liger-kernel, which is not installed: pip install liger-kernel, or take "
            "'none' or 'compile'."
        )
    heads = {name for name, on in (config.liger_kernel_config or {}).items() if on and name.endswith("cross_entropy")}
    if heads:
        raise InputError(
            f"liger_kernel_config turns {sorted(heads)} on, which would put Liger's forward in the packed one's "
            "place; leave it out: head and loss are fused."
        )


def check_parallelism(config: TrainingArguments) -> None:
    """Refuse what gives several ranks the same rows, or parts of each: the trainer gives each row to one rank."""
    for name, size in _parallel_sizes(config).items():
        if size > 1 and name.endswith(("tp_size", "autotp_size")):
            raise InputError(tensor_parallel_refusal(f"{name}={size}"))
        if size > 1:
            raise InputError(
                f"{name}={size} would cut sequences across GPUs, and completions share the keys of a prompt across "
                "the cut; leave it at 1. For long sequences bound max_tokens_per_micro_batch, turn "
                "gradient_checkpointing on and shard the model with FSDP2 or ZeRO-3, offloaded if need be."
            )
    for name in ("dispatch_batches", "split_batches"):
        if config.world_size > 1 and getattr(config.accelerator_config, name):
            raise InputError(
                f"accelerator_config.{name}=True would cut batches by rows, and ranks get groups by their "
                "cost; leave it out. per_device_train_batch_size times the number of ranks is the whole batch."
            )


def _parallel_sizes(config: TrainingArguments) -> dict[str, int]:
    """Return how many ranks a model or a sequence is shared out among, by the setting that says so."""
    names = ("cp_size", "sp_size", "tp_size")
    given, sizes = getattr(config, "parallelism_config", None), {}
    if given is not None:
        sizes = {f"parallelism_config.{name}": getattr(given, name, 1) for name in names}
    elif os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":  # of `accelerate launch`
        values = {name: os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1") for name in names}
        sizes = {f"parallelism_config.{name}": int(value) for name, value in values.items()}
    if (plugin := getattr(config, "deepspeed_plugin", None)) is not None:
        options = plugin.deepspeed_config
        sizes["deepspeed.sequence_parallel_size"] = options.get("sequence_parallel_size", 1)
        sizes["deepspeed.tensor_parallel.autotp_size"] = options.get("tensor_parallel", {}).get("autotp_size", 1)
    return sizes


def tensor_parallel_refusal(setting: str) -> str:
    """Return why `setting`, which shares out a model's matrices among ranks, is not for the trainer, and what is."""
    return (
        f"{setting}: the ranks of a tensor-parallel model need the same rows, and DPOTrainer gives each its own; leave "
        "it out and shard the model with FSDP2 or ZeRO-3 (examples/accelerate). In a loop of your own, add_dpo_forward "
        "takes a tensor-parallel model."
    )


def check_surroundings(config: TrainingArguments) -> None:
    """Refuse what this machine does not have: trackers, compilers, places to write to."""
    for name in config.report_to:
        _check_tracker(name)
    if config.torch_compile_backend and config.torch_compile:
        from torch._dynamo import list_backends

        if config.torch_compile_backend not in (known := list_backends(exclude_tags=())):
            raise InputError(
                f"torch_compile_backend={config.torch_compile_backend!r} is not one of this PyTorch's {known}; leave "
                "it out for 'inductor'"
            )
    known = inspect.signature(checkpoint).parameters.keys() - {"function", "args", "kwargs"} | {"use_reentrant"}
    for option in config.gradient_checkpointing_kwargs or {}:
        if option not in known:
            raise InputError(
                f"gradient_checkpointing_kwargs: {option!r} is no argument of torch.utils.checkpoint; choose from "
                f"{sorted(known)}"
            )
    check_writable("output_dir", config.output_dir, is_folder=True)
    if config.reference_cache_dir and "://" not in config.reference_cache_dir:
        check_writable("reference_cache_dir", config.reference_cache_dir, is_folder=True, may_be_read_only=True)


def _check_tracker(name: str) -> None:
    """Make the callback of a tracker as transformers' Trainer does, which finds out whether its package is there."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if name not in INTEGRATION_TO_CALLBACK:
        near = nearest(name, INTEGRATION_TO_CALLBACK, "; did you mean {}?")
        raise InputError(f"report_to={name!r} is not one of {sorted(INTEGRATION_TO_CALLBACK)}, 'all' or 'none'{near}")
    with input_of(f"report_to={name!r}", f"install {name}, or leave it out"):
        INTEGRATION_TO_CALLBACK[name]()
