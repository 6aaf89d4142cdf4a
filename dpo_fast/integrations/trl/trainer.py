"""The accelerated `DPOTrainer`; `dpo_fast.integrations.trl` is where to import it from.

Its methods wrap those of TRL's class, which are kept in `STOCK`, and are also put into TRL's class itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer import dpo_trainer

from dpo_fast.batches.packing import PackedBatch
from dpo_fast.errors import InputError
from dpo_fast.integrations.trl.batches import PACKED, CannotPackError, Packing, PackingCollator
from dpo_fast.integrations.trl.forward import answer_padded_rows
from dpo_fast.integrations.trl.objective import objective_of
from dpo_fast.integrations.trl.reference import keep_reference, reference_logps, with_stored_reference
from dpo_fast.machine import keep_freed_memory
from dpo_fast.model.adapters import base_of
from dpo_fast.model.agreement import own_logps, settle_forward
from dpo_fast.model.dropout import disable_dropout
from dpo_fast.model.engines import autocast_of_training
from dpo_fast.training.metrics import STATISTICS, MetricAccumulator, batch_metrics
from dpo_fast_kernels import SequenceLoss

logger = logging.getLogger(__name__)

# The methods of TRL's class that are replaced.
STOCK = {
    name: vars(dpo_trainer.DPOTrainer)[name] for name in ("__init__", "_precompute_ref_logps", "_compute_loss", "log")
}
ADDED = (
    "_packing",
    "_reference_has_adapters",
    "_reference_copies",
)  # what DPOTrainer has besides, and its methods read


# ---- what can be accelerated ----


def _obstacle(trainer: dpo_trainer.DPOTrainer) -> str | None:
    """Why a trainer runs TRL's own path, to go on after 'because'; None when nothing speaks against ours."""
    model, plan = trainer.model, trainer.accelerator.parallelism_config
    base = base_of(model)
    if trainer._is_vision_dataset or trainer._is_vlm:
        return "it trains on images, or a model of them"
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        return f"its adapter ({type(model.active_peft_config).__name__}) adds prompt tokens"
    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3 has the LM head's weights at hand inside its own forward only"
    if plan is not None and any(getattr(plan, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp")):
        return "its rows or weights are split by tensor, context or sequence parallelism"
    if len(set(getattr(base, "hf_device_map", {}).values())) > 1:
        return "device_map spreads the model over several devices"
    if trainer.args.neftune_noise_alpha is not None:
        return "neftune_noise_alpha gives every sequence noise of its own, prompt and all"
    if not trainer.args.disable_dropout and any(
        isinstance(getattr(module, "attention_dropout", None), float) and module.attention_dropout
        for module in base.modules()
    ):
        return "its attention has dropout; set disable_dropout=True"
    return None


def _say_once(trainer: dpo_trainer.DPOTrainer, what: str, reason: object) -> None:
    if what not in trainer._own_path_said:
        trainer._own_path_said.add(what)
        logger.warning("%s on TRL's own path, not accelerated, because %s", what, reason)


@contextlib.contextmanager
def _packed_forward(trainer: dpo_trainer.DPOTrainer) -> Iterator[None]:
    """While the constructor runs, every model that TRL gives its fused head gets the packed forward besides.

    There the models have their final form and are not sharded yet, and the reference pass is still to come.
    """
    add_fused_lm_head, get_peft_model = dpo_trainer.add_fused_lm_head, dpo_trainer.get_peft_model
    before: list[Tensor] = []

    def put_on_adapter(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        before.append(own_logps(model))
        return get_peft_model(model, *args, **kwargs)

    def add_heads(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        add_fused_lm_head(model, *args, **kwargs)
        is_policy = model is base_of(trainer.model)
        reason = _obstacle(trainer) or _settle(trainer, trainer.model if is_policy else model)
        if reason is not None:
            _say_once(trainer, "training runs", reason)
            trainer._packing = None
            return
        if is_policy and is_peft_model(trainer.model) and trainer.ref_model is None:
            keep_reference(trainer, before[0] if before else None)
        whole = dataclasses.replace(trainer._packing, split_for_ld_dpo=False)
        answer_padded_rows(model, whole, kwargs.get("outputs", ("log_probs",)))

    dpo_trainer.add_fused_lm_head, dpo_trainer.get_peft_model = add_heads, put_on_adapter
    try:
        yield
    finally:
        dpo_trainer.add_fused_lm_head, dpo_trainer.get_peft_model = add_fused_lm_head, get_peft_model


def _settle(trainer: dpo_trainer.DPOTrainer, model: nn.Module) -> str | None:
    """Give the policy, or then the reference, the packed forward in one layout; return why not, or None."""
    args, before = trainer.args, trainer._packing
    settle = functools.partial(
        settle_forward,
        max_length=args.max_length or math.inf,
        autocast=lambda: autocast_of_training(trainer.accelerator),
    )
    if args.disable_dropout:
        disable_dropout(model)
    try:
        if model is trainer.model:
            layout = settle(model, "auto", training=args.disable_dropout, aux_loss=trainer.aux_loss_enabled)
        else:
            layout = settle(model, "padded" if before is None or before.layout == "padded" else "auto")
            if before is not None and layout != before.layout:
                settle(trainer.model, layout)
    except InputError as error:
        return str(error)
    trainer._packing = Packing(layout, trainer._tokenizer.pad_token_id, trainer.ld_alpha is not None)
    return None


def _packed(trainer: dpo_trainer.DPOTrainer, inputs: Mapping[str, Any]) -> PackedBatch | None:
    """The packed form of a batch, made here where the collator did not; None where there is none."""
    if trainer._packing is None:
        return None
    try:
        packed = inputs[PACKED] if PACKED in inputs else trainer._packing(inputs)
    except CannotPackError as error:
        _say_once(trainer, "some batches run", error)
        return None
    return packed.to(trainer.accelerator.device)


# ---- the trainer ----


class DPOTrainer(dpo_trainer.DPOTrainer):
    """TRL's `DPOTrainer`, with its arguments and results, in less time and memory.

    Raises:
        ValueError: as TRL's own; and where the store's reference log-probs are not those of the live reference.
    """

    # What is defined here also goes into TRL's own class (patch_trl), so methods name what they extend: super() would
    # not find it there. None: TRL's own path.
    _packing: Packing | None = None
    # What the reference of a policy in an adapter is made of.
    _reference_has_adapters = False
    _reference_copies: Sequence[tuple[nn.Parameter, Tensor]] = ()

    @functools.wraps(STOCK["__init__"])
    def __init__(self, *args: Any, **kwargs: Any):
        self._own_path_said: set[str] = set()
        self._sequence_loss: SequenceLoss | None = None
        with _packed_forward(self):
            STOCK["__init__"](self, *args, **kwargs)
        if self._packing is None:
            return
        self._pending_metrics = {mode: MetricAccumulator(self.args.device) for mode in ("train", "eval")}
        self._pending_tokens: list[Tensor] = []
        if self.args.device.type == "cpu":
            keep_freed_memory()
        # Batches that a main process shares out are cut and joined tensor by tensor, which a packed one is not; and a
        # subclass with a loss of its own does not know it.
        if type(self)._compute_loss is DPOTrainer._compute_loss and not self.args.accelerator_config.dispatch_batches:
            self.data_collator = PackingCollator(self.data_collator, self._packing)

    @functools.wraps(STOCK["_precompute_ref_logps"])
    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self._packing is not None and isinstance(dataset, Dataset) and not sharded:
            try:
                return with_stored_reference(self, dataset, name, self._packing.layout)
            except CannotPackError as error:
                _say_once(self, "reference log-probs are precomputed", error)
        elif self._packing is not None and sharded:
            _say_once(self, "reference log-probs are precomputed", "an engine shards the model")
        return STOCK["_precompute_ref_logps"](self, dataset, name, batch_size)

    @functools.wraps(STOCK["_compute_loss"])
    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool):
        packed = _packed(self, inputs)
        if return_outputs or packed is None:  # TRL makes the logits of all positions; its head is answered from packs
            inputs = {name: value for name, value in inputs.items() if name != PACKED}
            return STOCK["_compute_loss"](self, model, inputs, return_outputs)
        mode = "train" if self.model.training else "eval"
        packed = dataclasses.replace(packed, ref_logps=reference_logps(self, packed, inputs))
        objective = objective_of(self)
        loss_inputs = objective.inputs(packed, packed.totals)
        coupled = objective.couples_groups  # gradients need all pairs' log-probs at once
        if not coupled and (self._sequence_loss is None or self._sequence_loss.function != objective):
            self._sequence_loss = SequenceLoss(objective, objective.statistics)  # else the same, for torch.compile
        output = model(
            packed=packed,
            statistics=STATISTICS,
            aux_loss=self.aux_loss_enabled,
            **({} if coupled else {"loss": self._sequence_loss, "loss_inputs": loss_inputs}),
        )
        loss: Tensor = objective(output.logps, *loss_inputs) if coupled else output.preference_loss
        if output.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * output.aux_loss
        compared = objective.compare(output.logps.detach(), *loss_inputs)
        self._pending_metrics[mode].add(batch_metrics(output, packed, compared, self.beta))
        self._pending_metrics[mode].end_batch()
        if mode == "train":
            self._pending_tokens.append(inputs["attention_mask"].sum())
        return loss

    @functools.wraps(STOCK["log"])
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._packing is None:
            STOCK["log"](self, logs, start_time)
            return
        if self._pending_tokens:
            tokens = self.accelerator.reduce(torch.stack(self._pending_tokens).sum(), "sum")
            self._total_train_tokens += int(tokens)
            self._pending_tokens.clear()
        mode = "train" if self.model.training else "eval"
        batches = self._pending_metrics[mode].batches(lambda values: self.accelerator.gather(values[None]))
        for name, value in (item for batch in batches for item in batch.items()):
            self._metrics[mode][name].append(value)
        if batches or "num_tokens" in self._metrics[mode]:  # batches on TRL's own path read it before
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        STOCK["log"](self, logs, start_time)
