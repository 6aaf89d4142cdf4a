"""TRL's DPO trainer, accelerated: change `from trl import DPOTrainer` to `from dpo_fast.integrations.trl import
DPOTrainer`, or call `patch_trl()` and change nothing.

Arguments, data preparation, losses, metrics, callbacks, logs and checkpoints stay TRL's. Replaced are

    the forward          padded rows are packed, a pair runs its prompt once, the head makes its gradients at once
    the reference cache  `precompute_ref_log_probs=True` takes log-probs from the store that dpo_fast keeps on disk
    host syncs           metrics stay on the device until they are logged

What cannot be packed (images, prompt-learning adapters, …) runs TRL's own path, and a warning says so once.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from dpo_fast.errors import InputError

__all__ = ["DPOTrainer", "check_trl_version", "patch_trl", "unpatch_trl"]

TESTED_VERSIONS = "==1.16.*"


def check_trl_version() -> None:
    """Raises a ValueError when the TRL that is installed is none that this was tested with; ImportError without one."""
    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise ImportError('dpo_fast.integrations.trl needs TRL: pip install "dpo-fast[trl]"') from error
    if not SpecifierSet(TESTED_VERSIONS).contains(found, prereleases=True):
        raise InputError(
            f"trl: version {found} is installed, and dpo_fast accelerates trl{TESTED_VERSIONS}: it replaces parts of "
            f'the trainer that other versions have differently; pip install "trl{TESTED_VERSIONS}", or train with '
            "dpo_fast.DPOTrainer, which needs no TRL"
        )


check_trl_version()  # before anything is taken from inside TRL

from trl.trainer import dpo_trainer, utils  # noqa: E402

from dpo_fast.integrations.trl.kernel import STOCK_KERNEL, LinearLogProbs  # noqa: E402
from dpo_fast.integrations.trl.trainer import ADDED, STOCK, DPOTrainer  # noqa: E402


def patch_trl() -> None:
    """Makes TRL's own `DPOTrainer` this one, wherever it was imported to, and gives TRL's other trainers the head.

    A trainer that exists already goes on as it was made, with the new head. Repeating it is harmless.

    Raises:
        ValueError: the version of TRL is none that this was tested with.
    """
    check_trl_version()
    for name in (*STOCK, *ADDED):
        setattr(dpo_trainer.DPOTrainer, name, vars(DPOTrainer)[name])
    utils._ChunkedLogProbFunction = LinearLogProbs


def unpatch_trl() -> None:
    """Takes `patch_trl` back: make new trainers then, those of TRL's class that were made in between are of no use.

    Repeating it is harmless.
    """
    for name, method in STOCK.items():
        setattr(dpo_trainer.DPOTrainer, name, method)
    for name in ADDED:
        if name in vars(dpo_trainer.DPOTrainer):
            delattr(dpo_trainer.DPOTrainer, name)
    utils._ChunkedLogProbFunction = STOCK_KERNEL
