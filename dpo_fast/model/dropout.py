"""Dropout and other noise of training mode: turned off, and looked for where it cannot be.

A reference log-prob is computed once. With noise in the policy it would be compared with one draw of many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dpo_fast.batches.groups import Layout, PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.errors import InputError

_PROBE = PreferenceGroup([2, 3, 4, 5], [[6, 7, 8], [9, 10, 11]])
_RATES = ("drop", "jitter")  # what the attribute of a module is called that holds a rate
_SAME = {torch.float32: 1e-3, torch.float64: 1e-3}  # nats that sums in another order may make; else 0.05


def disable_dropout(model: nn.Module | None) -> None:
    """Set every rate of dropout and of router jitter to 0: of `nn.Dropout`, and in attributes that modules read."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and 0 < value < 1 and any(part in name for part in _RATES):
                setattr(module, name, 0.0)


def refuse_randomness(model: nn.Module, layout: Layout, vocab_size: int) -> None:
    """Run a few tokens twice in training mode, and refuse a model whose log-probs differ.

    Args:
        model: takes packed batches.
        layout: layout of the packed batches.
        vocab_size: vocabulary size of the model.

    Raises:
        InputError: the message names the first module whose output differs.
    """
    ids = [[token % vocab_size for token in ids] for ids in (_PROBE.prompt_ids, *_PROBE.completion_ids)]
    device = next(model.parameters()).device
    packed = pack([PreferenceGroup(ids[0], ids[1:])], layout).to(device)
    with _training_without_trace(model, device):
        one, other = (model(packed=packed).token_logps for _ in range(2))
        if (one - other).abs().max() <= _SAME.get(next(model.parameters()).dtype, 0.05):
            return
        name, module = _first_random_module(model, lambda: model(packed=packed))
    raise InputError(
        f"model: {name} ({type(module).__name__}) is random in training mode, although disable_dropout=True turned "
        "off every rate that it found; set that module's rate to 0 before, or give disable_dropout=False"
    )


@contextmanager
def _training_without_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put `model` into training mode without gradients, and leave its mode and random numbers as they were."""
    was_training = model.training
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train()
        try:
            yield
        finally:
            model.train(was_training)


def _first_random_module(model: nn.Module, run) -> tuple[str, nn.Module]:
    """Return the module that is the first to finish with another output in a second run, and its name."""
    runs: list[list[tuple[str, nn.Module, Tensor]]] = []
    handles = [
        module.register_forward_hook(
            lambda module, _, output, name=name: runs[-1].append((name, module, _first_tensor(output)))
        )
        for name, module in model.named_modules()
    ]
    try:
        for _ in range(2):
            runs.append([])
            run()
    finally:
        for handle in handles:
            handle.remove()
    for (name, module, one), (_, _, other) in zip(*runs, strict=False):
        if one is not None and not torch.equal(one, other):
            return name, module
    return "", model


def _first_tensor(output: object) -> Tensor | None:
    values = output if isinstance(output, tuple | list) else [output]
    return next((value.detach().clone() for value in values if isinstance(value, Tensor)), None)
