"""Implicit rewards: a model trained on preferences is a reward model, r = β(ℓ − ℓ_ref) (arXiv 2305.18290, eq. 5).

Both log-probs come from the reference store, so scoring again, or with another β, computes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_fast.config import DPOConfig
from dpo_fast.data.columns import REFERENCE_FIELDS
from dpo_fast.data.prepare import DataSummary
from dpo_fast.errors import InputError
from dpo_fast.model.agreement import settle_forward
from dpo_fast.model.dropout import disable_dropout
from dpo_fast.model.loading import vocabulary_size
from dpo_fast.model.positions import most_positions
from dpo_fast.reference.reference import Reference
from dpo_fast.training.datasets import prepare_preferences


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({self.low:.4f} … {self.high:.4f})"


@dataclass(frozen=True)
class ImplicitRewards:
    """What a model makes of preferences.

    Attributes:
        groups: columns named as `PreferenceGroup`'s fields, with `logps`, `ref_logps` and `rewards` of completions.
        summary: what became of the rows.
        accuracy: share of comparisons whose winner has the higher reward.
        margin: the winners' rewards less the losers', in nats times β.
    """

    groups: Dataset
    summary: DataSummary
    accuracy: Interval
    margin: Interval

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each group: its row in the dataset, and what was found, JSON's types only."""
        columns = ("rewards", "logps", "ref_logps", "comparisons")
        for row, group in zip(self.summary.kept.tolist(), self.groups, strict=True):
            margins = [group["rewards"][winner] - group["rewards"][loser] for winner, loser in group["comparisons"]]
            yield {"row": row, **{column: group[column] for column in columns}, "margins": margins}


def implicit_rewards(
    model: PreTrainedModel | nn.Module,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: DPOConfig,
    ref_model: PreTrainedModel | None = None,
    *,
    name: str = "train",
) -> ImplicitRewards:
    """Scores a dataset of preferences.

    Args:
        model: the trained policy.
        dataset: rows in any format of `dpo_fast.data.prepare`.
        tokenizer: the model's.
        config: its beta, max_length, truncation_mode, comparisons, precision, layout and reference_cache_dir count.
        ref_model: what the policy was trained against; None for the policy without its adapter.
        name: of the dataset, for progress bars.

    Raises:
        ValueError: no reference, or rows that cannot be used.
    """
    if ref_model is None and not hasattr(model, "disable_adapter"):
        raise InputError(
            "ref_model is None, and model has no adapter to go without; give the model it was trained from"
        )
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
    accelerator = Accelerator(mixed_precision=precision, cpu=config.use_cpu)
    limits = {"vocab_size": vocabulary_size(model), "positions": most_positions(model, ref_model)}
    groups, summary = prepare_preferences(dataset, tokenizer, config, **limits, name=name)
    groups = groups.remove_columns([column for column in REFERENCE_FIELDS if column in groups.features])
    logps, ref_logps = (
        _log_probs(scored, groups, config, accelerator, adapters=adapters, name=f"{name} ({role})")
        for role, scored, adapters in (
            ("policy", model, True),
            ("reference", ref_model or model, ref_model is not None),
        )
    )
    rewards = [
        [config.beta * (logp - ref) for logp, ref in zip(*pair, strict=True)]
        for pair in zip(logps, ref_logps, strict=True)
    ]
    for column, values in (("logps", logps), ("ref_logps", ref_logps), ("rewards", rewards)):
        groups = groups.add_column(column, values)
    return ImplicitRewards(groups, summary, *_intervals(groups))


def _log_probs(
    model: nn.Module, groups: Dataset, config: DPOConfig, accelerator: Accelerator, *, adapters: bool, name: str
) -> list[list[float]]:
    disable_dropout(model)
    model = model.to(accelerator.device)
    layout = settle_forward(
        model, config.layout, max_length=config.max_length or math.inf, autocast=accelerator.autocast
    )
    reference = Reference(
        model,
        accelerator,
        layout=layout,
        adapters=adapters,
        root=config.reference_cache_dir,
        max_tokens=config.max_tokens_per_micro_batch,
    )
    return reference.with_logps(groups, name)["ref_logps"][:]


def _intervals(groups: Dataset) -> tuple[Interval, Interval]:
    """Accuracy with Wilson's interval and margin with the normal one; comparisons of a group are not independent, so
    the number of groups is what counts."""
    accuracies, margins, weights = [], [], []
    for group in groups:
        rewards = np.array(group["rewards"])
        winners, losers = np.array(group["comparisons"]).T
        margin, weight = rewards[winners] - rewards[losers], np.array(group["comparison_weights"])
        accuracies.append(np.average(margin > 0, weights=weight))
        margins.append(np.average(margin, weights=weight))
        weights.append(weight.sum())
    count, z = len(weights), 1.96
    p, mean = np.average(accuracies, weights=weights), np.average(margins, weights=weights)
    center, scale = p + z**2 / (2 * count), 1 + z**2 / count
    spread = z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    error = z * np.std(margins, ddof=1) / math.sqrt(count) if count > 1 else math.inf
    return (
        Interval(float(p), float((center - spread) / scale), float((center + spread) / scale)),
        Interval(float(mean), float(mean - error), float(mean + error)),
    )
