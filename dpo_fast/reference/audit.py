"""The audit of a reference store: does it still say what the reference says?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpo_fast.batches.groups import Layout, PreferenceGroup
from dpo_fast.batches.packing import PackedBatch, pack
from dpo_fast.errors import InputError
from dpo_fast.reference.compute import RunReference
from dpo_fast.reference.store.keys import group_keys, key_array
from dpo_fast.reference.store.store import ReferenceStore

TOKENS = 512  # that are run again, but at least one group


def audit(
    groups: Sequence[PreferenceGroup], store: ReferenceStore, score: RunReference, *, layout: Layout, dtype: torch.dtype
) -> None:
    """Recomputes log-probs that the store has with the live reference, and compares.

    The smallest of `groups` run again, in other company than before. Rounding may move a log-prob by 1e-4 nat, 2e-6 of
    itself, and four of the dtype's steps (0.03 nat in bf16) for each token, adding up as errors of either sign do.
    Where that does not explain a difference, the groups run once more in another batch, and four times the largest
    difference of these two runs is what rounding may do on top.

    Raises:
        ValueError: the store's numbers are not the reference's.
    """
    groups = _few([replace(group, comparisons=(), comparison_weights=(), ref_logps=None) for group in groups], layout)
    if not groups:
        return
    stored = torch.from_numpy(store.lookup(key_array([key for group in groups for key in group_keys(group)]))[1])
    found = _sums(score, pack(groups, layout))
    tokens = torch.tensor([len(ids) for group in groups for ids in group.completion_ids])
    allowed = 1e-4 + 2e-6 * found.abs() + 4 * torch.finfo(dtype).eps * tokens.sqrt()
    if ((stored - found).abs() <= allowed).all():
        return
    twice = _sums(score, pack([*groups, *groups], layout))[: len(found)]
    allowed = allowed + 4 * (twice - found).abs().max()
    error = torch.minimum((stored - found).abs(), (stored - twice).abs())
    worst = int((error / allowed).nan_to_num(torch.inf).argmax())
    if not error[worst] <= allowed[worst]:
        raise InputError(
            f"reference_cache_dir: {store.folder} holds a reference log-prob of {stored[worst]:.6f} nat where the "
            f"reference gives {found[worst]:.6f} now, further off than the {allowed[worst]:.1g} that rounding "
            "explains. Likely another version of PyTorch or of a kernel, another device or TF32 setting computed it; "
            "`dpo-fast cache --verify` shows whether files are damaged. Remove the folder to compute it anew"
        )


def _few(groups: Sequence[PreferenceGroup], layout: Layout) -> list[PreferenceGroup]:
    """The smallest groups, as many as fit into the tokens that an audit may run."""
    few, tokens = [], 0
    for group in sorted(groups, key=lambda group: group.num_tokens(layout)):
        tokens += group.num_tokens(layout)
        if few and tokens > TOKENS:
            break
        few.append(group)
    return few


def _sums(score: RunReference, packed: PackedBatch) -> Tensor:
    """Log-probs of the completions, fp32 [S], on the host."""
    offsets = packed.score_layout.host_cu_scores
    return torch.segment_reduce(score(packed).double().cpu(), "sum", offsets=offsets).float()
