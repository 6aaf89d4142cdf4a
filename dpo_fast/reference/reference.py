"""The reference of a training run: the frozen model, and the store that keeps its log-probs.

The model is the policy as it is before training (without a new adapter), or one of its own. After the reference pass it
is needed no more, unless rows come as a stream.

A model whose weights are sharded (FSDP2, ZeRO-3) runs on all ranks together. Ranks have different batches, so before
each the ranks ask each other who has one, and those that have none left run an empty one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from dpo_fast.batches.groups import Layout, PreferenceGroup
from dpo_fast.batches.packing import PackedBatch, empty_pack, pack
from dpo_fast.data.columns import KEY_COLUMNS, token_tables
from dpo_fast.errors import InputError
from dpo_fast.machine import cache_dir
from dpo_fast.model.adapters import adapters_off, base_of, standing_in, weights_of_reference
from dpo_fast.model.engines import (
    autocast_of_training,
    dtype_of_engine,
    is_sharded,
    on_device,
    weights_at_hand,
    weights_in,
)
from dpo_fast.model.probes import probe_groups
from dpo_fast.reference.audit import StoreAudit
from dpo_fast.reference.compute import Column, ReferencePass, Shard, reference_column, with_reference_logps
from dpo_fast.reference.fingerprint import reference_description, weights_fingerprint
from dpo_fast.reference.store.keys import CompletionKeys
from dpo_fast.reference.store.store import ReferenceStore
from dpo_fast_kernels import attention_backend
from dpo_fast_kernels.attention.flash_implementations import active_flash_implementation

logger = logging.getLogger(__name__)


def attention_name(layout: Layout, model: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Return which attention computes log-probs, and the FlashAttention that was activated in place of PyTorch's."""
    backend = attention_backend(device, dtype)[0] if layout == "shared" else model.config._attn_implementation
    active = active_flash_implementation(device) if backend in ("varlen", "sdpa") else None
    return f"{layout}/{backend}+{active}" if active else f"{layout}/{backend}"


class Reference:
    """What gives reference log-probs.

    Args:
        model: with the packed forward; on its device, or still on the host.
        adapters: whether the model's adapters belong to the reference; else they are off while it runs.
        layout: of the packed batches.
        column: `ref_logps` of completions, or `ref_token_logps` of all their tokens.
        root: folder, or any path that fsspec knows, of the stores; None for the user's cache folder.
        max_tokens: bound on the packed tokens of a forward pass; unless given 32768 on CUDA, 8192 on other devices.
        shard: which prompts to run; None shares them out among the processes of the run.

    Attributes:
        lasts: whether it is there at any time, untouched by training: as a model in an adapter is.
        weights: hash of its weights; None until the store was opened, which is named after it.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        *,
        layout: Layout,
        adapters: bool = True,
        column: Column = "ref_logps",
        root: str | os.PathLike[str] | None = None,
        max_tokens: int | None = None,
        shard: Shard | None = None,
    ):
        self.model: nn.Module | None = model
        self.column = column
        self._accelerator = accelerator
        self._adapters, self._layout = adapters, layout
        self._copies: list[tuple[nn.Parameter, Tensor]] = []
        self._root, self._max_tokens = root or cache_dir() / "reference", max_tokens
        self._shard = shard or Shard(accelerator.process_index, accelerator.num_processes)
        self.weights: str | None = None
        self.lasts = hasattr(model, "disable_adapter") and self._keep_copies()

    def _keep_copies(self) -> bool:
        """Keep copies of weights that train and that the reference reads; return whether that is enough."""
        weights = weights_of_reference(self.model, self._adapters)
        self._copies = [(weight, weight.detach().clone()) for weight in weights]
        if self._accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return not weights  # an engine puts others in their place
        if any(weight.is_meta for weight in self.model.parameters()):
            return True
        packed = pack(probe_groups(base_of(self.model))[0], self._layout)
        with on_device(self.model, self._accelerator.device):
            before = self._run(packed)
            training = [weight for weight in self.model.parameters() if weight.requires_grad]
            with standing_in([(weight, weight.data * 1.25 + 0.125) for weight in training]):
                return torch.equal(self._run(packed), before)

    @functools.cached_property
    def store(self) -> ReferenceStore:
        with standing_in(self._copies):
            return ReferenceStore(self._root, self._description())

    @functools.cached_property
    def _dtype(self) -> torch.dtype:
        """Of the computation."""
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._accelerator.mixed_precision)
        return mixed or next(self.model.parameters()).dtype

    def _description(self) -> dict[str, object]:
        description = reference_description(
            self.model,
            adapters=self._adapters,
            dtype=self._dtype,
            attention=attention_name(self._layout, self.model, self._accelerator.device, self._dtype),
        )
        self.weights = str(description["weights"])
        if (dtype := dtype_of_engine(self._accelerator)) is not None:
            description["weights_dtype"] = str(dtype).removeprefix("torch.")
        return description

    def score(self, packed: PackedBatch) -> Tensor:
        """Token log-probs of a packed batch, fp32 [N].

        Raises:
            ValueError: memory ran out on one of several ranks that run together, and cannot go back together.
        """
        if not is_sharded(self.model):
            return self._run(packed)
        self._any_rank_has(True)
        try:
            return self._run(packed)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise InputError(
                f"max_tokens_per_micro_batch={self._max_tokens}: the reference pass ran out of memory at "
                f"{packed.num_tokens} tokens, on a model whose weights are shared out among the ranks; set it lower"
            ) from error

    def _run(self, packed: PackedBatch) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        off = contextlib.nullcontext() if self._adapters else adapters_off(self.model)
        device, autocast = self._accelerator.device, autocast_of_training(self._accelerator)
        as_in_training = weights_in(self.model, dtype_of_engine(self._accelerator), device)
        copies = standing_in(self._copies)
        with off, copies, weights_at_hand(self.model, self._accelerator), as_in_training, torch.no_grad(), autocast:
            logps = self.model(packed=packed.to(device, non_blocking=True)).token_logps
        self.model.train(was_training)
        return logps

    def _any_rank_has(self, own: bool) -> bool:
        """Whether any rank has a batch to run."""
        count = torch.tensor([float(own)], device=self._accelerator.device)
        return self._accelerator.reduce(count).item() > 0

    def compute(self, dataset: Dataset, name: str) -> CompletionKeys:
        """Puts into the store what it lacks of a dataset, this process's share, and returns the keys of all of it."""
        self._check_weights()
        keys, run = CompletionKeys.of_tables(token_tables(dataset)), self._pass()
        self.store.expect_additions(keys.values)
        with on_device(self.model, self._accelerator.device) if self.model else contextlib.nullcontext():
            if self.model is None:
                self._audit.warn_of_unaudited(keys)
            else:
                self._audit.of_dataset(dataset, keys)
            run.over(dataset, keys, name)
            while self.store.lost_rows():
                self._pass().over(dataset, keys, name)
            if run.report.computed:  # while others may have added the same rows
                self._audit.of_dataset(dataset, keys)
            self._wait_for_others()
        return keys

    def _check_weights(self) -> None:
        """Refuse weights that are no longer those that the store is named after.

        Raises:
            InputError: they have changed since it was opened.
        """
        if self.model is None or self.weights is None:
            return
        with standing_in(self._copies):
            now = weights_fingerprint(self.model, self._adapters)
        if now != self.weights:
            raise InputError(
                "model: its weights have changed since the reference store was opened, which is named after them; make "
                "a new Reference of it, or keep a copy of the model as it was"
            )

    def _wait_for_others(self) -> None:
        """Runs with the ranks that still have batches, where that takes all ranks."""
        while self.model is not None and is_sharded(self.model) and self._any_rank_has(False):
            self._run(empty_pack(self._layout))

    def with_logps(self, dataset: Dataset, name: str = "train") -> Dataset:
        """Adds reference log-probs to a dataset; those that the store lacks are computed, by all processes together.

        Args:
            dataset: preference groups, as `dpo_fast.prepare_dataset` returns them.
            name: of the dataset, for the progress bar.

        Returns:
            The dataset with a column `ref_logps`, nats for each completion, or `ref_token_logps`, for each token.
        """
        keys = self.compute(dataset, name)
        self._accelerator.wait_for_everyone()
        return self._with_stored(dataset, keys)

    def with_stored_logps(self, dataset: Dataset) -> Dataset:
        """Adds reference log-probs that the store has.

        Raises:
            ValueError: it lacks some, or the dataset is a stream.
        """
        if isinstance(dataset, IterableDataset):
            raise InputError("dataset: the rows of a stream are not known yet; give a dataset")
        keys = CompletionKeys.of_tables(token_tables(dataset))
        self._audit.warn_of_unaudited(keys)
        return self._with_stored(dataset, keys)

    def _with_stored(self, dataset: Dataset, keys: CompletionKeys) -> Dataset:
        self.store.refresh()
        return with_reference_logps(dataset, keys, self.store, self.column)

    def expect_rows(self, workers: int = 0) -> None:
        """Opens the store for rows of a stream; before training, which may change the model that the store is named
        after.

        Args:
            workers: of the loader that reads the stream.

        Raises:
            ValueError: rows would come in processes that do not have the model.
        """
        if workers:
            raise InputError(
                f"dataloader_num_workers={workers}: references of a stream are computed as its rows come, by the "
                "process that has the model; set it to 0"
            )
        self._row_pass  # noqa: B018

    @functools.cached_property
    def _row_pass(self) -> ReferencePass:
        return self._pass(Shard())

    def with_logps_of_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Adds reference log-probs to some groups; what the store lacks is computed, and in it from then on.

        All processes call it equally often, each with rows of its own, or with none.
        """
        run, logps = self._row_pass, []
        if rows:
            table = pa.table({name: [row[name] for row in rows] for name in KEY_COLUMNS if name in rows[0]})
            keys = CompletionKeys.of_table(table)
            self._audit.of_rows(table, keys)
            run.run(table, keys)
            while self.store.lost_rows():
                run.run(table, keys)
            logps = reference_column(keys, self.store, self.column).to_pylist()
        self._wait_for_others()
        return [{**row, self.column: values} for row, values in zip(rows, logps, strict=True)]

    def share_rows(self) -> None:
        """Writes what `with_logps_of_rows` has computed, and picks up what it has in other processes; all call it."""
        if self._accelerator.num_processes > 1:
            self.store.save()
            self._accelerator.wait_for_everyone()
            self.store.refresh()

    def keep(self) -> None:
        """Makes the reference independent of a policy that is about to be trained: by a copy of the whole model.

        Raises:
            ValueError: the model is in ZeRO-3's shards, which no copy keeps together.
        """
        if any(hasattr(parameter, "ds_id") for parameter in self.model.parameters()):
            raise InputError(
                "train_dataset: a stream keeps a copy of the untrained model as its reference, and of ZeRO-3's shards "
                "there is no copy; train an adapter (peft_config), give the rows as a dataset, or take FSDP2 or ZeRO-2"
            )
        logger.warning(
            "the reference of a stream stays in memory beside the model; an adapter (peft_config) needs no copy"
        )
        self.model = copy.deepcopy(self.model).requires_grad_(False)

    def release(self) -> None:
        """Lets go of the model; the store, which is named after it, stays."""
        self._audit  # noqa: B018 (it and its store are opened while the model is there)
        self.model = None

    def _pass(self, shard: Shard | None = None) -> ReferencePass:
        return ReferencePass(
            self.store,
            self.score,
            layout=self._layout,
            max_tokens=self._max_tokens,
            shard=shard or self._shard,
            device=self._accelerator.device,
        )

    @functools.cached_property
    def _audit(self) -> StoreAudit:
        def run(groups: Sequence[PreferenceGroup]) -> np.ndarray:
            return self._pass().sums(groups)

        return StoreAudit(self.store, run, layout=self._layout, dtype=self._dtype, shard=self._shard)
