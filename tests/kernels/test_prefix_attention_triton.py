"""The Triton kernels of shared-prefix attention: as near the truth as eager PyTorch, outputs and gradients, wherever
groups fall on blocks; the same bits in every run.

The checks run under Triton's interpreter, in processes of their own, with blocks so small that a few dozen tokens make
every kind of block. `test_prefix_attention.py` holds the kernels to the same on a GPU, in their real configurations.
"""

from __future__ import annotations

import random

import pytest
import torch
from test_prefix_attention import double, inputs, run

from dpo_fast_kernels import PrefixLayout, prefix_attention
from dpo_fast_kernels.specification import prefix_attention_reference
from interpreting import interpreted
from numerics import assert_close_to_truth

SHAPES = {
    "pairs": [(11, 5, 9), (3, 7, 1)],
    "four completions": [(6, 1, 2, 9, 4)],
    "no prompt": [(0, 4, 6), (5, 3, 2)],
    "one token everything": [(1, 1, 1)] * 7,
    "a single token": [(0, 1)],
    "one completion": [(20, 9), (0, 33)],
    "empty completions": [(18, 0, 20), (7, 3, 0, 0, 2), (0, 0, 5)],
    "a group of many blocks": [(37, 19, 23, 40)],
    "a block of many groups": [(2, 1, 1), (1, 2, 1), (3, 1, 2), (1, 1, 3), (2, 2, 2)],
    "long after short": [(1, 1, 1), (1, 2, 1), (30, 14, 21), (2, 1)],
}
OPTIONS = [{}, {"window": 1}, {"window": 7}, {"window": 25}, {"softcap": 2.0}, {"window": 11, "softcap": 3.0}]


def tables() -> list[dict]:
    from dpo_fast_kernels.attention import triton_configs as configs

    found = [value for value in vars(configs).values() if isinstance(value, dict) and (64, 2) in value]
    assert configs.dkv_table(1, None) in found and configs.fwd_table(1.0) in found and len(found) == 6
    return found


def use_blocks(block_q: int, block_k: int) -> None:
    """Gives every kernel these blocks."""
    from dpo_fast_kernels.attention import triton_configs as configs

    for table in tables():
        for key in table:
            table[key] = {9: configs._blocks(block_q, block_k, 4, 1)}


def check(groups, dtype=torch.float32, heads=(2, 1), head_dim=16, **options) -> None:
    layout = PrefixLayout.build(groups)
    tensors = inputs(groups, heads, head_dim, dtype)
    truth = run(prefix_attention_reference, double(tensors), layout, **options)
    eager = run(prefix_attention_reference, tensors, layout, **options)
    actual = run(prefix_attention, tensors, layout, backend="triton", **options)
    largest = max(value.abs().max() for value in truth.values())
    for key, value in truth.items():
        name = f"{key} of {groups} {heads} {head_dim} {options}"
        if value.any():
            assert_close_to_truth(actual[key], eager[key], value, name)
        else:  # no query sees more than one key: p·(dp − δ) is 0, and the kernel makes dp and δ by different sums
            assert actual[key].abs().max() <= 8 * torch.finfo(torch.float32).eps * largest, name


def check_shapes() -> int:
    for block_q, block_k in ((16, 16), (32, 8), (8, 32)):
        use_blocks(block_q, block_k)
        for groups in SHAPES.values():
            check(groups)
    return 3 * len(SHAPES)


def check_options() -> int:
    use_blocks(16, 16)
    names = ("pairs", "a group of many blocks", "empty completions")
    for options in OPTIONS:
        for name in names:
            check(SHAPES[name], **options)
        check(SHAPES["long after short"], torch.float16, scale=0.4, **options)
    return len(OPTIONS) * (len(names) + 1)


def check_heads() -> int:
    use_blocks(16, 16)
    groups = [(14, 6, 9), (2, 3, 1)]
    cases = [((4, 2), 64), ((4, 1), 64), ((3, 3), 64), ((2, 1), 80), ((2, 2), 7), ((1, 1), 130)]
    for heads, head_dim in cases:
        for dtype in (torch.float32, torch.float16):
            check(groups, dtype, heads, head_dim)
        check(groups, heads=heads, head_dim=head_dim, window=8, softcap=2.0)
    return 3 * len(cases)


def check_fuzz() -> int:
    """Random groups, options and blocks."""
    generator = random.Random(0)
    count = 40
    for _ in range(count):
        use_blocks(generator.choice([8, 16, 32]), generator.choice([8, 16, 32]))
        groups = []
        for _ in range(generator.randint(1, 4)):
            longest = generator.choice([2, 9, 30])
            lengths = [generator.randint(0, longest) for _ in range(generator.randint(1, 4))]
            groups.append((generator.randint(0, longest), 1, *lengths))
        options = {}
        if generator.random() < 0.5:
            options["window"] = generator.randint(1, 40)
        if generator.random() < 0.25:
            options["softcap"] = 2.5
        check(groups, generator.choice([torch.float32, torch.float16]), **options)
    return count


def check_memory() -> int:
    """Bits repeat, strides may be any, and offsets pass 2³¹ elements."""
    from dpo_fast_kernels.attention.triton_dkv import prefix_attention_bwd
    from dpo_fast_kernels.attention.triton_fwd import prefix_attention_fwd

    use_blocks(16, 16)
    groups = [(9, 4, 5), (2, 1, 1)]
    layout = PrefixLayout.build(groups)
    q, k, v = (x.detach() for x in inputs(groups, (4, 2), 16, torch.float16))
    options = {"scale": 0.25, "window": None, "softcap": None}

    def both(q, k, v):
        out, lse = prefix_attention_fwd(q, k, v, layout.spans, **options)
        return (
            out,
            lse,
            *prefix_attention_bwd(torch.cos(out.float()).half(), q, k, v, out, lse, layout.spans, **options),
        )

    expected = both(q, k, v)
    for views in ((q, k, v), [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)], far_views(q, k, v)):
        assert all(torch.equal(a, b) for a, b in zip(both(*views), expected, strict=True))
    assert torch.equal(both(*(x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)))[0], expected[0])
    return 4


def far_views(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same rows, so far apart that the last ones begin 2³¹ elements into the memory."""
    tokens = tensors[0].shape[0]
    step = -(-(2**31) // (tokens - 2)) // 64 * 64
    size = sum(x[0].numel() for x in tensors)
    memory = torch.empty(tokens * step + size, dtype=tensors[0].dtype, device=tensors[0].device)
    views, offset = [], 0
    for x in tensors:
        views.append(memory.as_strided(x.shape, (step, x.shape[2], 1), offset).copy_(x))
        offset += x[0].numel()
    assert views[-1].stride(0) * (tokens - 1) > 2**31
    return views


@pytest.mark.parametrize(
    ("part", "count"),
    [("shapes", 30), ("options", 24), ("heads", 18), pytest.param("fuzz", 40, marks=pytest.mark.slow), ("memory", 4)],
)
def test_kernels_interpreted(part, count):
    flags = ("-W", "error::RuntimeWarning")
    assert interpreted("test_prefix_attention_triton", f"check_{part}()", *flags) == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 300}, "head size 256"),
        ({"value_dim": 8}, "one head size"),
        ({"dtype": torch.float64}, "bf16, fp16 and fp32"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_refused_by_name(change, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    groups = SHAPES["pairs"]
    tensors = inputs(groups, **{"dtype": torch.float32, **change})
    with pytest.raises(ValueError, match=message):
        prefix_attention(*tensors, PrefixLayout.build(groups), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu_offsets_pass_two_to_the_31(dtype):
    groups = [(300, 100, 90), (5, 60, 70)]
    layout = PrefixLayout.build(groups).to("cuda")
    tensors = inputs(groups, heads=(4, 2), head_dim=64, dtype=dtype, device="cuda")
    far = [x.requires_grad_() for x in far_views(*(x.detach() for x in tensors))]
    expected, actual = (run(prefix_attention, which, layout, backend="triton") for which in (tensors, far))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gpu_every_candidate_of_the_tuner_computes_the_same(softcap, monkeypatch):
    """A tuner may take any of them that the chip has memory for."""
    from triton.runtime.errors import OutOfResources

    from dpo_fast_kernels.attention import triton_configs as configs

    groups = [(207, 130, 141), (1, 63, 100)]
    layout = PrefixLayout.build(groups).to("cuda")
    tensors = inputs(groups, heads=(4, 2), head_dim=64, dtype=torch.bfloat16, device="cuda")
    truth = run(prefix_attention_reference, double(tensors), layout, softcap=softcap)
    eager = run(prefix_attention_reference, tensors, layout, softcap=softcap)
    ran = 0
    for config in configs.CANDIDATES:
        for table in tables():
            monkeypatch.setitem(table, (64, 2), dict.fromkeys((8, 9, 10, 12), config))
        try:
            actual = run(prefix_attention, tensors, layout, backend="triton", softcap=softcap)
        except OutOfResources:
            continue
        ran += 1
        for key in truth:
            assert_close_to_truth(actual[key], eager[key], truth[key], f"{key} with {config}")
    assert ran > len(configs.CANDIDATES) // 2
