"""Does the packed path say what the model itself says? Asked before anything is computed or stored.

The model is the specification: `model(input_ids=one sequence).logits`, in the state in which it will train, adapters
and all. A few groups run alone and packed, and log-probs, gradients of some weights and the load-balancing loss are
compared. What comes out differently is not used: first the shared layout goes, then the fused head, then the model.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_fast.batches.groups import Layout
from dpo_fast.errors import InputError
from dpo_fast.model.adapters import adapters_off, base_of
from dpo_fast.model.attention import ATTENTION_NAME, hidden_window, implementations, sharing_obstacle
from dpo_fast.model.dropout import first_random_module
from dpo_fast.model.engines import is_sharded, weights_at_hand
from dpo_fast.model.forward import add_dpo_forward
from dpo_fast.model.probes import (
    EXACT,
    FAR,
    NATIVE,
    ROUNDED,
    Bound,
    Context,
    Found,
    Probe,
    exactly,
    is_exact,
    probe_groups,
    undisturbed,
)

logger = logging.getLogger(__name__)

_OWN_LOGITS = "%s makes its logits by itself, which is slower and takes more memory, because %s"


def settle_forward(
    model: nn.Module,
    layout: str,
    *,
    max_length: float = FAR,
    training: bool = False,
    aux_loss: bool = False,
    autocast: Context = contextlib.nullcontext,
    kernels: Callable[[PreTrainedModel], None] | None = None,
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
        kernels: puts other kernels into the layers of a model; the model as given is what they are compared with.

    Raises:
        InputError: the model is random, looks ahead or cannot run on tokens alone, or nothing agrees with it.
    """
    base = base_of(model)
    add_dpo_forward(base)
    if any(weight.is_meta for weight in model.parameters()):
        if kernels is not None:
            kernels(base)
        return _settle_later(base, layout, max_length)
    if base.dpo_fast.head_form is None:
        logger.warning(_OWN_LOGITS, type(base).__name__, "its head is more than one product with a weight")
    with weights_at_hand(model), undisturbed(model, training):
        probes = _probes(model, max_length, aux_loss, autocast)
        _refuse_unusable(probes[0], training)
        if kernels is not None:
            for probe in probes:
                _own(probe)
            kernels(base)
            _refuse_kernels(probes, _probes(model, max_length, aux_loss, autocast))
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


def _probes(model: nn.Module, max_length: float, aux_loss: bool, autocast: Context) -> list[Probe]:
    """Return what is compared: in fp32, and where weights are not, gradients in the arithmetic of training too."""
    short, *long = probe_groups(base_of(model), max_length)
    exact = is_exact(model)
    in_fp32 = functools.partial(Probe, model, arithmetic=lambda: exactly(model), bound=EXACT if exact else ROUNDED)
    probes = [in_fp32(short, gradients=exact, aux_loss=aux_loss), *(in_fp32(groups) for groups in long)]
    if exact:
        return probes
    native = Probe(model, short, autocast, bound=NATIVE, gradients=True, aux_loss=aux_loss)
    if is_sharded(model):  # an engine's weights keep their dtype
        return [native]
    try:
        probes[0].truth  # noqa: B018 (tried)
    except Exception:  # a model that must not be in fp32
        return [native]
    return [*probes, native]


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
    with weights_at_hand(model), undisturbed(model, training=False):
        groups = probe_groups(base_of(model))[0]
        return Probe(model, groups, contextlib.nullcontext, bound=EXACT).truth.logps


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
    if EXACT.difference(without, before) is None:
        return False
    if (own_logps(model) - before).abs().max() <= (0.01 if is_exact(model) else 0.5):
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
    with torch.no_grad(), undisturbed(base, training=base.training):
        groups = probe_groups(base, max_length)[0]
        bound = EXACT if is_exact(base) else NATIVE
        probes = [Probe(base, groups, contextlib.nullcontext, bound=bound, run=base.forward)]  # inside an engine's call
        reason = _difference(probes, layout)
    if reason is not None:
        other = "pack(groups, layout='padded')" if layout == "shared" else "another model"
        raise InputError(f"layout={layout!r} does not work for {type(base).__name__}: {reason}; take {other}")


# ---- what is compared ----


def _refuse_unusable(probe: Probe, training: bool) -> None:
    """Refuse a model that does not run on tokens alone, that is random, or whose log-probs depend on later tokens."""
    name = type(base_of(probe.model)).__name__
    _own(probe)
    if probe.bound.difference(probe.prompt_logits(other_end=True), probe.own_prompt_logits) is None:
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


def _own(probe: Probe) -> Found:
    """Return what the model itself says, or refuse a model that does not run on tokens alone."""
    try:
        return probe.truth
    except Exception as error:
        raise InputError(
            f"model: {type(base_of(probe.model)).__name__} does not run on tokens alone ({type(error).__name__}: "
            f"{error}); give a causal language model"
        ) from error


def _refuse_kernels(given: Sequence[Probe], replaced: Sequence[Probe]) -> None:
    """Refuse layers that say something else than those of the model as it was given."""
    name = type(base_of(given[0].model)).__name__
    for before, now in zip(given, replaced, strict=True):
        try:
            reason = _unlike(now.truth, before.truth, before.bound)
        except Exception as error:
            reason = f"they fail ({type(error).__name__}: {error})"
        if reason is not None:
            raise InputError(f"layer_kernels='liger' does not work for {name}: {reason}. Take 'none' or 'compile'")


def _cannot_share(base: PreTrainedModel, max_length: float) -> str | None:
    """Return what is known to speak against sharing prompts; None for nothing."""
    limit = base.dpo_fast.frequency_limit
    if max_length > limit:
        return f"its rotary frequencies depend on a sequence's length beyond {limit} tokens, and max_length is more"
    return sharing_obstacle(base)


def _share(base: PreTrainedModel, probes: Sequence[Probe], max_length: float) -> str | None:
    """Switch to shared-prefix attention, or leave `base` as it was and return why not."""
    reason = _cannot_share(base, max_length)
    if reason is not None:
        return reason
    restore = implementations(base)
    for probe in probes:
        _own(probe)  # before the switch
    try:
        base.set_attn_implementation(ATTENTION_NAME)
        with torch.no_grad():
            reason = hidden_window(base, lambda ids: base(input_ids=ids, use_cache=False), int(min(max_length, FAR)))
        reason = reason or _difference(probes, "shared")
    except Exception as error:  # whatever a foreign architecture trips over, it cannot run on packed rows
        reason = f"it fails on a packed row ({type(error).__name__}: {error})"
    if reason is not None:
        restore()
    return reason


def _difference(probes: Sequence[Probe], layout: Layout) -> str | None:
    """Return how packed batches in `layout` differ from what the model itself says; None where they do not."""
    for probe in probes:
        truth = _own(probe)
        try:
            found = probe.packed(layout)
        except Exception as error:
            return f"it fails on a {layout} batch ({type(error).__name__}: {error})"
        if (reason := _unlike(found, truth, probe.bound)) is not None:
            return reason
    return None


def _unlike(found: Found, truth: Found, bound: Bound) -> str | None:
    """Return how `found` differs from the truth, if rounding does not explain it."""
    off = bound.difference(found.logps, truth.logps)
    if off is not None:
        return f"log-probs of tokens come out up to {off:.2g} nat away from the model's own"
    sizes = {name: gradient.norm().item() for name, gradient in truth.gradients.items()}
    for name, size in sizes.items():
        error = (found.gradients[name] - truth.gradients[name]).norm().item()
        if not error <= bound.gradient * (size + 0.05 * max(sizes.values())):
            return f"the gradient of {name} comes out {error:.2g} away from the model's own, which is {size:.2g}"
    ours, own = (0.0 if aux is None else float(aux) for aux in (found.aux_loss, truth.aux_loss))
    if abs(ours - own) > bound.gradient * abs(own):
        return f"the load-balancing loss comes out as {ours:.4g}, and the model's own is {own:.4g}"
    return None
