"""Host syncs and time by part, of one more step that no figure of speed counts.

Parts, from hooks on the model and marks on a clock (events of the stream on a GPU, so nothing waits):

    data       fetching, collating and moving the micro-batches
    forward    the model's body
    head       what follows the body in the model's forward, and precedes the body in the backward
    backward   from there on, with what checkpointing computes again
    optimizer  clipping the gradients, and the step
    rest       losses and metrics outside the model, scheduler, bookkeeping
    logging    writing the log of the step before (in a step that is not logged there is none)

A host sync is where the host waits for the device. On a GPU PyTorch's sync debug mode reports them. On a CPU, where
none waits, they are the operations that would: those whose result or size the host must know (`.item()`, `nonzero`, a
boolean index), once the data are there: collating runs on the host anyway.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

PARTS = ("data", "forward", "head", "backward", "optimizer", "rest", "logging")
_Instant = Any  # seconds on a CPU, an event on a GPU


class CountHostReads(TorchDispatchMode):
    """Counts the operations that would make a host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += _host_reads(func, args)
        return func(*args, **(kwargs or {}))


def _host_reads(func: Any, args: tuple) -> bool:
    if func is torch.ops.aten.index.Tensor:  # data-dependent for boolean indices alone
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


class _CountSyncs(ExitStack):
    """Counts the warnings of CUDA's sync debug mode."""

    def __enter__(self) -> _CountSyncs:
        super().__enter__()
        self._seen = self.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        self.callback(torch.cuda.set_sync_debug_mode, "default")
        return self

    @property
    def count(self) -> int:
        return sum("called a synchronizing" in str(warning.message) for warning in self._seen)


class StepProbe:
    """Watches one optimizer step of a model, from its construction to `close`.

    Args:
        model: the model that the training loop calls.
        logging_seconds: seconds that the log of the step before took.
    """

    def __init__(self, model: nn.Module, logging_seconds: float):
        self._model, self._logging_seconds, self._cuda = model, logging_seconds, torch.cuda.is_available()
        self._spans: dict[str, list[tuple[_Instant, _Instant]]] = defaultdict(list)
        self._hooks = ExitStack()
        self._reads: CountHostReads | _CountSyncs = _CountSyncs() if self._cuda else CountHostReads()
        self._mark_modules()
        self._mark_backward()
        self._mark_optimizer()
        if self._cuda:
            self._hooks.enter_context(self._reads)
        self._began = self._now()

    def _now(self) -> _Instant:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, began: _Instant, ended: _Instant) -> float:
        return began.elapsed_time(ended) / 1000 if self._cuda else ended - began

    def data_ready(self) -> None:
        """Note that the micro-batches of the step are on the device."""
        self._spans["data"].append((self._began, self._now()))
        if not self._cuda:
            self._hooks.enter_context(self._reads)

    def close(self) -> dict[str, Any]:
        """Return the host syncs of the step and its seconds by part, after its end."""
        ended = self._now()
        self._hooks.close()
        if self._cuda:
            torch.cuda.synchronize()
        parts = {part: sum(self._seconds(*span) for span in self._spans[part]) for part in PARTS[:-2]}
        parts["rest"] = max(0.0, self._seconds(self._began, ended) - sum(parts.values()))
        parts["logging"] = self._logging_seconds
        return {"host_syncs": self._reads.count, "seconds_by_part": parts}

    def _mark_modules(self) -> None:
        body = _body(self._model)
        marks = {}

        def body_begins(*args: Any) -> None:
            marks["body"] = self._now()

        def body_ends(module: nn.Module, args: Any, output: Any) -> None:
            marks["head"] = self._now()
            self._spans["forward"].append((marks["body"], marks["head"]))
            if output[0].requires_grad:
                output[0].register_hook(self._gradient_of_body_known)

        def model_ends(*args: Any) -> None:
            self._spans["head"].append((marks["head"], self._now()))

        for handle in (
            body.register_forward_pre_hook(body_begins),
            body.register_forward_hook(body_ends),
            self._model.register_forward_hook(model_ends),
        ):
            self._hooks.callback(handle.remove)

    def _gradient_of_body_known(self, gradient: Tensor) -> None:
        now = self._now()
        self._spans["head"].append((self._backward_began, now))
        self._backward_began = now

    def _mark_backward(self) -> None:
        stock = Tensor.backward

        def backward(*args: Any, **kwargs: Any) -> None:
            self._backward_began = self._now()
            stock(*args, **kwargs)
            self._spans["backward"].append((self._backward_began, self._now()))

        self._replace(Tensor, "backward", backward)

    def _mark_optimizer(self) -> None:
        clip = torch.nn.utils.clip_grad_norm_
        marks = {}

        def clip_marked(*args: Any, **kwargs: Any) -> Tensor:
            began = self._now()
            norm = clip(*args, **kwargs)
            self._spans["optimizer"].append((began, self._now()))
            return norm

        def step_begins(*args: Any) -> None:
            marks["step"] = self._now()

        def step_ends(*args: Any) -> None:
            self._spans["optimizer"].append((marks["step"], self._now()))

        self._replace(torch.nn.utils, "clip_grad_norm_", clip_marked)
        self._hooks.callback(register_optimizer_step_pre_hook(step_begins).remove)
        self._hooks.callback(register_optimizer_step_post_hook(step_ends).remove)

    def _replace(self, owner: Any, name: str, function: Callable) -> None:
        self._hooks.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, function)


def _body(model: nn.Module) -> nn.Module:
    """Return the decoder under adapters and heads."""
    model = getattr(model, "causal_lm", model)  # of the plain loop
    return (model.get_base_model() if hasattr(model, "peft_config") else model).base_model
