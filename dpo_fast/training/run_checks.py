"""What training would only meet after the reference pass, tried before it: optimizer, scheduler, best metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from dpo_fast.config.types import nearest
from dpo_fast.errors import InputError, input_of
from dpo_fast.training.metrics import NAMES

_OF_AN_EVALUATION = ("loss", "runtime", "samples_per_second", "steps_per_second", *NAMES)
_STEPS = 1000  # of a schedule whose length is not known yet


def check_optimizer(args: TrainingArguments, model: nn.Module) -> None:
    """Make the optimizer and the scheduler that `args` ask for on one small weight, and throw them away.

    Args:
        args: the options of the run.
        model: the policy; some optimizers look for its layers by name.

    Raises:
        InputError: an argument of one of them is wrong, or a package that it needs is not installed.
    """
    with input_of(
        f"optim={args.optim.value!r} with optim_args={args.optim_args!r}", "correct it, or take 'adamw_torch'"
    ):
        for pair in filter(None, (args.optim_args or "").replace(" ", "").split(",")):
            _check_is_read(pair, args, model)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if {"params", "model", "optimizer_dict"} & options.keys():  # made of the model's own weights
            kind, options = torch.optim.SGD, {"lr": args.learning_rate}
        optimizer = kind([nn.Parameter(torch.ones(2, 2, device=args.device))], **options)
    steps = args.max_steps if args.max_steps > 0 else _STEPS
    with input_of(
        f"lr_scheduler_type={args.lr_scheduler_type.value!r} with lr_scheduler_kwargs={args.lr_scheduler_kwargs!r}",
        "correct it, or take 'linear'",
    ):
        warmup = args.get_warmup_steps(steps)
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )
        for factor in getattr(scheduler, "lr_lambdas", ()):
            for step in (0, warmup, (warmup + steps) // 2, steps):
                if not math.isfinite(factor(step)):
                    raise ValueError(f"the learning rate of step {step} of {steps} is not finite")


def _check_is_read(pair: str, args: TrainingArguments, model: nn.Module) -> None:
    """Refuse one of `optim_args` that the optimizer does not read: no value of it changes anything."""
    name, equals, _ = pair.partition("=")
    if not equals:
        raise ValueError(f"{pair!r} is no name=value")

    def outcome(text: str | None) -> Any:
        try:
            return repr(Trainer.get_optimizer_cls_and_kwargs(_Replaced(args, text), model))
        except Exception as error:  # it is read, and refused
            return error

    without = outcome(None)
    if all(outcome(f"{name}={value}") == without for value in ("0.37", "7", "True", "other")):
        raise ValueError(f"{name!r} means nothing to this optimizer")


class _Replaced:
    """Options with other arguments of the optimizer."""

    def __init__(self, args: TrainingArguments, optim_args: str | None):
        self._args, self.optim_args = args, optim_args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name)


def check_best_metric(args: TrainingArguments, eval_dataset: Any, compute_metrics: Callable | None) -> None:
    """Refuse a `metric_for_best_model` that no evaluation will have; one of `compute_metrics` cannot be known.

    Raises:
        InputError: naming the metrics that there are.
    """
    name = args.metric_for_best_model
    chooses = args.load_best_model_at_end or args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    if name is None or compute_metrics is not None or not (chooses or args.save_strategy == "best"):
        return
    known = list(_OF_AN_EVALUATION)
    if isinstance(eval_dataset, dict):
        known = [f"{dataset}_{metric}" for dataset in eval_dataset for metric in known]
    if name.removeprefix("eval_") not in known:
        near = nearest(name.removeprefix("eval_"), known, "did you mean {}?") or f"choose from {known}"
        raise InputError(f"metric_for_best_model={name!r} is no metric of an evaluation; {near}")
