"""Groups laid out for one forward pass, in one of two layouts that share everything after the body.

    shared   one row without padding, `[prompt | completion 1 | … | completion K | next prompt | …]`
    padded   the usual rows `[prompt | completion | padding]`, one per completion; works for every architecture

Shapes: T packed tokens, N score rows, S completions, C comparisons. Built on the host with NumPy, moved to a device
once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from dpo_fast.batches.completion_pieces import Pieces, by_completion, split_completions
from dpo_fast.batches.groups import Layout, PreferenceGroup
from dpo_fast.errors import InputError
from dpo_fast_kernels import GatherPlan, PrefixLayout, ScoreLayout


@dataclass
class PackedBatch:
    """Groups laid out for one forward pass.

    Attributes:
        input_ids, position_ids: int64 [1, T] (shared) or [S, L] (padded). Positions restart after the prompt; padding
            has that of the row's last token.
        prefix: segments for shared-prefix attention (shared), else None.
        attention_mask: int64 [S, L], 1 on tokens (padded), else None.
        score_rows: which hidden rows, of the flattened [T, H], predict a completion token: N score rows.
        targets: int64 [N], the token each score row predicts.
        score_layout: where the score rows of pieces and groups begin and end; a completion is one piece unless split.
        completion_pieces: int64 [S, J], which pieces a completion consists of, filled up with P, the number of pieces;
            None where every completion is one.
        full_pieces: int64 [C, 2], how many leading pieces of winner and loser lie within the shorter one's length;
            None where every completion is one piece.
        completion_lengths: int64 [S], completion tokens (without context), the n of length-normalised losses.
        completion_groups: int64 [S], the index of the group that each completion belongs to.
        completion_scores: fp32 [S], NaN in groups without scores, or None where no group has any.
        comparisons: int64 [C, 2], (winner, loser) as indices of completions.
        comparison_weights: fp32 [C].
        comparison_offsets: fp32 [C], 0 in groups without offsets, or None where no group has any.
        ref_logps: fp32 [S], or [S, J] by piece with zeros behind the last, or None.
        num_tokens: token positions that hold a token.
        longest: tokens of the longest sequence, a prompt with one completion.
    """

    input_ids: Tensor
    position_ids: Tensor
    prefix: PrefixLayout | None
    attention_mask: Tensor | None
    score_rows: GatherPlan
    targets: Tensor
    score_layout: ScoreLayout
    completion_pieces: Tensor | None
    full_pieces: Tensor | None
    completion_lengths: Tensor
    completion_groups: Tensor
    completion_scores: Tensor | None
    comparisons: Tensor
    comparison_weights: Tensor
    comparison_offsets: Tensor | None
    ref_logps: Tensor | None
    num_tokens: int
    longest: int = 0

    # Earlier names of three attributes.
    scores = property(lambda self: self.score_rows)
    pieces = property(lambda self: self.completion_pieces)
    cuts = property(lambda self: self.full_pieces)

    @property
    def cu_scores(self) -> Tensor:
        """int64 [P + 1], where the score rows of each piece begin and end."""
        return self.score_layout.cu_scores

    def completion_sums(
        self,
        sums: Tensor,  # [P]
    ) -> Tensor:  # [S]
        """Adds what was summed over pieces up to completions."""
        return sums if self.completion_pieces is None else by_completion(sums, self.completion_pieces).sum(dim=1)

    @property
    def totals(self) -> Tensor:
        """fp32 [2], what a step divides by: the comparisons' weights, and weight × scored tokens of the winner."""
        winner_tokens = self.completion_sums(self.cu_scores.diff())[self.comparisons[:, 0]]
        return torch.stack([self.comparison_weights.sum(), (self.comparison_weights * winner_tokens).sum()])

    @property
    def offsets(self) -> Tensor:
        """fp32 [C], `comparison_offsets`, 0 where the data have none."""
        known = self.comparison_offsets
        return torch.zeros_like(self.comparison_weights) if known is None else known

    def to(self, *args, **kwargs) -> PackedBatch:
        """Moves every tensor, once; `non_blocking=True` overlaps it with the computation."""
        return self._map(lambda value: value.to(*args, **kwargs))

    def pin_memory(self) -> PackedBatch:
        return self._map(lambda value: value.pin_memory())

    def _map(self, move) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return PackedBatch(**{k: move(v) if hasattr(v, "pin_memory") else v for k, v in values.items()})


def pack(
    groups: Sequence[PreferenceGroup],
    layout: Layout = "shared",
    pad_token_id: int = 0,
    split_for_ld_dpo: bool = False,
    *,
    cut: bool = False,
) -> PackedBatch:
    """Lays `groups` out for one forward pass.

    Args:
        groups: at least one; either all or none carry `ref_logps`.
        layout: `shared` or `padded`, see the module's docstring.
        pad_token_id: token that fills the rows of the padded layout.
        split_for_ld_dpo: whether to split completions where others that they are compared with end. Reference log-probs
            are then taken from `ref_token_logps`.
        cut: earlier name of `split_for_ld_dpo`.

    Raises:
        ValueError: no groups, reference log-probs on some groups only, or a field of the wrong length.
    """
    if not groups:
        raise InputError("groups is empty: pack() needs at least one preference group")
    split_for_ld_dpo |= cut
    reference = "ref_token_logps" if split_for_ld_dpo else "ref_logps"
    if len({getattr(group, reference) is not None for group in groups}) != 1:
        raise InputError(f"groups: {reference} is given on some groups and missing on others; give it on all or none")

    if layout not in get_args(Layout):
        raise InputError(f"layout={layout!r} is not known; choose from {list(get_args(Layout))}")
    counts = [len(group.completion_ids) for group in groups]
    for number, (group, count) in enumerate(zip(groups, counts, strict=True)):
        if any(not 0 <= index < count for pair in group.comparisons for index in pair):
            raise InputError(
                f"groups: comparisons {group.comparisons} of group {number} must be indices of its {count} completions"
            )
        if any(winner == loser for winner, loser in group.comparisons):
            raise InputError(f"groups: comparisons {group.comparisons} of group {number} compare one with itself")
        if len(group.comparison_weights) != len(group.comparisons):
            raise InputError(
                f"groups: group {number} has {len(group.comparison_weights)} comparison_weights for "
                f"{len(group.comparisons)} comparisons; give one for each"
            )
    body, rows, targets = _shared_body(groups) if layout == "shared" else _padded_body(groups, pad_token_id)
    first = np.cumsum([0] + counts[:-1])
    comparisons = np.concatenate(
        [
            np.asarray(group.comparisons, np.int64).reshape(-1, 2) + start
            for group, start in zip(groups, first, strict=True)
        ]
    )
    weights = np.concatenate([np.asarray(group.comparison_weights, np.float32) for group in groups])
    lengths = [
        len(ids) - context
        for group in groups
        for ids, context in zip(group.completion_ids, group.contexts, strict=True)
    ]
    scored = iter(map(len, rows))
    scored_lengths = [[next(scored) for _ in group.completion_ids] for group in groups]
    pieces = split_completions(scored_lengths, [group.comparisons for group in groups]) if split_for_ld_dpo else None
    score_layout = ScoreLayout.build(scored_lengths if pieces is None else pieces.lengths)
    return PackedBatch(
        **body,
        score_rows=GatherPlan.build(np.concatenate(rows)),
        targets=torch.from_numpy(np.concatenate(targets)),
        score_layout=score_layout,
        completion_pieces=None if pieces is None else pieces.index,
        full_pieces=None if pieces is None else pieces.full_pieces,
        completion_lengths=torch.tensor(lengths, dtype=torch.int64),
        completion_groups=torch.arange(len(groups)).repeat_interleave(torch.tensor(counts)),
        completion_scores=_joined(groups, "completion_scores", counts, missing=math.nan),
        comparisons=torch.from_numpy(comparisons),
        comparison_weights=torch.from_numpy(weights),
        comparison_offsets=_joined(
            groups, "comparison_offsets", [len(group.comparisons) for group in groups], missing=0.0
        ),
        ref_logps=_joined(groups, "ref_logps", counts, missing=math.nan)
        if pieces is None
        else _ref_piece_logps(groups, score_layout, pieces),
    )


def _ref_piece_logps(groups: Sequence[PreferenceGroup], layout: ScoreLayout, pieces: Pieces) -> Tensor | None:
    """Sums of the reference's token log-probs over pieces, fp32 [S, J]; None where no group has them."""
    if groups[0].ref_token_logps is None:
        return None
    tokens = [np.asarray(logps, np.float64) for group in groups for logps in group.ref_token_logps]
    tokens = np.concatenate(tokens)
    if len(tokens) != layout.num_rows:
        raise InputError(f"groups: ref_token_logps hold {len(tokens)} numbers for {layout.num_rows} scored tokens")
    sums = np.add.reduceat(tokens, layout.host_cu_scores[:-1].numpy())
    return by_completion(torch.from_numpy(sums).float(), pieces.index)


def _joined(groups: Sequence[PreferenceGroup], field: str, counts: Sequence[int], missing: float) -> Tensor | None:
    """A field of all groups as one fp32 vector, `missing` in groups without it; None where no group has it."""
    values = [getattr(group, field) for group in groups]
    if all(part is None for part in values):
        return None
    for part, count in zip(values, counts, strict=True):
        if part is not None and len(part) != count:
            raise InputError(f"groups: {field} of a group holds {len(part)} numbers where {count} are needed")
    parts = [[missing] * count if part is None else part for part, count in zip(values, counts, strict=True)]
    return torch.from_numpy(np.concatenate([np.asarray(part, np.float32) for part in parts]))


Body = tuple[dict[str, Any], list[np.ndarray], list[np.ndarray]]  # fields of the batch; score rows, their targets


def _shared_body(groups: Sequence[PreferenceGroup]) -> Body:
    ids, positions, rows, targets = [], [], [], []
    start = 0
    for group in groups:
        prompt_length = len(group.prompt_ids)
        ids.append(np.asarray(group.prompt_ids, np.int64))
        positions.append(np.arange(prompt_length))
        last_prompt_row = start + prompt_length - 1
        start += prompt_length
        for completion, context in zip(group.completion_ids, group.contexts, strict=True):
            completion = np.asarray(completion, np.int64)
            first = _first_scored(prompt_length, context)
            predicting = np.arange(start + first - 1, start + len(completion) - 1)
            if first == 0:
                predicting[:1] = last_prompt_row
            ids.append(completion)
            positions.append(np.arange(prompt_length, prompt_length + len(completion)))
            rows.append(predicting)
            targets.append(completion[first:])
            start += len(completion)
    lengths = [(len(group.prompt_ids), *map(len, group.completion_ids)) for group in groups]
    body = {
        "input_ids": torch.from_numpy(np.concatenate(ids))[None],
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        "prefix": PrefixLayout.build(lengths),
        "attention_mask": None,
        "num_tokens": start,
        "longest": max(prompt + max(completions) for prompt, *completions in lengths),
    }
    return body, rows, targets


def _padded_body(groups: Sequence[PreferenceGroup], pad_token_id: int) -> Body:
    sequences = [
        (len(group.prompt_ids), context, np.asarray([*group.prompt_ids, *completion], np.int64))
        for group in groups
        for completion, context in zip(group.completion_ids, group.contexts, strict=True)
    ]
    width = max(len(ids) for _, _, ids in sequences)
    input_ids = np.full((len(sequences), width), pad_token_id, np.int64)
    positions = np.broadcast_to(np.arange(width), input_ids.shape).copy()
    mask = np.zeros_like(input_ids)
    rows, targets = [], []
    for row, (prompt_length, context, ids) in enumerate(sequences):
        input_ids[row, : len(ids)] = ids
        positions[row, len(ids) :] = len(ids) - 1
        mask[row, : len(ids)] = 1
        first = prompt_length + _first_scored(prompt_length, context)
        rows.append(np.arange(first - 1, len(ids) - 1) + row * width)
        targets.append(ids[first:])
    body = {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(positions),
        "prefix": None,
        "attention_mask": torch.from_numpy(mask),
        "num_tokens": int(mask.sum()),
        "longest": width,
    }
    return body, rows, targets


def _first_scored(prompt_length: int, context: int) -> int:
    """Index of a completion's first scored token: nothing predicts the very first token of a sequence."""
    return max(context, 0 if prompt_length else 1)


def empty_pack(
    layout: Layout, pad_token_id: int = 0, split_for_ld_dpo: bool = False, groups: int = 1, length: int = 1
) -> PackedBatch:
    """A pack that runs through the whole model and adds nothing: groups of `length` tokens after as many, in no
    comparison."""
    ids, logps = [pad_token_id] * length, [0.0] * length
    group = PreferenceGroup(ids, [ids], (), (), ref_logps=[0.0], ref_token_logps=[logps])
    return dataclasses.replace(pack([group] * groups, layout, pad_token_id, split_for_ld_dpo), num_tokens=0)
