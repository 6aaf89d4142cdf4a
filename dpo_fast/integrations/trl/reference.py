"""Reference log-probs for TRL's trainer: for `precompute_ref_log_probs=True` the store's, else the live model's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from dpo_fast.batches.completion_pieces import by_completion
from dpo_fast.batches.groups import Layout, PreferenceGroup
from dpo_fast.batches.packing import PackedBatch
from dpo_fast.errors import InputError
from dpo_fast.integrations.trl.batches import PackingCollator, by_pair, pair_groups
from dpo_fast.model.adapters import adapters_off, standing_in, weights_of_reference
from dpo_fast.model.agreement import reference_has_adapters
from dpo_fast.reference.reference import Reference

if TYPE_CHECKING:
    from trl import DPOTrainer

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_ROWS_AT_ONCE = 256  # that are padded together on the host


def keep_reference(trainer: DPOTrainer, before: Tensor | None) -> None:
    """Keep copies of the weights of a policy in an adapter that train and that the reference reads.

    Args:
        trainer: before its first step.
        before: what the model said before a new adapter, as `own_logps` returns it; None where it came with one.
    """
    trainer._reference_has_adapters = before is not None and reference_has_adapters(trainer.model, before)
    weights = weights_of_reference(trainer.model, trainer._reference_has_adapters)
    if weights and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise InputError(
            "peft_config: weights that the reference reads train too (bias, or an initialisation that changes them), "
            "and an engine puts others in their place; give bias='none', another initialisation, or ref_model=…"
        )
    trainer._reference_copies = [(weight, weight.detach().clone()) for weight in weights]


@contextlib.contextmanager
def _reference_adapter(trainer: DPOTrainer) -> Iterator[None]:
    """Within it the policy is the reference: with a copy named `ref` of its adapter, or as it was before training."""
    if trainer.ref_model is not None or not is_peft_model(trainer.model):
        yield
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with contextlib.ExitStack() as reference:
        if "ref" in model.peft_config:
            reference.enter_context(use_adapter(model, adapter_name="ref"))
        elif not trainer._reference_has_adapters:
            reference.enter_context(adapters_off(model))
        reference.enter_context(standing_in(trainer._reference_copies))
        yield


# ---- up front, from the store ----


def with_stored_reference(trainer: DPOTrainer, dataset: Dataset, name: str, layout: Layout) -> Dataset:
    """`dataset` with columns `ref_chosen_logps` and `ref_rejected_logps`, fp32; what the store lacks is computed.

    Raises:
        CannotPackError: the collator's batches are none of right-padded pairs.
    """
    collator = trainer.data_collator
    groups = _groups_of(dataset, collator.collator if isinstance(collator, PackingCollator) else collator)
    model = trainer.ref_model or trainer.model
    own = trainer.ref_model is not None or trainer._reference_has_adapters
    adapters = own or "ref" in getattr(model, "peft_config", {})
    with _reference_adapter(trainer) if adapters else contextlib.nullcontext():
        reference = Reference(
            model,
            trainer.accelerator,
            layout=layout,
            adapters=adapters or not is_peft_model(model),
            column="ref_logps" if trainer.ld_alpha is None else "ref_token_logps",
        )
        found = reference.with_logps(groups, name)[reference.column]
    sums = found if trainer.ld_alpha is None else (_discounted(row, trainer.ld_alpha) for row in found)
    values = (pa.array(side, pa.float32()) for side in zip(*sums, strict=True))
    dataset = dataset.remove_columns([column for column in COLUMNS if column in dataset.column_names])
    return concatenate_datasets([dataset, Dataset(pa.table(dict(zip(COLUMNS, values, strict=True))))], axis=1)


def _groups_of(dataset: Dataset, collator: Any) -> Dataset:
    """The pairs that the trainer's own collator makes of the rows, truncated as in training."""
    tables = []
    for start in range(0, len(dataset), _ROWS_AT_ONCE):
        columns = dataset[start : start + _ROWS_AT_ONCE]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        tables.append(_table(pair_groups(collator(rows))))
    return Dataset(pa.concat_tables(tables))


def _table(groups: Sequence[PreferenceGroup]) -> pa.Table:
    ids = pa.list_(pa.int32())
    return pa.table(
        {
            "prompt_ids": pa.array([group.prompt_ids for group in groups], ids),
            "completion_ids": pa.array([group.completion_ids for group in groups], pa.list_(ids)),
            "context_lengths": pa.array([group.contexts for group in groups], ids),
        }
    )


def _discounted(token_logps: Sequence[Sequence[float]], alpha: float) -> Iterator[float]:
    """Sums of a pair's token log-probs as LD-DPO (arXiv 2409.06411) takes them: α beyond the shorter one's length."""
    shorter = min(map(len, token_logps))
    for logps in token_logps:
        yield float(np.sum(logps[:shorter]) + alpha * np.sum(logps[shorter:]))


# ---- batch by batch ----


def reference_logps(trainer: DPOTrainer, packed: PackedBatch, inputs: Mapping[str, Any]) -> Tensor:
    """Reference log-probs of a packed batch, fp32 [S], or [S, J] where completions are cut into pieces."""
    if trainer.precompute_ref_logps:
        sums = by_pair(*(inputs[column] for column in COLUMNS)).float()
        if packed.completion_pieces is None:
            return sums
        # The parts are added up already: the first piece, which always counts in full, stands for all.
        others = sums.new_zeros(len(sums), packed.completion_pieces.shape[1] - 1)
        return torch.cat([sums[:, None], others], dim=1)
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    no_recomputation = disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs)
    with torch.no_grad(), no_recomputation, _reference_adapter(trainer):
        logps = model(packed=packed).logps
    return logps if packed.completion_pieces is None else by_completion(logps, packed.completion_pieces)
