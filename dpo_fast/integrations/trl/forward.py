"""`model(input_ids=…, attention_mask=…, labels=…, fused_lm_head=True)` on padded pairs, answered from a packed forward.

This is what TRL's trainer asks of its models, and what subclasses with a loss of their own ask. The accelerated trainer
itself hands `model(packed=…)` a batch that was packed on the host; here the rows lie on the device already, and to find
the pairs in them costs one transfer to the host.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from dpo_fast.integrations.trl.batches import CannotPackError, Packing

# What the packed forward answers, by TRL's names: log_sum_sq_probs is none of it.
_STATISTICS = {"entropy": "entropy", "mean_logits": "mean_logit", "is_top1": "is_top1"}
_OTHER_ARGUMENTS = {"use_cache", "output_router_logits"}


def answer_padded_rows(model: PreTrainedModel, packing: Packing, outputs: Collection[str]) -> None:
    """Extends `model.forward`, which has TRL's fused head and the packed forward, in place.

    Args:
        packing: how pairs are packed, whole completions.
        outputs: what TRL's fused head was made to return. With `log_sum_sq_probs` among it nothing changes.
    """
    original = model.forward
    if not set(outputs) <= {"log_probs", *_STATISTICS}:
        return

    @functools.wraps(original)
    def forward(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any):
        if not fused_lm_head:
            return original(*args, **kwargs)
        try:
            rows = _rows_of(args, kwargs)
            packed = packing(rows)
        except CannotPackError:
            return original(*args, fused_lm_head=True, **kwargs)
        found = original(
            packed=packed.to(kwargs["input_ids"].device, non_blocking=True),
            statistics=[ours for theirs, ours in _STATISTICS.items() if theirs in outputs],
            aux_loss=bool(kwargs.get("output_router_logits")),
        )
        scored = rows["completion_mask"][:, 1:].bool().numpy()
        places = torch.from_numpy(_places(scored)).to(found.token_logps.device, non_blocking=True)

        def padded(values: Tensor | None) -> Tensor | None:  # [N] → [2B, S − 1]
            if values is None:
                return None
            return values.new_zeros(scored.size).index_copy(0, places, values).view(scored.shape)

        return FusedCausalLMOutput(
            log_probs=padded(found.token_logps),
            **{theirs: padded(getattr(found, ours)) for theirs, ours in _STATISTICS.items()},
            label_mask=kwargs["labels"][:, 1:] != -100,
            aux_loss=found.aux_loss,
        )

    model.forward = types.MethodType(forward, model)


def _rows_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """A batch as TRL's collator makes it, on the host, from the arguments of a forward."""
    given = {name: value for name, value in kwargs.items() if value is not None and name not in _OTHER_ARGUMENTS}
    if args or set(given) != {"input_ids", "attention_mask", "labels"}:
        raise CannotPackError("the forward is called with other arguments")
    rows = {"completion_mask": (given["labels"] != -100).long(), **given}
    return {name: rows[name].cpu() for name in ("input_ids", "attention_mask", "completion_mask")}


def _places(
    scored: np.ndarray,  # bool [2B, S − 1]
) -> np.ndarray:  # int64 [N]
    """Where each score row of a packed batch belongs among the flattened padded positions."""
    half, width = len(scored) // 2, scored.shape[1]
    order = np.arange(2 * half).reshape(2, half).T.reshape(-1)  # chosen and rejected in turn
    rows, columns = np.nonzero(scored[order])
    return order[rows] * width + columns
