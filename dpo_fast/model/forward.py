"""Packed batch → sequence log-probs or a preference loss, inside `model.forward`.

The forward of the causal language model itself is extended, `model(packed=batch)`, and that of its head too, so that
every wrapper around them (PEFT, autocast, DDP, FSDP, DeepSpeed) does its work as for any other forward: parameters are
gathered, gradients are hooked.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from dpo_fast.batches.groups import Layout
from dpo_fast.batches.packing import PackedBatch
from dpo_fast.model.attention import ATTENTION_NAME, packed_arguments, use_shared_prefix
from dpo_fast.model.head import head_of
from dpo_fast_kernels import SequenceLoss, gather_rows, linear_logps, linear_preference_loss

logger = logging.getLogger(__name__)


@dataclass
class PackedOutput(ModelOutput):
    """What a packed forward returns; S completions, N score rows.

    Attributes:
        loss: scalar, when a loss was given; the only output with a gradient then, beside aux_loss.
        logps: fp32 [S], log-prob of each completion in nats; differentiable when no loss was given.
        token_logps: fp32 [N], likewise.
        entropy, mean_logit: fp32 [N], without gradient, when these statistics were asked for.
        is_top1: bool [N], whether the target is the most likely token, likewise.
        aux_loss: scalar, the load-balancing loss of a mixture of experts, when it was asked for.
    """

    loss: Tensor | None = None
    logps: Tensor | None = None
    token_logps: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    aux_loss: Tensor | None = None


def add_dpo_forward(model: PreTrainedModel) -> None:
    """Extends `model.forward` in place: `model(packed=PackedBatch, …)` returns a `PackedOutput`. It also takes

        statistics: names of `dpo_fast_kernels.head.linear_logps`, to be returned;
        aux_loss: whether to return the load-balancing loss of a mixture of experts;
        loss, loss_inputs: a loss of sequence log-probs, as in `dpo_fast_kernels.linear_preference_loss`. The head then
            makes its gradients in the forward, for a quarter less work than a loss of `logps` takes.

    Any other call is the original forward, so generation is unchanged. Call it on the causal language model before
    PEFT or an engine wraps it, and `attention.use_shared_prefix(model)` beside it for the shared layout. Repeating it
    is harmless.
    """
    if getattr(model.forward, "is_dpo_forward", False):
        return
    original = model.forward

    @functools.wraps(original)
    def forward(
        self,
        *args,
        packed: PackedBatch | None = None,
        statistics: Collection[str] = (),
        aux_loss: bool = False,
        loss: SequenceLoss | None = None,
        loss_inputs: Sequence[Tensor] = (),
        **kwargs,
    ):
        if packed is None:
            return original(*args, **kwargs)
        _check_packed(self, packed)
        return _packed_forward(self, packed, statistics, aux_loss, loss, loss_inputs)

    forward.is_dpo_forward = True
    model.forward = types.MethodType(forward, model)
    if (head := model.get_output_embeddings()) is not None:
        _let_score(head)


def _let_score(head: nn.Module) -> None:
    """Extends the head's forward: `head(hidden, compute=function)` is `function(hidden)`, with the weight at hand.

    FSDP2 and ZeRO-3 gather a module's parameters when it is called.
    """
    original = head.forward

    @functools.wraps(original)
    def forward(self, hidden: Tensor, compute: Callable[[Tensor], Any] | None = None):
        return original(hidden) if compute is None else compute(hidden)

    head.forward = types.MethodType(forward, head)


def _check_packed(model: PreTrainedModel, packed: PackedBatch) -> None:
    """Refuse what would give wrong log-probs.

    Raises:
        ValueError: no packed batch, or a shared prompt for a model whose attention would mix completions.
    """
    if not isinstance(packed, PackedBatch):
        raise ValueError(f"packed is a {type(packed).__name__}; give what dpo_fast.pack returns, a PackedBatch")
    configs = (model.config, model.config.get_text_config())
    if packed.prefix is not None and not any(config._attn_implementation == ATTENTION_NAME for config in configs):
        raise ValueError(
            f"packed has the shared layout, and {type(model).__name__} attends by "
            f"{model.config._attn_implementation!r}, which would mix its completions; call use_shared_prefix(model) "
            "first, or pack(groups, layout='padded')"
        )


def _packed_forward(
    model: PreTrainedModel,
    packed: PackedBatch,
    statistics: Collection[str],
    aux_loss: bool,
    loss: SequenceLoss | None,
    loss_inputs: Sequence[Tensor],
) -> PackedOutput:
    body = model.base_model(
        **_body_arguments(packed), use_cache=False, **({"output_router_logits": True} if aux_loss else {})
    )
    hidden = body.last_hidden_state
    hidden = gather_rows(hidden.reshape(-1, hidden.shape[-1]), packed.score_rows)
    compute = functools.partial(_scored, model, packed, statistics, loss, loss_inputs)
    output = PackedOutput(**model.get_output_embeddings()(hidden, compute=compute))
    if aux_loss:
        output.aux_loss = _load_balancing_loss(model, body.router_logits, packed)
    return output


def _scored(
    model: PreTrainedModel,
    packed: PackedBatch,
    statistics: Collection[str],
    loss: SequenceLoss | None,
    loss_inputs: Sequence[Tensor],
    hidden: Tensor,  # [N, H]
) -> dict[str, Tensor | None]:
    """The fields of `PackedOutput` that come out of the head, whose parameters are at hand."""
    head = head_of(model)
    options = {"transform": head.transform, "statistics": statistics, "shards": head.shards}
    if loss is None:
        value = None
        rows = linear_logps(hidden, head.weight, packed.targets, head.bias, cu_scores=packed.cu_scores, **options)
    else:
        value, rows = linear_preference_loss(
            hidden, head.weight, packed.targets, packed.score_layout, loss, loss_inputs, head.bias, **options
        )
    statistics_of_rows = {name: getattr(rows, name) for name in ("entropy", "mean_logit", "is_top1")}
    return {"loss": value, "logps": rows.sequence_logps, "token_logps": rows.logps, **statistics_of_rows}


def _body_arguments(packed: PackedBatch) -> dict[str, Any]:
    if packed.prefix is not None:
        return packed_arguments(packed.input_ids, packed.position_ids, packed.prefix)
    return {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "attention_mask": packed.attention_mask,
    }


def _load_balancing_loss(model: PreTrainedModel, router_logits: tuple[Tensor, ...], packed: PackedBatch) -> Tensor:
    """Mixture-of-experts auxiliary loss over the sequences as if each completion had its own copy of the prompt."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    if packed.prefix is None:
        return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, packed.attention_mask)
    router_logits = tuple(gather_rows(logits, packed.prefix.keys) for logits in router_logits)
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok)


def prepare_forward(base: PreTrainedModel, layout: str) -> Layout:
    """Extends the model's forward and settles its layout; `auto` says once why it took `padded`."""
    add_dpo_forward(base)
    if layout == "padded":
        return "padded"
    try:
        use_shared_prefix(base)
    except ValueError as error:
        if layout == "shared":
            raise
        logger.warning("layout='auto' takes 'padded' for this model. %s", error)
        return "padded"
    return "shared"
