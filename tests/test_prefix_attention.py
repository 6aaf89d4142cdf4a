"""Shared-prefix attention equals dense attention under the mask that defines it: outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from dpo_fast_kernels import PrefixLayout, attention_backend, prefix_attention
from dpo_fast_kernels.reference import prefix_attention_reference
from numerics import assert_close_to_truth

GROUPS = {
    "pairs": [(11, 5, 9), (3, 7, 1)],
    "four completions": [(6, 1, 2, 9, 4)],
    "no prompt": [(0, 4, 6), (5, 3, 2)],
    "one token": [(1, 1, 1)],
}
OPTIONS = [
    {},
    {"window": 4},
    {"window": 100},
    {"softcap": 2.0},
    {"window": 5, "softcap": 3.0},
    {"scale": 0.3},
]


def inputs(groups, heads=(4, 2), head_dim=16, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(map(sum, groups))
    return [
        torch.randn(tokens, count, head_dim, generator=generator, dtype=torch.float64)
        .to(device=device, dtype=dtype)
        .requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    ]


def run(attention, tensors, layout, **options):
    """Output and gradients of a fixed random combination of its entries."""
    out = attention(*tensors, layout, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((out * weights.to(out)).sum(), tensors)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))


@pytest.mark.parametrize(
    ("backend", "options"),
    [*(("sdpa", options) for options in OPTIONS), ("flash-cpu", {}), ("flash-cpu", {"scale": 0.3, "window": 100})],
    ids=str,
)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_every_cpu_backend_equals_the_dense_definition(name, heads, backend, options):
    layout = PrefixLayout.build(GROUPS[name])
    tensors = inputs(GROUPS[name], heads)
    expected = run(prefix_attention_reference, tensors, layout, **options)
    actual = run(prefix_attention, tensors, layout, backend=backend, **options)
    for key, value in expected.items():
        assert torch.allclose(actual[key], value, atol=1e-12), key


def test_the_reference_is_differentiated_correctly():
    groups = [(3, 2, 1)]
    layout = PrefixLayout.build(groups)

    def attend(q, k, v):
        return prefix_attention_reference(q, k, v, layout, window=3, softcap=2.0)

    assert torch.autograd.gradcheck(attend, inputs(groups, head_dim=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_close_to_the_truth_as_eager(dtype):
    groups = [(63, 50, 77), (20, 31, 8, 5)]
    layout = PrefixLayout.build(groups)
    tensors = inputs(groups, head_dim=32, dtype=dtype)
    truth = run(prefix_attention_reference, [t.detach().double().requires_grad_() for t in tensors], layout)
    eager = run(prefix_attention_reference, tensors, layout)
    actual = run(prefix_attention, tensors, layout)
    for key in truth:
        assert_close_to_truth(actual[key], eager[key], truth[key], key)


def test_autocast_computes_in_its_dtype_whatever_the_inputs_are():
    groups = GROUPS["pairs"]
    layout = PrefixLayout.build(groups)
    q, k, v = (t.detach() for t in inputs(groups, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = prefix_attention(q, k, v.bfloat16(), layout)
    assert torch.equal(mixed, prefix_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), layout))


def test_moving_a_completion_moves_its_result_and_nothing_else():
    groups = [(5, 3, 4, 2)]
    layout = PrefixLayout.build(groups)
    q, k, v = (t.detach() for t in inputs(groups))
    swapped = torch.cat([torch.arange(8), torch.arange(12, 14), torch.arange(8, 12)])
    out = prefix_attention(q, k, v, layout)
    other = prefix_attention(q[swapped], k[swapped], v[swapped], PrefixLayout.build([(5, 3, 2, 4)]))
    assert torch.allclose(out[swapped], other, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "nope"}, "backend"),
        ({"backend": "varlen", "softcap": 1.0}, "softcap"),
        ({"backend": "flash-cpu", "softcap": 1.0}, "softcap"),
        ({"backend": "flash-cpu", "window": 3}, "window"),
        ({"heads": (3, 2)}, "heads"),
        ({"layout": [(2, 2, 2)]}, "tokens"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    groups = GROUPS["pairs"]
    layout = PrefixLayout.build(change.pop("layout", groups))
    tensors = inputs(groups, heads=change.pop("heads", (4, 2)))
    with pytest.raises(ValueError, match=message):
        prefix_attention(*tensors, layout, **change)


def test_backend_choice_names_its_reason():
    assert attention_backend(torch.device("cpu"))[0] == "flash-cpu"
    assert attention_backend(torch.device("cpu"), window=9)[0] == "sdpa"
    cuda = torch.device("cuda")
    assert attention_backend(cuda, torch.float32) == (
        "sdpa",
        "variable-length kernels compute in bf16 and fp16, not torch.float32",
    )
    assert attention_backend(cuda, head_dim=512)[0] == "sdpa"
    assert attention_backend(cuda)[0] in ("varlen", "flash-attn")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"window": 300}], ids=str)
def test_gpu_backend_is_as_close_to_the_truth_as_eager(dtype, head_dim, options):
    groups = [(507, 300, 411), (1, 63, 100), (700, 5, 250, 33, 90)]
    layout = PrefixLayout.build(groups).to("cuda")
    tensors = inputs(groups, heads=(8, 2), head_dim=head_dim, dtype=dtype, device="cuda")
    backend, _ = attention_backend(torch.device("cuda"), dtype, head_dim)
    assert backend != "sdpa"
    truth = run(prefix_attention_reference, [t.detach().double().requires_grad_() for t in tensors], layout, **options)
    eager = run(prefix_attention_reference, tensors, layout, **options)
    actual = run(prefix_attention, tensors, layout, backend=backend, **options)
    again = run(prefix_attention, tensors, layout, backend=backend, **options)
    for key in truth:
        assert_close_to_truth(actual[key], eager[key], truth[key], key)
    assert torch.equal(actual["out"], again["out"])


@pytest.mark.gpu
def test_gpu_backend_never_waits_for_the_device():
    groups = [(507, 300, 411), (100, 63, 100)]
    layout = PrefixLayout.build(groups).to("cuda")
    tensors = inputs(groups, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, device="cuda")
    prefix_attention(*tensors, layout).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefix_attention(*tensors, layout).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
