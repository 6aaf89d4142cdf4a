"""Packed batch → sequence log-probs or a preference loss, inside `model.forward`.

The forward of the causal language model itself is extended, `model(packed=batch)`, and that of its head too, so that
every wrapper around them (PEFT, autocast, DDP, FSDP, DeepSpeed) does its work as for any other forward: parameters are
gathered, gradients are hooked.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from dpo_fast.batches.packing import PackedBatch
from dpo_fast.errors import InputError
from dpo_fast.model.attention import ATTENTION_NAME, packed_arguments
from dpo_fast.model.frequencies import frequency_limit, own_frequencies
from dpo_fast.model.head import Head, HeadForm, linear_heads, read_head
from dpo_fast_kernels import (
    LogitTransform,
    RowLogps,
    SequenceLoss,
    gather_rows,
    linear_logps,
    linear_preference_loss,
    logps_of_logits,
)


@dataclass
class PackedOutput(ModelOutput):
    """What a packed forward returns; S completions, N score rows.

    Attributes:
        preference_loss: scalar, when a loss was given; the only output with a gradient then, beside aux_loss.
        logps: fp32 [S], log-prob of each completion in nats; differentiable when no loss was given.
        token_logps: fp32 [N], likewise.
        entropy, mean_logit: fp32 [N], without gradient, when these statistics were asked for.
        is_top1: bool [N], whether the target is the most likely token, likewise.
        aux_loss: scalar, the load-balancing loss of a mixture of experts, when it was asked for.
    """

    preference_loss: Tensor | None = None
    logps: Tensor | None = None
    token_logps: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    aux_loss: Tensor | None = None

    @property
    def loss(self) -> Tensor | None:
        """A copy of `preference_loss`: what a wrapper adds in place, as AdaLoRA does, would count once a pack."""
        return None if self.preference_loss is None else self.preference_loss.clone()

    @loss.setter
    def loss(self, value: Tensor) -> None:
        """Leave the loss as it is."""


@dataclass
class ModelState:
    """What a model has beside its weights once it takes packed batches; a deep copy of the model gets its own.

    Attributes:
        forward: the model's own forward.
        head_form: how logits come from hidden states; None where the model's own forward makes them.
        frequency_limit: tokens of a sequence up to which rotary frequencies do not depend on its length.
        late_check: what compares the packed forward with the model's own as soon as weights are at hand; else None.
        is_noisy: whether the embeddings have noise in training, whose size depends on the length of a row.
        row_lengths: int64 [S], tokens of the rows that run, where it is noisy.
    """

    forward: Callable[..., Any]
    head_form: HeadForm | None
    frequency_limit: float
    late_check: Callable[[PreTrainedModel], None] | None = None
    is_noisy: bool = False
    row_lengths: Tensor | None = None


def add_dpo_forward(model: PreTrainedModel) -> None:
    """Extends `model.forward` in place: `model(packed=PackedBatch, …)` returns a `PackedOutput`. It also takes

        statistics: names of `dpo_fast_kernels.head.linear_logps`, to be returned;
        aux_loss: whether to return the load-balancing loss of a mixture of experts;
        loss, loss_inputs: a loss of sequence log-probs, as in `dpo_fast_kernels.linear_preference_loss`. The head then
            makes its gradients in the forward, for a quarter less work than a loss of `logps` takes.

    Any other call is the original forward, so generation is unchanged. Call it on the causal language model, not on a
    wrapper of PEFT or of an engine, and `use_shared_prefix(model)` beside it for the shared layout. Repeating it is
    harmless.

    Raises:
        ValueError: the model has no LM head.
    """
    if model.get_output_embeddings() is None:
        raise InputError(f"model is a {type(model).__name__} without an LM head; load it with AutoModelForCausalLM")
    if "dpo_fast" in vars(model):
        return
    model.dpo_fast = ModelState(model.forward, read_head(model), frequency_limit(model))

    @functools.wraps(getattr(model.forward, "__func__", model.forward))
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
            return self.dpo_fast.forward(*args, **kwargs)
        return _packed_forward(self, packed, aux_loss, _Scoring(packed, statistics, loss, loss_inputs))

    model.forward = types.MethodType(forward, model)


def _packed_forward(model: PreTrainedModel, packed: PackedBatch, aux_loss: bool, score: _Scoring) -> PackedOutput:
    _check_packed(model, packed)
    if (check := model.dpo_fast.late_check) is not None:
        model.dpo_fast.late_check = None
        check(model)
    longer = packed.longest > model.dpo_fast.frequency_limit
    arguments = {"use_cache": False, "return_dict": True, **({"output_router_logits": True} if aux_loss else {})}
    arguments |= _inputs_of(packed, with_positions=longer)
    if model.dpo_fast.is_noisy and packed.attention_mask is not None:
        model.dpo_fast.row_lengths = packed.attention_mask.sum(dim=1)
    heads, form = linear_heads(model), model.dpo_fast.head_form
    with own_frequencies(model) if longer else contextlib.nullcontext():
        if form is None or not heads:
            body = model.dpo_fast.forward(**arguments)
            logits = gather_rows(body.logits.reshape(-1, body.logits.shape[-1]), packed.score_rows)
            return PackedOutput(**score.logits(logits), aux_loss=getattr(body, "aux_loss", None) if aux_loss else None)
        body = model.get_submodule(form.decoder)(**arguments)
    hidden = gather_rows(body.last_hidden_state.reshape(-1, body.last_hidden_state.shape[-1]), packed.score_rows)
    for head in heads:
        _let_score(head)
    compute = functools.partial(score.hidden, transform=form.transform)
    output = PackedOutput(**model.get_output_embeddings()(hidden, compute=compute))
    if aux_loss:
        output.aux_loss = _load_balancing_loss(model, body, packed)
    return output


def _check_packed(model: PreTrainedModel, packed: PackedBatch) -> None:
    """Refuse what would give wrong log-probs.

    Raises:
        ValueError: no packed batch, or a shared prompt for a model whose attention would mix completions.
    """
    if not isinstance(packed, PackedBatch):
        raise InputError(f"packed is a {type(packed).__name__}; give what dpo_fast.pack returns, a PackedBatch")
    if packed.prefix is None:
        return
    configs = (model.config, model.config.get_text_config())
    if not any(config._attn_implementation == ATTENTION_NAME for config in configs):
        raise InputError(
            f"packed has the shared layout, and {type(model).__name__} attends by "
            f"{model.config._attn_implementation!r}, which would mix its completions; call use_shared_prefix(model) "
            "first, or pack(groups, layout='padded')"
        )
    if packed.longest > (limit := model.dpo_fast.frequency_limit):
        raise InputError(
            f"packed has the shared layout and a sequence of {packed.longest} tokens, and the rotary frequencies of "
            f"{type(model).__name__} depend on a sequence's length beyond {limit}; pack(groups, layout='padded')"
        )


def _inputs_of(packed: PackedBatch, with_positions: bool) -> dict[str, Any]:
    """Return what the forward of a decoder, or of a whole model, takes to run on a packed batch.

    Padded rows come without positions, as a user gives them, unless their frequencies are to be their own.
    """
    if packed.prefix is not None:
        return packed_arguments(packed.input_ids, packed.position_ids, packed.prefix)
    positions = {"position_ids": packed.position_ids} if with_positions else {}
    return {"input_ids": packed.input_ids, "attention_mask": packed.attention_mask, **positions}


def _let_score(head: nn.Module) -> None:
    """Extend the head's forward: `head(hidden, compute=function)` is `function(head, hidden)`, with its weight at hand.

    FSDP2 and ZeRO-3 gather a module's parameters when it is called.
    """
    if "dpo_fast_forward" in vars(head):
        return
    head.dpo_fast_forward = head.forward

    @functools.wraps(getattr(head.forward, "__func__", head.forward))
    def forward(self, *args, compute: Callable[[nn.Module, Tensor], Any] | None = None, **kwargs):
        return self.dpo_fast_forward(*args, **kwargs) if compute is None else compute(self, *args)

    head.forward = types.MethodType(forward, head)


class _Scoring(NamedTuple):
    """The fields of `PackedOutput` that come out of the head."""

    packed: PackedBatch
    statistics: Collection[str]
    loss: SequenceLoss | None
    loss_inputs: Sequence[Tensor]

    def hidden(self, module: nn.Module, hidden: Tensor, transform: LogitTransform) -> dict[str, Tensor | None]:
        """Score hidden rows [N, H]; `module` is the head that runs, its parameters are at hand."""
        packed, head = self.packed, Head(module.weight, getattr(module, "bias", None), transform)
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(head.weight.dtype)  # as a model does whose layers end in fp32
        options = {"transform": transform, "statistics": self.statistics, "shards": head.shards}
        if self.loss is None:
            rows = linear_logps(hidden, head.weight, packed.targets, head.bias, cu_scores=packed.cu_scores, **options)
            return self._output(None, rows)
        return self._output(
            *linear_preference_loss(
                hidden, head.weight, packed.targets, packed.score_layout, self.loss, self.loss_inputs, head.bias,
                **options,
            )
        )  # fmt: skip

    def logits(self, logits: Tensor) -> dict[str, Tensor | None]:
        """Score rows of logits [N, V]."""
        packed, loss = self.packed, self.loss
        needed = [*self.statistics, *(() if loss is None else loss.statistics)]
        rows = logps_of_logits(logits, packed.targets, packed.cu_scores, statistics=needed)
        if loss is None:
            return self._output(None, rows)
        offsets = packed.cu_scores
        sums = (torch.segment_reduce(getattr(rows, name), "sum", offsets=offsets) for name in loss.statistics)
        value = loss(rows.sequence_logps, *sums, *self.loss_inputs)
        rows = rows._replace(logps=rows.logps.detach(), sequence_logps=rows.sequence_logps.detach())
        return self._output(value, rows)

    def _output(self, value: Tensor | None, rows: RowLogps) -> dict[str, Tensor | None]:
        statistics = {name: getattr(rows, name) for name in ("entropy", "mean_logit", "is_top1")}
        return {"preference_loss": value, "logps": rows.sequence_logps, "token_logps": rows.logps, **statistics}


def _load_balancing_loss(model: PreTrainedModel, body: ModelOutput, packed: PackedBatch) -> Tensor | None:
    """Return the auxiliary loss of a mixture of experts, as if each completion had its own copy of the prompt.

    The function is that of the model's own module. None where a model has none, or no router ran.
    """
    homes = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    function = next((found for home in homes if (found := getattr(home, "load_balancing_loss_func", None))), None)
    logits = tuple(layer for layer in getattr(body, "router_logits", None) or () if layer is not None)
    if function is None or not logits:
        return None
    config = model.config.get_text_config()
    experts = getattr(model, "num_experts", None) or getattr(config, "num_experts", None) or config.num_local_experts
    top_k = getattr(model, "num_experts_per_tok", None) or config.num_experts_per_tok
    if packed.prefix is None:
        return function(logits, experts, top_k, packed.attention_mask)
    gathered = (gather_rows(layer.reshape(-1, layer.shape[-1]), packed.prefix.keys) for layer in logits)
    return function(tuple(gathered), experts, top_k)
