"""Dropout and other noise of training mode: turned off, and looked for where it cannot be.

A reference log-prob is computed once. With noise in the policy it would be compared with one draw of many.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_RATES = ("drop", "jitter")  # what the attribute of a module is called that holds a rate


def disable_dropout(model: nn.Module | None) -> None:
    """Set every rate of dropout and of router jitter to 0: of `nn.Dropout`, and in attributes that modules read."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and 0 < value < 1 and any(part in name for part in _RATES):
                setattr(module, name, 0.0)


def first_random_module(model: nn.Module, run: Callable[[], object]) -> tuple[str, nn.Module]:
    """Return the first module that says something else of the same input in a second run, and its name."""
    runs: list[list[tuple[str, nn.Module, Tensor | None, Tensor | None]]] = []
    handles = [
        module.register_forward_hook(
            lambda module, given, output, name=name: runs[-1].append(
                (name, module, _first_tensor(given), _first_tensor(output))
            )
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
    for (name, module, given, one), (_, _, given_again, other) in zip(*runs, strict=False):
        alike = given is None or given_again is None or torch.equal(given, given_again)
        if one is not None and other is not None and alike and not torch.equal(one, other):
            return name, module
    return "", model


def _first_tensor(output: object) -> Tensor | None:
    values = output if isinstance(output, tuple | list) else [output]
    return next((value.detach().clone() for value in values if isinstance(value, Tensor)), None)
