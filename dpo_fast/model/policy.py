"""The policy of a run and its reference, made ready: adapter, dropout, packed forward, one layout for both."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from dpo_fast.batches.groups import Layout
from dpo_fast.config import DPOConfig
from dpo_fast.errors import InputError
from dpo_fast.losses import uses
from dpo_fast.model.adapters import prepare_peft
from dpo_fast.model.agreement import own_logps, reference_has_adapters, settle_forward
from dpo_fast.model.dropout import disable_dropout
from dpo_fast.model.engines import autocast_of_training, on_device
from dpo_fast.model.layer_kernels import use_liger

logger = logging.getLogger(__name__)


def prepare_policy(
    model: nn.Module, ref_model: nn.Module | None, peft_config: Any | None, args: DPOConfig, needs_reference: bool
) -> tuple[nn.Module, bool]:
    """Return the model in the adapter of `peft_config`, and whether its adapters belong to the reference.

    They do where the model was given with them, or where a new adapter took its content out of the weights.

    Raises:
        InputError: nothing trains, or what trains has sparse gradients; an adapter that cannot be used.
    """
    asks = peft_config is not None and ref_model is None and needs_reference
    before = own_logps(model) if asks else None
    model = prepare_peft(model, peft_config, args)
    _check_training(model)
    for part in (model, ref_model) if args.disable_dropout else ():
        disable_dropout(part)
    return model, before is None or reference_has_adapters(model, before)


def _check_training(model: nn.Module) -> None:
    if not any(weight.requires_grad for weight in model.parameters()):
        raise InputError(
            "model: no weight of it trains; call model.requires_grad_(True), give peft_config=…, or load the adapter "
            "with is_trainable=True"
        )
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True and any(weight.requires_grad for weight in module.parameters()):
            raise InputError(
                f"model: {name} ({type(module).__name__}) has sparse=True, whose gradients cannot be clipped with the "
                "others; set it to False"
            )


def settle_layout(
    model: nn.Module, ref_model: nn.Module | None, args: DPOConfig, accelerator: Accelerator, aux_loss: bool
) -> Layout:
    """Give policy and reference the packed forward and the layers asked for; return the layout for both, on all ranks.

    `torch_compile` comes later: compiled layers would be compiled again for the comparison.
    """
    settle = functools.partial(
        settle_forward,
        max_length=args.max_length or math.inf,
        autocast=lambda: autocast_of_training(accelerator),
        kernels=functools.partial(use_liger, options=args.liger_kernel_config or {})
        if args.layer_kernels == "liger"
        else None,
    )
    policy = functools.partial(settle, model, training=args.disable_dropout, aux_loss=aux_loss)
    wanted = args.layout
    if args.neftune_noise_alpha is not None and (coupled := [n for n in args.loss_mix if uses(n, "step")]):
        raise InputError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} does not go with {coupled}, which run a step twice, each "
            f"time with other noise; turn it off, or leave them out of loss_type={args.loss_type}"
        )
    if args.neftune_noise_alpha is not None and wanted != "padded":
        reason = f"neftune_noise_alpha={args.neftune_noise_alpha} gives every sequence noise of its own, prompt and all"
        if wanted == "shared":
            raise InputError(f"layout='shared' does not work, because {reason}. Use layout='padded'")
        logger.warning("layout='auto' takes 'padded', because %s", reason)
        wanted = "padded"
    with on_device(model, args.device):
        layout = policy(wanted)
        if ref_model is not None and settle(ref_model, wanted if layout == "shared" else "padded") != layout:
            layout = policy("padded")
    layouts = [layout]
    broadcast_object_list(layouts)  # a rank without weights, which others will send it, has not compared
    return layouts[0]
