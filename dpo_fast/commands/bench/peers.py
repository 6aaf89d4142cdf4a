"""Obstacles that keep TRL from training the same steps on the same rows."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from datasets import Dataset

from dpo_fast.config import DPOConfig
from dpo_fast.losses import COUPLED

_RELEASE = "1.16"


def trl_obstacle(config: DPOConfig, groups: Dataset) -> str | None:
    """Return why TRL takes no part, as words after "because"; None when TRL can take part.

    Args:
        config: options of the run.
        groups: prepared groups to train on.
    """
    found = _installed_release()
    if found is None:
        return 'trl is not installed: pip install "dpo-fast[trl]"'
    if found != _RELEASE and not found.startswith(f"{_RELEASE}."):
        return f"release {found} is installed, and its trainer is known here as of {_RELEASE}"
    return _other_rows(groups) or _other_loss(config)


def _installed_release() -> str | None:
    try:
        return version("trl")
    except PackageNotFoundError:
        return None


def _other_rows(groups: Dataset) -> str | None:
    if "comparison_offsets" in groups.column_names:
        return "it knows no offsets"
    if any(weight != 1 for weights in groups["comparison_weights"] for weight in weights):
        return "it knows no weights of comparisons"
    if any(context for contexts in groups["context_lengths"] for context in contexts):
        return "truncation_mode=keep_end cuts completions of one prompt differently, and it gets whole prompts here"
    if len({len(comparisons) for comparisons in groups["comparisons"]}) > 1:
        return "groups have different numbers of comparisons, and its batches are of equally many pairs"
    return None


def _other_loss(config: DPOConfig) -> str | None:
    from dpo_fast.integrations.trl.objective import UNSMOOTHED  # which needs TRL

    losses = set(config.loss_mix)
    if config.rpo_alpha:
        return "it has no rpo_alpha"
    if config.label_smoothing and losses & set(UNSMOOTHED):
        return f"it ignores label_smoothing with loss_type={config.loss_type}"
    if losses & set(COUPLED) and config.couple == "step" and config.gradient_accumulation_steps > 1:
        return f"it couples the pairs of a micro-batch, and loss_type={config.loss_type} those of a step here"
    return None
