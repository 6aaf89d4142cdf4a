"""DPOTrainer: preference optimization on transformers.Trainer.

Everything around the step (checkpoints, resume, logging, callbacks, schedulers, engines) is transformers' and
accelerate's. The step itself: a batch of groups becomes packs under a token budget, each pack runs forward and
backward once, and the loss is divided by what the whole optimizer step holds, so gradients do not depend on how the
step was cut.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from dpo_fast.batches.collator import DPOCollator
from dpo_fast.batches.packing import PackedBatch, empty_pack
from dpo_fast.config import DPOConfig
from dpo_fast.data.prepare import DataSummary
from dpo_fast.errors import InputError
from dpo_fast.losses import uses
from dpo_fast.losses.objective import Objective
from dpo_fast.machine import keep_freed_memory
from dpo_fast.model.adapters import base_of, let_recompute
from dpo_fast.model.compilation import compile_layers
from dpo_fast.model.engines import autocast_of_training, keep_numbers_exact, on_device
from dpo_fast.model.forward import PackedOutput
from dpo_fast.model.layer_kernels import check_layer_kernels
from dpo_fast.model.loading import aux_loss_weight, check_reference, load_model, vocabulary_size
from dpo_fast.model.noise import noisy_embeddings
from dpo_fast.model.policy import prepare_policy, settle_layout
from dpo_fast.model.positions import most_positions
from dpo_fast.reference.compute import Shard
from dpo_fast.reference.reference import Reference
from dpo_fast.training.activation_memory import activations_fit, largest_pack
from dpo_fast.training.coupled_step import Coefficients, step_coefficients, step_loss, surrogate
from dpo_fast.training.datasets import PreferenceDatasets, check_datasets, map_datasets
from dpo_fast.training.divergence import FiniteTrainer
from dpo_fast.training.group_cost import GroupCost, group_lengths
from dpo_fast.training.metrics import STATISTICS, MetricAccumulator, batch_metrics
from dpo_fast.training.progress import show_progress
from dpo_fast.training.rank_sharding import equalize_pack_counts, number_rows, rows_in_order, shard_batches
from dpo_fast.training.resuming import ResumingTrainer
from dpo_fast.training.run_checks import check_best_metric, check_optimizer
from dpo_fast.training.running_margin import RunningMargin
from dpo_fast.training.stopping import Stopping
from dpo_fast.training.stream_batches import StreamBatches
from dpo_fast.training.trainer_arguments import config_of, refuse_other_arguments, refuse_search, tokenizer_of
from dpo_fast_kernels import SequenceLoss

logger = logging.getLogger(__name__)


class DPOTrainer(FiniteTrainer, ResumingTrainer):
    """Trains a causal language model on preferences, with the parameters of TRL's trainer.

    Args:
        model: a name or path, or a loaded model. A `PeftModel`, or a folder that holds an adapter, trains that adapter.
        ref_model: the frozen reference, loaded or a name or path; None is the policy as it is before training (for a
            new adapter: without it). It is used for one pass up front and not kept.
        args: a `DPOConfig`. Another trainer's configuration is taken where each of its options means something here.
        data_collator: replaces `DPOCollator`; takes tokenised rows, returns a dict as `DPOCollator` does.
        train_dataset: rows in any format of `dpo_fast.data.prepare`.
            A stream (`IterableDataset`) too: its references are computed as its rows come.
        eval_dataset: likewise, or a dict of datasets.
        processing_class: the tokenizer, or a processor that has one; None loads the model's.
        compute_metrics: gets the rewards (β(ℓ − ℓ_ref)) of winner and loser, [comparisons, 2], as predictions, and the
            comparisons' weights as labels.
        callbacks, optimizers: as for `transformers.Trainer`.
        quantization_config: for loading `model` by name.
        peft_config: trains an adapter of this kind instead of the whole model.

    Raises:
        ValueError: an argument or the data cannot be used; the message names it, and nothing has been trained.
    """

    # The loss is divided by the totals of the optimizer step, over all its micro-batches.
    loss_is_scaled_for_ga = True
    _tag_names = ["dpo_fast", "dpo"]
    hyperparameter_search = refuse_search
    _datasets_class = PreferenceDatasets
    _shard: Shard | None = None  # which prompts the reference runs on; None for this process's share
    args: DPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        ref_model: str | PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any | None = None,
        peft_config: Any | None = None,
        **other_arguments: Any,
    ):
        refuse_other_arguments(other_arguments)
        args = config_of(args, model, compute_metrics)
        check_datasets(train_dataset, eval_dataset, args.columns)
        if ref_model is not None and ref_model is model:
            raise InputError("ref_model is the same object as model; leave ref_model out to use the untrained policy")
        if args.device.type == "cpu":
            keep_freed_memory()
        set_seed(args.seed)  # adapters are initialised at random
        given, model = model, load_model(model, args, quantization_config)
        check_layer_kernels(model, args)
        if optimizers == (None, None) and not args.deepspeed:
            check_optimizer(args, model)
        check_best_metric(args, eval_dataset, compute_metrics)
        if isinstance(ref_model, str):
            ref_model = load_model(ref_model, args, quantization_config, "ref_model")
        processing_class = tokenizer_of(processing_class, given, model, args)
        self._datasets = self._datasets_class(
            args,
            processing_class,
            vocabulary_size(model),
            positions=most_positions(model, ref_model),
            own_reference=ref_model is not None,
        )
        train_dataset = self._datasets.tokenized(train_dataset, "train")
        eval_dataset = map_datasets(eval_dataset, self._datasets.tokenized)
        if self._datasets.has_streams and args.accelerator_config.dispatch_batches is None:
            args.accelerator_config.dispatch_batches = False  # every process reads its own rows

        needs_reference = any(uses(loss, "reference") for loss in args.loss_mix)
        if ref_model is not None and not needs_reference:
            raise InputError(f"ref_model is given, but loss_type={args.loss_type} looks at no reference; leave it out")
        if ref_model is not None:
            check_reference(ref_model, self._datasets.vocab_size)
        model, adapters = prepare_policy(model, ref_model, peft_config, args, needs_reference)
        self._aux_loss_weight = aux_loss_weight(base_of(model), args.router_aux_loss_coef)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        show_progress(self)
        self.stopping = Stopping()
        self.add_callback(self.stopping)
        if args.n_gpu > 1:
            raise InputError(
                f"{args.n_gpu} GPUs are visible to one process, which nn.DataParallel would share out; start with "
                "`accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        if self.is_fsdp_enabled:
            keep_numbers_exact(self.accelerator.state.fsdp_plugin)
        ref_model = ref_model and ref_model.to(args.device)
        self.layout = settle_layout(self.model, ref_model, args, self.accelerator, self._aux_loss_weight != 0)
        base = base_of(self.model)
        self._group_cost = GroupCost.of_model(base, self.layout)
        if data_collator is None:
            self.data_collator = DPOCollator(
                self.layout,
                args.max_tokens_per_micro_batch,
                processing_class.pad_token_id,
                split_for_ld_dpo=args.splits_completions,
            )
        if args.torch_compile:
            compile_layers(base, self.accelerator.state.dynamo_plugin)
        self.model_accepts_loss_kwargs = True  # transformers < 5.19 reads this instead of loss_is_scaled_for_ga
        self._running_margin = RunningMargin(args.device) if "beta_dpo" in args.loss_mix else None
        mean_margin = None if self._running_margin is None else self._running_margin.mean
        self._objective = Objective(args.loss_mix, args.loss_parameters, args.use_weighting, args.ld_alpha, mean_margin)
        self._coupled, self._surrogate = self._objective.couples_groups, SequenceLoss(surrogate)
        self._loss = None if self._coupled else SequenceLoss(self._objective, self._objective.statistics)
        self._empty = empty_pack(self.layout, split_for_ld_dpo=args.splits_completions).to(args.device)
        self._metrics = {mode: MetricAccumulator(args.device) for mode in ("train", "eval")}
        self._new_tokens = 0
        self._balances: list[float] = []
        self.model.add_model_tags(self._tag_names)

        self._remember_origin()
        if needs_reference:
            self._datasets.reference = self._make_reference(ref_model, adapters)
        self.train_dataset = self._datasets.with_reference(self.train_dataset, "train")
        self.eval_dataset = map_datasets(self.eval_dataset, self._datasets.with_reference)
        self._datasets.settle_reference()

    @property
    def reference(self) -> Reference | None:
        """What gives reference log-probs; None where the loss looks at none."""
        return self._datasets.reference

    @property
    def data_summaries(self) -> dict[str, DataSummary]:
        """What became of the rows, by name of the dataset."""
        return self._datasets.summaries

    def _make_reference(self, ref_model: PreTrainedModel | None, adapters: bool) -> Reference:
        model = self.model
        if ref_model is not None:
            model, adapters = ref_model, True
        return Reference(
            model,
            self.accelerator,
            layout=self.layout,
            adapters=adapters,
            column="ref_token_logps" if self.args.splits_completions else "ref_logps",
            root=self.args.reference_cache_dir,
            max_tokens=self.args.max_tokens_per_micro_batch,
            shard=self._shard,
        )

    # ---- the step ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Like `Trainer.train`; a checkpoint that is damaged or of another run is refused before anything is loaded."""
        folder = self._checkpoint_for(resume_from_checkpoint)
        if self.args.recompute_where_needed:
            self.args.gradient_checkpointing = self.args.activation_checkpointing = self._must_recompute()
            let_recompute(self.accelerator.unwrap_model(self.model), self.args)
        base, self.neftune_noise_alpha = base_of(self.accelerator.unwrap_model(self.model)), None
        try:
            with noisy_embeddings(base, self.args.neftune_noise_alpha):
                return super().train(folder, *args, **kwargs)
        finally:
            self._datasets.save_references()

    def _inner_training_loop(self, *args, **kwargs):
        """Begin the log anew, also for `auto_find_batch_size`, which comes again after an attempt without memory."""
        self._metrics["train"].clear()
        self._balances.clear()
        self._new_tokens = self.current_flos = 0
        if self._running_margin is not None:
            self._running_margin.begin(kwargs.get("resume_from_checkpoint"))
        return super()._inner_training_loop(*args, **kwargs)

    def _must_recompute(self) -> bool:
        """Whether activations of the largest pack do not fit, or an engine has yet to say what memory it leaves."""
        if self.is_fsdp_enabled:
            return not self.accelerator.state.fsdp_plugin.activation_checkpointing  # else FSDP does it itself
        if self.is_deepspeed_enabled or isinstance(self.train_dataset, IterableDataset):
            return True
        tokens = (self._group_cost.tokens(*lengths) for lengths in group_lengths(self.train_dataset))
        most = largest_pack(tokens, self._train_batch_size, self.layout, self.args.max_tokens_per_micro_batch)
        packs = tuple(empty_pack(self.layout, groups=groups, length=32) for groups in (1, 4))
        self.model.train()
        with on_device(self.model, self.args.device):
            return not activations_fit(self.model, packs, most, self.accelerator.autocast())

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Totals of the optimizer step, fp32 [2]: over its micro-batches and all ranks."""
        if not batch_samples:  # the stream is over, on all ranks
            return None
        totals, _, balance = self._equalize(batch_samples, self.args.gradient_accumulation_steps)
        self._balances.append(balance)
        if self._coupled and self.args.couple == "step":
            self._couple(batch_samples, totals, self.accelerator)
        for batch in batch_samples if self._coupled and self.args.couple == "micro_batch" else ():
            self._couple([batch], totals)
        return totals

    def _equalize(self, batches: list[dict], most: int) -> tuple[Tensor, int, float]:
        """Give all ranks as many packs; return totals, number of groups and balance of ranks."""
        totals, groups, balance, self.stopping.agreed = equalize_pack_counts(
            batches, most, self._empty, self._host_group, self.stopping.asked
        )
        return totals.to(self.args.device, non_blocking=True), groups, balance

    @functools.cached_property
    def _host_group(self) -> dist.ProcessGroup | None:
        """All ranks, to tell each other what the host knows without waiting for the device; None for one process."""
        several = self.accelerator.num_processes > 1
        return dist.new_group(backend="gloo", timeout=self.args.ddp_timeout_delta) if several else None

    def _get_dataloader(self, dataset, description: str, batch_size: int, *args, **kwargs) -> DataLoader:
        """Like transformers', but in the order of one process, and no group comes twice to fill up the last batch."""
        whole = batch_size * self.accelerator.num_processes
        if isinstance(dataset, IterableDataset):
            reference = self.reference if self._datasets.lacks_reference(dataset) else None
            dataset, whole = StreamBatches(dataset, whole, self._group_cost, self.accelerator, reference), None
        elif whole > batch_size and not kwargs.get("is_training"):
            dataset = number_rows(dataset, whole)
        loader = super()._get_dataloader(dataset, description, whole, *args, **kwargs)
        return shard_batches(loader, self._group_cost.of_dataset, self.accelerator)

    def _couple(self, batches: list[dict], totals: Tensor, accelerator: Accelerator | None = None) -> None:
        """Finds out in a first pass how the packs of `batches` depend on each other, unless they are one and alone."""
        for batch in batches:
            batch["packs"] = [packed.to(self.args.device) for packed in batch["packs"]]
        packs = [packed for batch in batches for packed in batch["packs"]]
        if len(packs) == 1 and (accelerator is None or accelerator.num_processes == 1):
            return
        model = self.model_wrapped
        model.train()
        with torch.no_grad(), autocast_of_training(self.accelerator):
            logps = [model(packed=packed).logps for packed in packs]
        coefficients = iter(step_coefficients(packs, logps, totals, self._objective, accelerator))
        for batch in batches:
            batch["coefficients"] = [next(coefficients) for _ in batch["packs"]]

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        packs = inputs["packs"]
        loss = 0.0
        for index, packed in enumerate(packs):
            last = index == len(packs) - 1
            part = {
                "packs": [packed],
                "coefficients": inputs.get("coefficients", [None] * len(packs))[index : index + 1],
            }
            with self._accumulating(model, last):
                loss = loss + super().training_step(model, part, num_items_in_batch)
        self._metrics["train"].end_batch()
        if self._running_margin is not None and self.accelerator.sync_gradients:
            self._running_margin.end_step(self.accelerator.reduce)
        self._new_tokens += sum(packed.num_tokens for packed in packs)
        return loss

    @contextlib.contextmanager
    def _accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Engines reduce gradients, and DeepSpeed steps, after the last pack only, unless told to reduce each time."""
        sync, state = self.accelerator.sync_gradients, self.accelerator.gradient_state
        wait = sync and not last and not state.plugin_kwargs.get("sync_each_batch", False)
        state._set_sync_gradients(sync and last)
        with self.accelerator.no_sync(model) if wait else contextlib.nullcontext():
            yield
        state._set_sync_gradients(sync)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        totals = inputs["totals"] if num_items_in_batch is None else num_items_in_batch
        totals = totals.to(self.args.device)
        packs = [packed.to(self.args.device) for packed in inputs["packs"]]
        coefficients = inputs.get("coefficients") or [None] * len(packs)
        loss, outputs = 0.0, []
        for packed, known in zip(packs, coefficients, strict=True):
            output = model(
                packed=packed,
                statistics=STATISTICS if self.args.log_completion_statistics else (),
                aux_loss=self._aux_loss_weight != 0,
                **self._loss_arguments(packed, totals, known),
            )
            if output.preference_loss is not None:
                loss = loss + output.preference_loss
            if output.aux_loss is not None:
                share = packed.comparison_weights.sum() / totals[0]
                loss = loss + self._aux_loss_weight * share * output.aux_loss
            outputs.append((packed, output))
        if self._coupled and coefficients[0] is None:
            across = self.accelerator if self.args.couple == "step" and self.accelerator.num_processes > 1 else None
            value = step_loss(packs, [output.logps for _, output in outputs], totals, self._objective, across)
            loss = loss + (value if across is None else value / across.num_processes)
        rewards = [(packed, self._record(output, packed, totals)) for packed, output in outputs]
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # engines average over ranks, the totals are sums over ranks
        return (loss, rewards) if return_outputs else loss

    def _loss_arguments(self, packed: PackedBatch, totals: Tensor, coefficients: Coefficients | None) -> dict[str, Any]:
        """What the model's forward is told of the loss: all of it, its gradient, or nothing where packs are coupled."""
        if coefficients is not None:
            return {"loss": self._surrogate, "loss_inputs": (coefficients.gradient, coefficients.share)}
        if self._coupled:
            return {}
        return {"loss": self._loss, "loss_inputs": self._objective.inputs(packed, totals)}

    def _record(self, output: PackedOutput, packed: PackedBatch, totals: Tensor) -> Tensor:
        """Adds the metrics of a pack; returns the rewards of winner and loser, [C, 2]."""
        compared = self._objective.compare(output.logps.detach(), *self._objective.inputs(packed, totals))
        mode = "train" if self.model.training else "eval"
        if packed.num_tokens:  # else it only keeps step with other ranks
            self._metrics[mode].add(batch_metrics(output, packed, compared, self.args.beta))
        rewards = self.args.beta * torch.stack([compared.winner_ratios, compared.loser_ratios], dim=1)
        if mode == "train" and self._running_margin is not None:
            self._running_margin.add((-rewards.diff(dim=1)[:, 0] * packed.comparison_weights).sum() / totals[0])
        return rewards

    # ---- evaluation, logging ----

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        totals, groups, _ = self._equalize([inputs], most=1)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=totals)
        self._metrics["eval"].end_batch()
        # Every rank returns what all have: a batch's loss for each of its groups, which so weigh alike in the mean.
        first = iter([groups])  # the loss, which transformers has repeated
        self.gather_function = lambda values: values[: next(first, None)]
        loss = self.accelerator.reduce(loss, "mean").expand(groups)
        if prediction_loss_only:
            return loss, None, None
        rows = [torch.cat([rewards, packed.comparison_weights[:, None]], dim=1) for packed, rewards in outputs]
        rows = rows_in_order(torch.cat(rows), inputs.get("positions"), self.accelerator)
        return loss, rows[:, :2], rows[:, 2]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Do what `Trainer.evaluate` does, also for rows in any preference format.

        Raises:
            InputError: the store lacks reference log-probs of new rows and the reference is not kept: it was a
                `ref_model`, or the policy that has been trained since. Pass the dataset to the constructor instead.
        """
        if isinstance(eval_dataset, Dataset | IterableDataset | dict):
            eval_dataset = map_datasets(eval_dataset, self._held_out)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._datasets.save_references()
        return metrics

    def predict(self, test_dataset: Dataset | IterableDataset, ignore_keys=None, metric_key_prefix: str = "test"):
        """Do what `Trainer.predict` does, also for rows in any preference format.

        Returns:
            The rewards of winner and loser, fp32 [comparisons, 2], as predictions; the weights of the comparisons as
            labels; the metrics of an evaluation.

        Raises:
            InputError: as for `evaluate`.
        """
        output = super().predict(self._held_out(test_dataset, "test"), ignore_keys, metric_key_prefix)
        self._datasets.save_references()
        return output

    def _held_out(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        return self._datasets.held_out(dataset, name, trained=self.state.global_step > 0)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """Add the metrics of the batches to those of `Trainer.evaluation_loop`, under the names of this evaluation."""
        self._metrics["eval"].clear()  # of an evaluation that an error ended
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._reduced("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs.update(self._reduced("train"))
            self._count_tokens()
            logs["num_tokens"] = self.state.num_input_tokens_seen
            if self.accelerator.num_processes > 1 and self._balances:
                logs["rank_balance"] = fmean(self._balances)
            self._balances.clear()
        super().log(logs, start_time)

    def _reduced(self, mode: str) -> dict[str, float]:
        """Return the metrics since the last call, of all ranks."""
        return self._metrics[mode].reduce(lambda values: self.accelerator.gather(values[None]))

    def _count_tokens(self) -> None:
        """Adds the tokens of all ranks to the trainer's state, which checkpoints keep; a prompt counts once a group."""
        new_tokens = torch.tensor([self._new_tokens], device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(new_tokens).sum())
        self._new_tokens = 0

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        """Leave it to `_count_tokens`; for `include_num_input_tokens_seen`."""

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        self._count_tokens()
        if self._running_margin is not None:
            self._running_margin.save(self.state)
        super()._save_checkpoint(model, trial)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """6 FLOP a parameter of the body and token, for transformers' log of the total."""
        return 6 * self._group_cost.parameters * sum(packed.num_tokens for packed in inputs["packs"])
