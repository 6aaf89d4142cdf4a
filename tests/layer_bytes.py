"""Bytes that elementwise work in the layers of a training step moves, counted with nothing allocated or run.

What a kernel reads and writes counts once, as if nothing stayed in a cache. Products and attention are left out: they
are the same for all. Counted are the body's forward and backward, from embeddings to the last norm.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig, AutoModel, PreTrainedModel

LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
}  # fmt: skip
TOKENS = 7574  # of eight pairs of UltraFeedback-like lengths at max_length 2048, each prompt once
_FREE = ("mm", "addmm", "bmm", "_unsafe_view", "empty", "empty_like", "new_empty", "detach")
_IN_PLACE = {"_triton_rope": ("q_ptr", "k_ptr"), "_swiglu_backward_kernel": ("a_ptr", "b_ptr")}  # read and written


class _Attention(torch.autograd.Function):
    """Takes and gives tensors as attention does, and computes nothing."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


AttentionInterface.register("uncounted", lambda module, q, k, v, *args, **options: (_Attention.apply(q, k, v), None))


class CountBytes(TorchDispatchMode):
    """Adds up what operations read and write, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and function.namespace == "aten" and name not in _FREE:
            self.add(name, [*tree_leaves((args, kwargs)), *tree_leaves(result)])
        return result

    def add(self, name: str, tensors: list) -> None:
        self.bytes[name] += sum(size(tensor) for tensor in tensors if isinstance(tensor, Tensor))

    @contextlib.contextmanager
    def triton_kernels(self) -> Iterator[None]:
        """Within it Triton's kernels are counted too, and not launched."""
        from triton.runtime.jit import JITFunction

        def run(kernel: JITFunction, *args, **options) -> None:
            given = dict(zip(kernel.arg_names, args, strict=False)) | options
            twice = [given[name] for name in _IN_PLACE.get(kernel.__name__, ())]
            self.add(kernel.__name__, [*given.values(), *twice])

        launch, JITFunction.run = JITFunction.run, run
        try:
            yield
        finally:
            JITFunction.run = launch


def size(tensor: Tensor) -> int:
    """Bytes of the entries that are there: an expanded dimension holds one."""
    entries = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= length if stride else 1
    return entries * tensor.element_size()


def body(dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    config = AutoConfig.for_model(**LLAMA_1B | ({} if layers is None else {"num_hidden_layers": layers}))
    return AutoModel.from_config(config, attn_implementation="uncounted", dtype=dtype).train()


def step(model: nn.Module, tokens: int, autocast: bool) -> None:
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    hidden.backward(torch.empty_like(hidden))


def count(
    autocast: bool, change: Callable[[PreTrainedModel], None] | None = None, layers: int | None = None
) -> Counter[str]:
    """Bytes of a step by operation; weights in bf16, or in fp32 with bf16 autocast. `change` may bring Triton in."""
    counter = CountBytes()
    with FakeTensorMode():
        model = body(torch.float32 if autocast else torch.bfloat16, layers)
        if change is not None:
            change(model)
        with counter, counter.triton_kernels() if change else contextlib.nullcontext():
            step(model, TOKENS, autocast)
    return counter.bytes


def count_compiled(autocast: bool) -> int:
    """Bytes of a step whose layers Inductor has fused, as it schedules them for a CPU; two lengths give the slope."""
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode, Scheduler

    found = []
    make = Scheduler.__init__

    def note(self: Scheduler, *args, **options) -> None:
        make(self, *args, **options)
        opaque = (ExternKernelSchedulerNode, NopKernelSchedulerNode)
        found[-1] += sum(node.get_read_write_buffers_sizes() for node in self.nodes if not isinstance(node, opaque))

    Scheduler.__init__ = note
    try:
        for tokens in (64, 128):
            found.append(0)
            torch._dynamo.reset()
            model = body(torch.float32 if autocast else torch.bfloat16, layers=1)
            model.layers[0].compile(dynamic=False)
            step(model, tokens, autocast)
    finally:
        Scheduler.__init__ = make
    layer = found[0] + (found[1] - found[0]) / 64 * (TOKENS - 64)
    return int(LLAMA_1B["num_hidden_layers"] * layer) + sum(count(autocast, layers=0).values())
