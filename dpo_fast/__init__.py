"""dpo_fast: train language models with Direct Preference Optimization, fast.

Names are imported when they are first used, so that importing this package loads neither Triton nor transformers.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo_fast.batches.collator import DPOCollator
    from dpo_fast.batches.groups import PreferenceGroup
    from dpo_fast.batches.packing import PackedBatch, pack
    from dpo_fast.config import DPOConfig
    from dpo_fast.data.loading import load_preference_dataset
    from dpo_fast.data.prepare import prepare_dataset
    from dpo_fast.errors import InputError, TrainingDiverged
    from dpo_fast.integrations.liger import FusedLinearDPOLoss
    from dpo_fast.integrations.trl import patch_trl, unpatch_trl
    from dpo_fast.losses import LOSSES, Comparisons, LossParameters, dpo_loss, preference_loss
    from dpo_fast.losses.objective import Objective
    from dpo_fast.model.agreement import use_shared_prefix
    from dpo_fast.model.dropout import disable_dropout
    from dpo_fast.model.forward import PackedOutput, add_dpo_forward
    from dpo_fast.reference.reference import Reference
    from dpo_fast.scoring import implicit_rewards
    from dpo_fast.trainer import DPOTrainer
    from dpo_fast_kernels import SequenceLoss

_MODULES = {
    "batches.collator": ("DPOCollator",),
    "batches.groups": ("PreferenceGroup",),
    "batches.packing": ("PackedBatch", "pack"),
    "config": ("DPOConfig",),
    "data.loading": ("load_preference_dataset",),
    "data.prepare": ("prepare_dataset",),
    "errors": ("InputError", "TrainingDiverged"),
    "integrations.liger": ("FusedLinearDPOLoss",),
    "integrations.trl": ("patch_trl", "unpatch_trl"),
    "losses": ("LOSSES", "Comparisons", "LossParameters", "dpo_loss", "preference_loss"),
    "losses.objective": ("Objective",),
    "model.agreement": ("use_shared_prefix",),
    "model.forward": ("PackedOutput", "add_dpo_forward"),
    "model.dropout": ("disable_dropout",),
    "reference.reference": ("Reference",),
    "scoring": ("implicit_rewards",),
    "trainer": ("DPOTrainer",),
}
_HOMES = {name: f"dpo_fast.{module}" for module, names in _MODULES.items() for name in names}
_HOMES["SequenceLoss"] = "dpo_fast_kernels"

__all__ = [
    "LOSSES",
    "Comparisons",
    "DPOCollator",
    "DPOConfig",
    "DPOTrainer",
    "FusedLinearDPOLoss",
    "InputError",
    "LossParameters",
    "Objective",
    "PackedBatch",
    "PackedOutput",
    "PreferenceGroup",
    "Reference",
    "SequenceLoss",
    "TrainingDiverged",
    "add_dpo_forward",
    "disable_dropout",
    "dpo_loss",
    "implicit_rewards",
    "load_preference_dataset",
    "pack",
    "patch_trl",
    "preference_loss",
    "prepare_dataset",
    "unpatch_trl",
    "use_shared_prefix",
]


def __getattr__(name: str):
    if name == "__version__":
        return version("dpo-fast")
    if name not in _HOMES:
        raise AttributeError(f"module 'dpo_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
