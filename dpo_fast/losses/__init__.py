"""Preference losses of comparisons, and the training objective that adds them up."""

from collections.abc import Collection

from dpo_fast.losses.catalogue import (
    LOSSES,
    Comparisons,
    FDivergence,
    Loss,
    LossParameters,
    LossUses,
    dpo_loss,
    loss,
    losses_using,
    named_loss,
    preference_loss,
    uses,
)
from dpo_fast.losses.functions import divergence_score

# Views of the catalogue.
SORTED = losses_using("sorting")
COUPLED = losses_using("step")
REFERENCE_FREE = tuple(name for name in LOSSES if not uses(name, "reference"))
WITH_OFFSETS = losses_using("offsets")
WITH_LENGTHS = losses_using("lengths")
SMOOTHED = losses_using("label_smoothing")

__all__ = [
    "COUPLED",
    "LOSSES",
    "REFERENCE_FREE",
    "SMOOTHED",
    "SORTED",
    "WITH_LENGTHS",
    "WITH_OFFSETS",
    "Comparisons",
    "FDivergence",
    "Loss",
    "LossParameters",
    "LossUses",
    "divergence_score",
    "dpo_loss",
    "loss",
    "losses_using",
    "named_loss",
    "preference_loss",
    "uses",
]


def heeds(name: str, those: Collection[str]) -> bool:
    """Return whether a loss is one of `those`, a view above; a function of your own is taken to be. See `uses`."""
    return name in those or not hasattr(LOSSES[name], "uses")


def __getattr__(name: str) -> Loss:
    if name == "score":  # the earlier name of divergence_score
        return divergence_score
    if name in LOSSES:
        return LOSSES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
