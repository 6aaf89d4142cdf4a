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


def first_random_module(model: nn.Module, run: Callable[[], object]) -> tuple[str, nn.Module | None]:
    """Return the first module that says something else of the same input in a second run, and its name; or None."""
    runs: list[dict[str, tuple[Tensor | None, Tensor | None]]] = []
    handles = [
        module.register_forward_hook(
            lambda _, given, output, name=name: runs[-1].update({name: (_first_tensor(given), _first_tensor(output))})
        )
        for name, module in model.named_modules()
    ]
    try:
        for _ in range(2):
            runs.append({})
            run()
    finally:
        for handle in handles:
            handle.remove()
    first, second = runs
    for name, (given, output) in first.items():
        given_again, output_again = second.get(name, (given, None))  # a layer may be left out at random
        alike = given is None or given_again is None or torch.equal(given, given_again)
        if alike and output is not None and (output_again is None or not torch.equal(output, output_again)):
            return name, model.get_submodule(name)
    return "", None


def _first_tensor(output: object) -> Tensor | None:
    values = output if isinstance(output, tuple | list) else [output]
    return next((value.detach().clone() for value in values if isinstance(value, Tensor)), None)
