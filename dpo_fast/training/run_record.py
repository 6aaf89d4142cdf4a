"""What a run is, as far as that alters the weights that come out: kept in its checkpoints, compared on resuming.

Options are compared by value, after defaults were settled. Rows are compared by a hash of their tokens, and weights by
those that the reference store is named after. Where neither ranks nor accumulation change how many groups an optimizer
step has, they may differ: gradients do not depend on how a step is cut.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import xxhash
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from dpo_fast.config import DPOConfig
from dpo_fast.config.types import nearest
from dpo_fast.data.columns import COLUMNS, WINDOW
from dpo_fast.errors import InputError

Record = dict[str, Any]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Every field of DPOConfig stands in one of the two tables, or alters the result until somebody has thought of it.
HARMLESS = _names(
    """
    activation_checkpointing activation_checkpointing_kwargs allow_missing_weights batch_eval_metrics bf16_full_eval
    dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor dataset_num_proc ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph ddp_timeout debug disable_tqdm do_eval do_predict do_train
    enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps
    eval_strategy eval_use_gather_object fp16_full_eval gradient_checkpointing gradient_checkpointing_kwargs
    greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token
    ignore_data_skip include_for_metrics include_num_input_tokens_seen label_names length_column_name
    load_best_model_at_end local_rank log_completion_statistics log_level log_level_replica log_on_each_node
    logging_dir logging_first_step logging_nan_inf_filter logging_steps logging_strategy max_tokens_per_micro_batch
    metric_for_best_model output_dir pad_to_multiple_of padding_free per_device_eval_batch_size
    precompute_ref_batch_size precompute_ref_log_probs prediction_loss_only project push_to_hub reference_cache_dir
    remove_unused_columns report_to restore_callback_states_from_checkpoint resume_changed resume_from_checkpoint
    run_name save_on_each_node save_only_model save_steps save_strategy save_total_limit skip_memory_metrics
    torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id trust_remote_code use_cache
    use_cpu
    """
)
ALTERING = _names(
    """
    accelerator_config adam_beta1 adam_beta2 adam_epsilon auto_find_batch_size average_tokens_across_devices beta
    beta_dpo_alpha bf16 columns comparisons couple data_seed dataloader_drop_last dataloader_in_order deepspeed
    disable_dropout discopop_tau f_alpha_divergence_coef f_divergence_type fp16 fsdp fsdp_config full_determinism
    gradient_accumulation_steps group_by_prompt label_smoothing label_smoothing_factor layer_kernels layout ld_alpha
    learning_rate liger_kernel_config loss_type loss_weights lr_scheduler_kwargs lr_scheduler_type max_grad_norm
    max_length max_steps model_init_kwargs neftune_noise_alpha num_train_epochs optim optim_args
    optim_target_modules parallelism_config per_device_train_batch_size router_aux_loss_coef rpo_alpha seed
    simpo_gamma tf32 torch_compile torch_compile_backend torch_compile_mode train_sampling_strategy truncation_mode
    use_liger_kernel use_weighting warmup_steps weight_decay
    """
)
# Beside the fields of DPOConfig.
OWN = ("weights", "data", "dtype", "adapter", "optimizer", "world_size")
# What a checkpoint of optimizer and schedule holds, which would come back in place of what is asked for.
RESTORED = _names(
    """
    adam_beta1 adam_beta2 adam_epsilon learning_rate lr_scheduler_kwargs lr_scheduler_type max_steps num_train_epochs
    optim optim_args optimizer warmup_steps weight_decay
    """
)
# Schedules that look at evaluations, and what evaluations depend on then.
_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
_EVALUATION = ("eval_delay", "eval_steps", "eval_strategy", "greater_is_better", "metric_for_best_model")
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")


@dataclass(frozen=True)
class Change:
    """Something that alters the result and differs from the run of a checkpoint."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = _differing(self.old, self.new)
        return f"{self.name}: {_shown(old)} → {_shown(new)}"


def check_names(accepted: list[str]) -> None:
    """Refuse names of `resume_changed` that are none.

    Raises:
        InputError: one is unknown, or alters nothing.
    """
    if not isinstance(accepted, list | tuple):
        raise InputError(f"resume_changed={accepted!r} must list names, as in ['beta', 'learning_rate']")
    names = [option.name for option in fields(DPOConfig)] + list(OWN)
    for name in accepted:
        if name not in names:
            near = (
                nearest(str(name), names, "did you mean {}?").replace("'", "")
                or f"take an option's name or one of {', '.join(OWN)}"
            )
            raise InputError(f"resume_changed has {name!r}, which is no option; {near}")


def record_of(trainer: Trainer, origin: Record) -> Record:
    """Return what alters the result of a trainer's run, in plain types of JSON.

    Args:
        trainer: the trainer, before it trains.
        origin: what `origin_of` it was when it was made, and perhaps `optimizer_of`.
    """
    args = trainer.args
    settled = vars(args) | {
        "accelerator_config": _without(args.accelerator_config, "non_blocking", "use_configured_state"),
        "bf16": trainer.accelerator.mixed_precision == "bf16",
        "fp16": trainer.accelerator.mixed_precision == "fp16",
        "data_seed": None if args.data_seed == args.seed else args.data_seed,
        "deepspeed": _contents(args.deepspeed),
        "layout": trainer.layout,
        "model_init_kwargs": _loading(args.model_init_kwargs),
        "num_train_epochs": args.num_train_epochs if args.max_steps <= 0 else None,
        "router_aux_loss_coef": trainer._aux_loss_weight,
    }
    names = [option.name for option in fields(args) if option.name not in HARMLESS]
    if args.lr_scheduler_type in _BY_EVALUATION:
        names += _EVALUATION
    if args.lr_scheduler_type == "constant":  # a longer run begins with the shorter one
        settled["max_steps"] = settled["num_train_epochs"] = None
    reference = trainer.reference and trainer.reference.weights
    record = {name: settled[name] for name in names} | origin
    if "optimizer" not in record:
        record["optimizer"] = optimizer_of(trainer)
    record["world_size"] = trainer.accelerator.num_processes
    record["weights"] = {"reference": reference, "frozen": origin["weights"]}
    return json.loads(json.dumps(_plain(record)))


def origin_of(trainer: Trainer) -> Record:
    """Return what the reference pass and training change later: rows, weights and their kind."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    configs = getattr(model, "peft_config", {}).items()
    skip = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")
    return {
        "weights": _frozen_weights(model),
        "data": _rows(trainer.train_dataset, trainer.args.dataloader_num_workers),
        "dtype": "+".join(sorted({str(p.dtype)[6:] for p in model.parameters() if p.is_floating_point()})),
        "adapter": {name: _without(config.to_dict(), *skip) for name, config in configs} or None,
    }


def optimizer_of(trainer: Trainer) -> Record | None:
    """Return the class of the optimizer; of one that the trainer was given, also its settings and its schedule."""
    if trainer.is_deepspeed_enabled:
        return None
    given = trainer.optimizer
    if given is None:
        chosen = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        return {"class": _plain(chosen[0])}
    schedule = trainer.lr_scheduler and type(trainer.lr_scheduler)
    groups = [_without(group, "params", "initial_lr") for group in given.param_groups]
    return {"class": _plain(type(given)), "groups": groups, "schedule": schedule}


def changes(old: Record, new: Record) -> list[Change]:
    """Return what differs between the record of a checkpoint and that of a run."""
    defaults = {option.name: option.default for option in fields(DPOConfig)}
    differing = {
        name: Change(name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if (name in old or new[name] != _plain(defaults.get(name)))  # of an option that is younger than the checkpoint
        and (name in new or old[name] is not None)
        and old.get(name) != new.get(name)
    }
    if math.prod(old[name] for name in _BATCH) == math.prod(new[name] for name in _BATCH):
        noisy = not new["disable_dropout"] or new["neftune_noise_alpha"]
        differing = {
            name: change
            for name, change in differing.items()
            if name not in _BATCH or (noisy and name == "world_size")  # ranks draw noise of their own
        }
    if "dtype" in differing:
        differing.pop("weights", None)  # hashes are of bits
    if "optim" in differing:
        differing.pop("optimizer", None)
    return list(differing.values())


def refusal(trainer: Trainer, change: Change, old: Record, new: Record) -> str | None:
    """Return why a change cannot be accepted; None where it can."""
    if change.name not in RESTORED:
        return None
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed takes optimizer and schedule as the checkpoint has them"
    types = {old["lr_scheduler_type"], new["lr_scheduler_type"]}
    given = trainer.lr_scheduler if not trainer._created_lr_scheduler else None
    if types & set(_BY_EVALUATION) or not isinstance(given, LambdaLR | None):
        return "the schedule has no rate but that of the checkpoint"
    return None


# ---- parts of a record ----


def _rows(dataset: Dataset | IterableDataset, workers: int) -> Record:
    """Number and hash of the rows in their order; of a stream, what shares them out."""
    if isinstance(dataset, IterableDataset):
        return {"stream": True, "dataloader_num_workers": workers}
    names = [name for name in COLUMNS if name in dataset.column_names]
    hashed = xxhash.xxh3_128()
    rows = dataset.select_columns(names).with_format("arrow")
    for start in range(0, len(rows), WINDOW):
        table = rows[start : start + WINDOW]
        for name in names:
            hashed.update(name.encode())
            for buffer in _buffers(table[name].combine_chunks()):
                hashed.update(buffer)
    return {"groups": len(dataset), "hash": hashed.hexdigest()}


def _buffers(array: pa.Array | pa.ChunkedArray) -> Iterator[Any]:
    """Lengths of all lists, from the outer to the inner, then the numbers."""
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    while isinstance(array, pa.ListArray | pa.LargeListArray):
        yield array.value_lengths().fill_null(-1).cast(pa.int64()).to_numpy()
        array = array.flatten()
    yield array.is_null().to_numpy(zero_copy_only=False)
    yield array.drop_null().to_numpy(zero_copy_only=False)


def _frozen_weights(model: nn.Module) -> str | None:
    """Hash of some numbers of each weight that no checkpoint brings back: of the base of an adapter."""
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    if not frozen or any(p.is_meta or hasattr(p, "ds_id") or hasattr(p, "placements") for _, p in frozen):
        return None
    hashed = xxhash.xxh3_128()
    for name, weight in frozen:
        some = weight.detach().reshape(-1)[:: max(1, weight.numel() // 64)]
        hashed.update(f"{name}{list(weight.shape)}".encode())
        hashed.update(some.contiguous().view(torch.uint8).cpu().numpy())
    return hashed.hexdigest()


def _loading(options: Mapping[str, Any] | None) -> Record:
    """Arguments of from_pretrained, but for its defaults and for the dtype, which is compared as loaded."""
    options = _without(options or {}, "dtype", "torch_dtype")
    return {
        name: value for name, value in options.items() if value is not None and (name, value) != ("revision", "main")
    }


def _contents(value: Any) -> Any:
    """Settings that may stand in a file."""
    return json.loads(Path(value).read_text()) if isinstance(value, str) and Path(value).is_file() else value


def _without(values: Any, *names: str) -> Record:
    values = values if isinstance(values, Mapping) else vars(values)
    return {name: value for name, value in values.items() if name not in names}


def _plain(value: Any) -> Any:
    """The same in types of JSON; objects by their name."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, torch.dtype | torch.device | Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(vars(value))
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _differing(old: Any, new: Any) -> tuple[Any, Any]:
    """Of two mappings, only what differs."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return old, new
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    parts = {name: _differing(old.get(name), new.get(name)) for name in names}
    return {name: part[0] for name, part in parts.items()}, {name: part[1] for name, part in parts.items()}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 300 else f"{text[:297]}…"
