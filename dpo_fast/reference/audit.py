"""The audit of a reference store: does it still say what the reference says?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpo_fast.groups import Layout, PackedBatch, PreferenceGroup, pack
from dpo_fast.reference.compute import Score, group_keys
from dpo_fast.reference.store import ReferenceStore, key_array


def audit(groups: Sequence[PreferenceGroup], store: ReferenceStore, score: Score, *, layout: Layout) -> None:
    """Recomputes log-probs that the store has with the live reference, and compares.

    What rounding may do is measured: the groups run together and each alone, and the store may be off by four times
    the largest difference of these two, plus 1e-4 nat and 2e-6 of the log-prob.

    Raises:
        ValueError: the store's numbers are not the reference's.
    """
    groups = [replace(group, comparisons=(), comparison_weights=(), ref_logps=None) for group in groups]
    if not groups:
        return
    together, alone = (
        torch.cat([_sums(score(packed), packed) for packed in packs])
        for packs in ([pack(groups, layout)], [pack([group], layout) for group in groups])
    )
    stored = torch.from_numpy(store.lookup(key_array([key for group in groups for key in group_keys(group)]))[1])
    allowed = 4 * (together - alone).abs().max() + 1e-4 + 2e-6 * together.abs()
    error = torch.minimum((stored - together).abs(), (stored - alone).abs())
    worst = int((error / allowed).nan_to_num(torch.inf).argmax())
    if not error[worst] <= allowed[worst]:
        raise ValueError(
            f"reference_cache_dir: {store.folder} holds a reference log-prob of {stored[worst]:.6f} nat where the "
            f"reference gives {together[worst]:.6f} now, further off than the {allowed[worst]:.1g} that rounding "
            "explains. Likely another version of PyTorch or of a kernel, another device or TF32 setting computed it; "
            "`dpo-fast cache --verify` shows whether files are damaged. Remove the folder to compute it anew"
        )


def _sums(logps: Tensor, packed: PackedBatch) -> Tensor:
    offsets = packed.score_layout.host_cu_scores
    return torch.segment_reduce(logps.double().cpu(), "sum", offsets=offsets).float()
