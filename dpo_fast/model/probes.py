"""A few groups, and what a model says of them: every sequence alone, by the model itself, and packed.

The groups are short, and one reaches past a limit from which on the model treats tokens differently, where that takes
little time. All runs leave the model, its mode and the random numbers as they were.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dpo_fast.batches.groups import Layout, PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.model.adapters import base_of
from dpo_fast.model.attention import attending_by
from dpo_fast.model.engines import is_sharded, weights_in
from dpo_fast.model.frequencies import forget_lengths
from dpo_fast.model.loading import vocabulary_size

Context = Callable[[], contextlib.AbstractContextManager[object]]

FAR = 2**15  # tokens of the longest sequence, where nothing bounds it
_SHORT = (12, (9, 13)), (5, (4,))  # prompt and completions of the groups that always run
_BEYOND = (8, 11)  # completions of the group that reaches past a limit, after a prompt that does not quite
_FLOPS, _TOKENS = {"cpu": 3e10}, {"cpu": 1024}  # of such a group; elsewhere 1e13 and 4200, for attention takes T²
_LIMITS = ("window", "chunk_size", "index_topk", "original_max_position_embeddings")  # in names of settings


@dataclass(frozen=True)
class Found:
    """Log-probs fp32 [N] of all completions' tokens, gradients of their weighted sum, and the load-balancing loss."""

    logps: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)
    aux_loss: Tensor | None = None


class Bound(NamedTuple):
    """What rounding may do to numbers that are the same.

    Attributes:
        nats: to the log-prob of a token.
        relative: the same, as a share of it.
        gradient: to a gradient, as a share of it, and to the load-balancing loss.
        of_the_worst: whether every token keeps to it, or their root mean square.
    """

    nats: float
    relative: float
    gradient: float
    of_the_worst: bool = True

    def difference(self, found: Tensor, truth: Tensor) -> float | None:
        """Return the largest difference of log-probs in nats, or None where rounding explains it."""
        error = (found.to(truth.device) - truth).abs()
        excess = error - self.nats - self.relative * truth.abs()
        fine = (excess <= 0).all() if self.of_the_worst else error.square().mean().sqrt() <= self.nats
        return None if fine else float(error.max())


EXACT = Bound(1e-4, 1e-5, 1e-3)
ROUNDED = Bound(0.02, 5e-3, 1e-3)  # fp32, but for what a model rounds to the dtype of its weights
NATIVE = Bound(0.5, 0.0, 0.7, of_the_worst=False)  # where a token may go to another expert


class Probe:
    """Some groups, and what a model says of them.

    Args:
        model: with the packed forward, bare or in PEFT's wrapper.
        groups: what runs.
        arithmetic: makes the context of a forward.
        bound: what rounding may do in it.
        gradients: whether gradients are taken too.
        aux_loss: whether the load-balancing loss is asked for.
        run: runs the model; None for the model itself.

    Attributes:
        bound: as given.
        own_prompt_logits: [L, V], of the first prompt, once `truth` is known.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[PreferenceGroup],
        arithmetic: Context,
        *,
        bound: Bound,
        gradients: bool = False,
        aux_loss: bool = False,
        run: Callable[..., Any] | None = None,
    ):
        self.model, self.groups, self._aux_loss, self._run = model, groups, aux_loss, run or model
        self._arithmetic, self.bound = arithmetic, bound
        self._weights = _some_weights(model) if gradients and not is_sharded(model) else {}
        self.own_prompt_logits: Tensor | None = None  # of the first sequence

    @functools.cached_property
    def truth(self) -> Found:
        """What the model itself says, by its own attention, of every sequence alone."""
        with self._by_its_own_attention(), torch.set_grad_enabled(bool(self._weights)):
            logps = torch.cat([self._alone(group, ids) for group in self.groups for ids in group.completion_ids])
            return self._found(logps, self._own_aux_loss() if self._aux_loss else None)

    def logits(self, ids: Sequence[int]) -> Tensor:  # [L, V]
        """Return what the model says of one sequence."""
        forget_lengths(self.model)
        with self._arithmetic():
            return self._run(input_ids=self._tokens([ids]), use_cache=False, return_dict=True).logits[0]

    def _alone(self, group: PreferenceGroup, completion: Sequence[int]) -> Tensor:
        targets, logits = self._tokens(completion), self.logits([*group.prompt_ids, *completion])
        if self.own_prompt_logits is None:
            self.own_prompt_logits = logits[: len(group.prompt_ids)].detach()
        rows = logits[len(group.prompt_ids) - 1 : -1].float()
        return rows.log_softmax(-1).gather(1, targets.to(rows.device)[:, None])[:, 0]

    @torch.no_grad()
    def prompt_logits(self, other_end: bool = False) -> Tensor:  # [L, V]
        """Return what the model says in the first prompt, before its first completion or one that ends otherwise."""
        group = self.groups[0]
        ids = [*group.prompt_ids, *group.completion_ids[0]]
        if other_end:
            ids[-1] = next(token for token in reversed(ids) if token != ids[-1])
        with self._by_its_own_attention():
            return self.logits(ids)[: len(group.prompt_ids)]

    def _by_its_own_attention(self) -> contextlib.AbstractContextManager[None]:
        base = base_of(self.model)
        return attending_by(base, "eager") if base._can_set_attn_implementation() else contextlib.nullcontext()

    def packed(self, layout: Layout) -> Found:
        """Return what packed batches in `layout` say."""
        packed = pack(self.groups, layout).to(self._device)
        with self._arithmetic(), torch.set_grad_enabled(bool(self._weights)):
            output = self._run(packed=packed, **({"aux_loss": True} if self._aux_loss else {}))
        return self._found(output.token_logps, output.aux_loss)

    def _found(self, logps: Tensor, aux_loss: Tensor | None) -> Found:
        coefficients = torch.linspace(-1, 2, len(logps), device=logps.device)
        gradients: dict[str, Tensor] = {}
        if logps.requires_grad:
            values = torch.autograd.grad(
                (logps * coefficients).sum(), self._weights.values(), allow_unused=True, materialize_grads=True
            )
            gradients = dict(zip(self._weights, values, strict=True))
        return Found(logps.detach().float(), gradients, aux_loss.detach() if isinstance(aux_loss, Tensor) else None)

    @torch.no_grad()
    def _own_aux_loss(self) -> Tensor | None:
        packed = pack(self.groups, "padded").to(self._device)
        inputs = {"input_ids": packed.input_ids, "attention_mask": packed.attention_mask, "return_dict": True}
        with self._arithmetic(), contextlib.suppress(IndexError):  # transformers' of a model without a router
            return getattr(self._run(**inputs, use_cache=False, output_router_logits=True), "aux_loss", None)
        return None

    @property
    def _device(self) -> torch.device:
        return base_of(self.model).get_input_embeddings().weight.device

    def _tokens(self, ids: Sequence) -> Tensor:
        return torch.tensor(ids, device=self._device)


def is_exact(model: nn.Module) -> bool:
    """Whether all weights are in fp32."""
    return all(weight.dtype in (torch.float32, torch.float64) for weight in model.parameters())


@contextlib.contextmanager
def exactly(model: nn.Module) -> Iterator[None]:
    """Within it `model` computes in fp32, a module at a time where its weights are not. No gradients for those."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    device = next(model.parameters()).device
    try:
        with contextlib.nullcontext() if is_exact(model) else weights_in(model, torch.float32, device):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _some_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the first and the last two weights that train, without embeddings and head, but an adapter's with them."""
    ends = (base_of(model).get_input_embeddings(), base_of(model).get_output_embeddings())
    ends = {id(weight) for end in ends for weight in end.parameters()}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    between = [name for name, weight in trained.items() if id(weight) not in ends] or list(trained)
    of_adapter = [name for name in trained if name not in between] if hasattr(model, "peft_config") else []
    return {name: trained[name] for name in (*between[:2], *between[-2:], *of_adapter)}


def probe_groups(base: PreTrainedModel, max_length: float = FAR) -> list[list[PreferenceGroup]]:
    """Return a short batch of groups, and a group that reaches past the largest limit that it takes little time to."""
    config = base.config.get_text_config()
    special = {value for name, value in vars(config).items() if name.endswith("token_id") and isinstance(value, int)}
    known = min(vocabulary_size(base), getattr(config, "vocab_size", None) or 10_000, 10_000)
    generator = torch.Generator().manual_seed(0)
    usual = [token for token in range(known) if token not in special]
    vocabulary = [usual[index] for index in torch.randperm(len(usual), generator=generator)[:12]]  # tokens come again

    def group(prompt: int, completions: Sequence[int]) -> PreferenceGroup:
        picked = torch.randint(len(vocabulary), (prompt + sum(completions),), generator=generator).tolist()
        parts = torch.tensor([vocabulary[index] for index in picked]).split([prompt, *completions])
        ids = [part.tolist() for part in parts]
        return PreferenceGroup(ids[0], ids[1:], (), ())

    short = [group(*_within(max_length, *lengths)) for lengths in _SHORT]
    longest = max(prompt + max(completions) for prompt, completions in _SHORT)
    device = next(base.parameters()).device
    size = sum(getattr(weight, "ds_numel", weight.numel()) for weight in base.parameters())
    affordable = min(_TOKENS.get(device.type, 4200), _FLOPS.get(device.type, 1e13) / (6 * size))
    most = min(max_length, affordable - max(_BEYOND))
    limits = [limit for limit in _limits(config) if longest < limit + max(_BEYOND) and limit < most]
    return [short, *([group(max(limits) - 3, _BEYOND)] for _ in limits[:1])]


def _within(max_length: float, prompt: int, completions: Sequence[int]) -> tuple[int, list[int]]:
    """Return lengths of a group whose sequences are no longer than `max_length`."""
    prompt = max(1, int(min(prompt, max_length // 2)))
    return prompt, [max(1, int(min(length, max_length - prompt))) for length in completions]


def _limits(config: PretrainedConfig) -> list[int]:
    """Return the numbers of a configuration from which on a model treats tokens differently."""
    settings = {**vars(config), **(getattr(config, "rope_parameters", None) or {})}
    return [
        value for name, value in settings.items()
        if isinstance(value, int) and value > 0 and any(limit in name for limit in _LIMITS)
    ]  # fmt: skip


@contextlib.contextmanager
def undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """Within it `model` is in training mode, or not, and recomputes nothing; after it all is as before."""
    modes = [(module, module.training) for module in model.modules()]
    recomputing = [module for module, _ in modes if getattr(module, "gradient_checkpointing", False) is True]
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)):
        model.train(training)
        for module in recomputing:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for module in recomputing:
                module.gradient_checkpointing = True
            for module, mode in modes:
                module.training = mode
            forget_lengths(model)
