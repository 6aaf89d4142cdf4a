"""Sees what happens inside the project's ops, which to PyTorch's modes are one operation each."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Inside(TorchDispatchMode):
    """Shows every operation and its results to `see`, in ops and outside."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "dpo_fast":
            with self:
                return OPDEFS[function.name()]._init_fn(*args, **kwargs)
        result = function(*args, **kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.see(function, tensor, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
        return result

    def see(self, function, result: Tensor, arguments: list[Tensor]) -> None:
        raise NotImplementedError


def lies_in(result: Tensor, arguments: list[Tensor]) -> bool:
    """Whether a result has the memory of an argument."""
    return any(result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in arguments)


class LargestTensor(_Inside):
    """Remembers how many elements the largest tensor has that any operation returns."""

    elements = 0

    def see(self, function, result, arguments):
        self.elements = max(self.elements, result.numel())


class LargestNewTensor(LargestTensor):
    """The same of tensors that lie in new memory."""

    def see(self, function, result, arguments):
        if not lies_in(result, arguments):
            super().see(function, result, arguments)


class Write(NamedTuple):
    """What an operation wrote, where that is more than a view of its arguments. The tensor itself is not kept."""

    operation: str  # "addmm_", "new_empty", "_to_copy", …
    dtype: torch.dtype
    data_ptr: int
    is_new: bool  # whether it lies in new memory


class Writes(_Inside):
    """Remembers what operations write to tensors of as many elements as one of a shape has."""

    def __init__(self, *shape: int):
        super().__init__()
        self._elements, self.seen = math.prod(shape), []

    def see(self, function, result, arguments):
        is_new = not lies_in(result, arguments)
        if result.numel() == self._elements and (is_new or function._schema.is_mutable):
            name = function._schema.name.partition("::")[2]
            self.seen.append(Write(name, result.dtype, result.data_ptr(), is_new))
