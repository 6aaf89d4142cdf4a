"""Does the packed path say what the model itself says? Asked before anything is computed or stored.

The model is the specification: `model(input_ids=one sequence).logits`, in the state in which it will train, adapters
and all. A few groups run alone and packed, and log-probs, gradients of some weights and the load-balancing loss are
compared. What comes out differently is not used: first the shared layout goes, then the fused head, then the model.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dpo_fast.batches.groups import Layout, PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.errors import InputError
from dpo_fast.model.adapters import adapters_off, base_of
from dpo_fast.model.attention import (
    ATTENTION_NAME,
    attending_by,
    hidden_window,
    implementations,
    sharing_obstacle,
)
from dpo_fast.model.dropout import first_random_module
from dpo_fast.model.engines import is_sharded, weights_at_hand
from dpo_fast.model.forward import add_dpo_forward
from dpo_fast.model.frequencies import forget_lengths
from dpo_fast.model.loading import vocabulary_size

logger = logging.getLogger(__name__)

Context = Callable[[], contextlib.AbstractContextManager[object]]

_SHORT = (12, (9, 13)), (5, (4,))  # prompt and completions of the groups that always run
_BEYOND = (8, 11)  # completions of the group that reaches past a limit, after a prompt that does not quite
_FLOPS, _TOKENS = {"cpu": 3e10}, {"cpu": 1024}  # of such a group; elsewhere 1e13 and 4200, for attention takes T²
_FAR = 2**15  # tokens of the longest sequence, where nothing bounds it
_OWN_LOGITS = "%s makes its logits by itself, which is slower and takes more memory, because %s"
_LIMITS = ("window", "chunk_size", "index_topk", "original_max_position_embeddings")  # in names of settings


def settle_forward(
    model: nn.Module,
    layout: str,
    *,
    max_length: float = _FAR,
    training: bool = False,
    aux_loss: bool = False,
    autocast: Context = contextlib.nullcontext,
) -> Layout:
    """Give `model` the packed forward, and return the layout in which it says what the model itself says.

    `auto` takes `padded` where `shared` does not, and says so once; `shared` is then refused. Where weights are not at
    hand, `auto` takes what nothing speaks against, and the first packed forward makes the comparison.

    Args:
        model: a causal language model, bare or in PEFT's wrapper, with every adapter in place.
        layout: `auto`, `shared` or `padded`.
        max_length: tokens of the longest sequence to come.
        training: whether it is compared in training mode, without dropout.
        aux_loss: whether the load-balancing loss is wanted.
        autocast: makes the context of a forward, where weights are not in fp32.

    Raises:
        InputError: the model is random, looks ahead or cannot run on tokens alone, or nothing agrees with it.
    """
    base = base_of(model)
    add_dpo_forward(base)
    if any(weight.is_meta for weight in model.parameters()):
        return _settle_later(base, layout, max_length)
    if base.dpo_fast.head_form is None:
        logger.warning(_OWN_LOGITS, type(base).__name__, "its head is more than one product with a weight")
    with weights_at_hand(model), _undisturbed(model, training):
        short, *long = _groups_of(base, max_length)
        probes = [
            _Probe(model, short, autocast, gradients=True, aux_loss=aux_loss),
            *(_Probe(model, groups, autocast) for groups in long),
        ]
        _refuse_unusable(probes[0], training)
        if layout != "padded":
            reason = _share(base, probes, max_length)
            if reason is None:
                return "shared"
            if layout == "shared":
                raise InputError(
                    f"layout='shared' does not work for {type(base).__name__}: {reason}. Use layout='padded'"
                )
            logger.warning("layout='auto' takes 'padded' for %s, because %s", type(base).__name__, reason)
        reason = _difference(probes, "padded")
        if reason is not None and base.dpo_fast.head_form is not None:
            base.dpo_fast.head_form = None
            logger.warning(_OWN_LOGITS, type(base).__name__, f"{reason} otherwise")
            reason = _difference(probes, "padded")
        if reason is not None:
            raise InputError(f"model: {type(base).__name__} cannot be trained on packed batches: {reason}")
    return "padded"


def use_shared_prefix(model: PreTrainedModel) -> None:
    """Switch `model` to shared-prefix attention for packed rows, if that says what the model itself says.

    Where weights are not at hand yet (meta device), the first packed forward makes the comparison.

    Raises:
        ValueError: the architecture cannot share prompts; the message says why. The model is left as it was.
    """
    settle_forward(model, "shared")


def own_logps(model: nn.Module) -> Tensor:
    """Return what `model` itself says of a few tokens, fp32 [N]; nothing where its weights are not at hand."""
    if any(weight.is_meta for weight in model.parameters()):
        return torch.empty(0)
    with weights_at_hand(model), _undisturbed(model, training=False):
        return _Probe(model, _groups_of(base_of(model), max_length=_FAR)[0], contextlib.nullcontext).truth.logps


def reference_has_adapters(
    model: nn.Module,
    before: Tensor,  # fp32 [N]
) -> bool:
    """Return whether the model as it was given is `model` with its new adapters, rather than without them.

    Some initialisations (PiSSA, OLoRA) take out of the weights what they put into the adapter. `before` is what
    `own_logps` said of the given model.

    Raises:
        InputError: it is neither.
    """
    with adapters_off(model):
        without = own_logps(model)
    if _off(without, before, exact=True) is None:
        return False
    if (own_logps(model) - before).abs().max() <= (0.01 if _is_exact(model) else 0.5):
        return True
    kinds = ", ".join(f"{type(config).__name__} of {name!r}" for name, config in model.peft_config.items())
    raise InputError(
        f"peft_config: {kinds} changes the weights of the model, which is the given one neither with the adapter nor "
        "without it, so there is no reference; give ref_model=…, the model as it was"
    )


def _settle_later(base: PreTrainedModel, layout: str, max_length: float) -> Layout:
    reason = _cannot_share(base, max_length)
    if layout == "shared" and reason is not None:
        raise InputError(f"layout='shared' does not work for {type(base).__name__}: {reason}. Use layout='padded'")
    layout = "padded" if layout == "padded" or reason is not None else "shared"
    if layout == "shared":
        base.set_attn_implementation(ATTENTION_NAME)
    base.dpo_fast.late_check = functools.partial(_check_late, layout=layout, max_length=max_length)
    return layout


def _check_late(base: PreTrainedModel, layout: Layout, max_length: float) -> None:
    with torch.no_grad(), _undisturbed(base, training=base.training):
        probes = [_Probe(base, groups, contextlib.nullcontext) for groups in _groups_of(base, max_length)]
        reason = _difference(probes, layout)
    if reason is not None:
        raise InputError(f"layout={layout!r} does not work for {type(base).__name__}: {reason}")


# ---- what is run ----


@dataclass(frozen=True)
class _Found:
    """Log-probs fp32 [N] of all completions' tokens, gradients of their weighted sum, and the load-balancing loss."""

    logps: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)
    aux_loss: Tensor | None = None


class _Probe:
    """Some groups, and what the model itself says about them."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[PreferenceGroup],
        autocast: Context,
        *,
        gradients: bool = False,
        aux_loss: bool = False,
    ):
        self.model, self.groups, self._aux_loss = model, groups, aux_loss
        self.exact = _is_exact(model)
        self.autocast = contextlib.nullcontext if self.exact else autocast
        self._weights = _some_weights(model) if gradients and not is_sharded(model) else {}
        self.own_prompt_logits: Tensor | None = None  # of the first sequence

    @functools.cached_property
    def truth(self) -> _Found:
        """What the model itself says, by its own attention, of every sequence alone."""
        with self._by_its_own_attention(), torch.set_grad_enabled(bool(self._weights)):
            logps = torch.cat([self._alone(group, ids) for group in self.groups for ids in group.completion_ids])
            return self._found(logps, self._own_aux_loss() if self._aux_loss else None)

    def logits(self, ids: Sequence[int]) -> Tensor:  # [L, V]
        """Return what the model says of one sequence."""
        forget_lengths(self.model)
        with self.autocast():
            return self.model(input_ids=self._tokens([ids]), use_cache=False, return_dict=True).logits[0]

    def _alone(self, group: PreferenceGroup, completion: Sequence[int]) -> Tensor:
        targets, logits = self._tokens(completion), self.logits([*group.prompt_ids, *completion])
        if self.own_prompt_logits is None:
            self.own_prompt_logits = logits[: len(group.prompt_ids)].detach()
        rows = logits[len(group.prompt_ids) - 1 : -1].float()
        return rows.log_softmax(-1).gather(1, targets.to(rows.device)[:, None])[:, 0]

    @torch.no_grad()
    def prompt_logits(self, end: int = 0) -> Tensor:  # [L, V]
        """Return what the model says in the first prompt, before its first completion with the last token `end`."""
        group = self.groups[0]
        with self._by_its_own_attention():
            ids = [*group.prompt_ids, *group.completion_ids[0][:-1], group.completion_ids[end][-1]]
            return self.logits(ids)[: len(group.prompt_ids)]

    def _by_its_own_attention(self) -> contextlib.AbstractContextManager[None]:
        base = base_of(self.model)
        return attending_by(base, "eager") if base._can_set_attn_implementation() else contextlib.nullcontext()

    def packed(self, layout: Layout) -> _Found:
        """Return what packed batches in `layout` say."""
        packed = pack(self.groups, layout).to(self._device)
        with self.autocast(), torch.set_grad_enabled(bool(self._weights)):
            output = self.model(packed=packed, **({"aux_loss": True} if self._aux_loss else {}))
        return self._found(output.token_logps, output.aux_loss)

    def _found(self, logps: Tensor, aux_loss: Tensor | None) -> _Found:
        coefficients = torch.linspace(-1, 2, len(logps), device=logps.device)
        gradients: dict[str, Tensor] = {}
        if logps.requires_grad:
            values = torch.autograd.grad(
                (logps * coefficients).sum(), self._weights.values(), allow_unused=True, materialize_grads=True
            )
            gradients = dict(zip(self._weights, values, strict=True))
        return _Found(logps.detach().float(), gradients, aux_loss.detach() if isinstance(aux_loss, Tensor) else None)

    @torch.no_grad()
    def _own_aux_loss(self) -> Tensor | None:
        packed = pack(self.groups, "padded").to(self._device)
        inputs = {"input_ids": packed.input_ids, "attention_mask": packed.attention_mask, "return_dict": True}
        with self.autocast():
            return getattr(self.model(**inputs, use_cache=False, output_router_logits=True), "aux_loss", None)

    @property
    def _device(self) -> torch.device:
        return base_of(self.model).get_input_embeddings().weight.device

    def _tokens(self, ids: Sequence) -> Tensor:
        return torch.tensor(ids, device=self._device)


def _is_exact(model: nn.Module) -> bool:
    """Whether products are taken in fp32."""
    weights = list(model.parameters())
    rounds = weights[0].device.type != "cpu" and torch.get_float32_matmul_precision() != "highest"
    return not rounds and all(weight.dtype in (torch.float32, torch.float64) for weight in weights)


def _some_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the first and the last two weights that train and are not too large."""
    ends = [base_of(model).get_input_embeddings(), base_of(model).get_output_embeddings()]
    ends = {id(weight) for end in ends for weight in end.parameters()}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    trained = {name: weight for name, weight in trained.items() if id(weight) not in ends} or trained
    small = [name for name, weight in trained.items() if weight.numel() <= 2**25]
    names = {*small[:2], *small[-2:]} or set(sorted(trained, key=lambda name: trained[name].numel())[:1])
    return {name: trained[name] for name in names}


def _groups_of(base: PreTrainedModel, max_length: float) -> list[list[PreferenceGroup]]:
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
    device, size = next(base.parameters()).device, sum(weight.numel() for weight in base.parameters())
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
def _undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
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


# ---- what is compared ----


def _refuse_unusable(probe: _Probe, training: bool) -> None:
    """Refuse a model that does not run on tokens alone, that is random, or whose log-probs depend on later tokens."""
    name = type(base_of(probe.model)).__name__
    try:
        probe.truth  # noqa: B018 (computed here)
    except Exception as error:
        raise InputError(
            f"model: {name} does not run on tokens alone ({type(error).__name__}: {error}); give a causal language "
            "model"
        ) from error
    if _off(probe.prompt_logits(end=1), probe.own_prompt_logits, probe.exact) is None:
        return
    path, module = first_random_module(probe.model, probe.prompt_logits)
    if module is not None:
        cure = "set its rate to 0, in the model's configuration too, or give disable_dropout=False"
        raise InputError(
            f"model: {path} ({type(module).__name__}) is random, although every rate that was found is 0; "
            f"{cure if training else 'its log-probs would be one draw of many'}"
        )
    raise InputError(
        f"model: {name} looks at later tokens, so it is no causal language model; set is_decoder=True in its "
        "configuration where it has that, or take another model"
    )


def _cannot_share(base: PreTrainedModel, max_length: float) -> str | None:
    """Return what is known to speak against sharing prompts; None for nothing."""
    limit = base.dpo_fast.frequency_limit
    if max_length > limit:
        return f"its rotary frequencies depend on a sequence's length beyond {limit} tokens, and max_length is more"
    return sharing_obstacle(base)


def _share(base: PreTrainedModel, probes: Sequence[_Probe], max_length: float) -> str | None:
    """Switch to shared-prefix attention, or leave `base` as it was and return why not."""
    reason = _cannot_share(base, max_length)
    if reason is not None:
        return reason
    restore = implementations(base)
    for probe in probes:
        probe.truth  # noqa: B018 (taken before the switch)
    try:
        base.set_attn_implementation(ATTENTION_NAME)
        with torch.no_grad():
            reason = hidden_window(base, lambda ids: base(input_ids=ids, use_cache=False), int(min(max_length, _FAR)))
        reason = reason or _difference(probes, "shared")
    except Exception as error:  # whatever a foreign architecture trips over, it cannot run on packed rows
        reason = f"it fails on a packed row ({type(error).__name__}: {error})"
    if reason is not None:
        restore()
    return reason


def _difference(probes: Sequence[_Probe], layout: Layout) -> str | None:
    """Return how packed batches in `layout` differ from what the model itself says; None where they do not."""
    for probe in probes:
        truth = probe.truth
        try:
            found = probe.packed(layout)
        except Exception as error:
            return f"it fails on a {layout} batch ({type(error).__name__}: {error})"
        off = _off(found.logps, truth.logps, probe.exact)
        if off is not None:
            return f"log-probs of tokens come out up to {off:.2g} nat away from the model's own"
        most = max((gradient.norm() for gradient in truth.gradients.values()), default=torch.tensor(0.0))
        for name, gradient in truth.gradients.items():
            error = (found.gradients[name] - gradient).norm()
            if not error <= (1e-3 if probe.exact else 0.1) * (gradient.norm() + 0.01 * most):
                return f"the gradient of {name} comes out {error / gradient.norm():.1%} away from the model's own"
        ours, own = (0.0 if aux is None else float(aux) for aux in (found.aux_loss, truth.aux_loss))
        if abs(ours - own) > (1e-3 if probe.exact else 0.05) * abs(own):
            return f"the load-balancing loss comes out as {ours:.4g}, and the model's own is {own:.4g}"
    return None


def _off(found: Tensor, truth: Tensor, exact: bool) -> float | None:
    """Return the largest difference in nats, if rounding does not explain it."""
    error = (found.to(truth.device) - truth).abs()
    if exact:
        fine = (error <= 1e-4 + 1e-5 * truth.abs()).all()
    else:
        fine = error.max() <= 0.5 and error.square().mean().sqrt() <= 0.1
    return None if fine else float(error.max())
