"""Shared-prefix attention equals dense attention under the mask that defines it, outputs and gradients, whatever the
backend; and it is an op that PyTorch's own checks pass and that torch.compile takes whole."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.library import opcheck

from dpo_fast_kernels import PrefixLayout, attention_backend, prefix_attention
from dpo_fast_kernels.attention import backend_varlen
from dpo_fast_kernels.autograd import recording
from dpo_fast_kernels.specification import prefix_attention_reference
from numerics import assert_close_to_truth

module = sys.modules[
    "dpo_fast_kernels.attention.prefix_attention"
]  # the package's attribute of this name is the function

GROUPS = {
    "pairs": [(11, 5, 9), (3, 7, 1)],
    "four completions": [(6, 1, 2, 9, 4)],
    "no prompt": [(0, 4, 6), (5, 3, 2)],
    "one token": [(1, 1, 1)],
    "empty completions": [(4, 0, 3), (2, 3, 0, 0, 2), (5, 2)],
}
OPTIONS = [
    {},
    {"window": 4},
    {"window": 100},
    {"softcap": 2.0},
    {"window": 5, "softcap": 3.0},
    {"scale": 0.3},
]
CPU_CASES = [*(("sdpa", options) for options in OPTIONS), ("flash-cpu", {}), ("flash-cpu", {"scale": 0.3})]
CUDA_BACKENDS = ("triton", "varlen", "flash-attn", "sdpa")


def inputs(groups, heads=(4, 2), head_dim=16, dtype=torch.float64, device="cpu", value_dim=None):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(map(sum, groups))
    shapes = [(heads[0], head_dim), (heads[1], head_dim), (heads[1], value_dim or head_dim)]
    return [
        torch.randn(tokens, *shape, generator=generator, dtype=torch.float64)
        .to(device=device, dtype=dtype)
        .requires_grad_()
        for shape in shapes
    ]


def run(attention, tensors, layout, **options):
    """Output and gradients of a fixed random combination of its entries."""
    out = attention(*tensors, layout, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(out, tensors, weights.to(out))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))


def double(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def layout_tensors(layout):
    keys = layout.keys
    return (
        *(layout.segments, layout.cu_seqlens_q, layout.cu_seqlens_k, layout.spans),
        *(keys.index, keys.uses, keys.use_offsets),
    )


@pytest.mark.parametrize(("backend", "options"), [*CPU_CASES, ("flash-cpu", {"window": 100})], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_every_cpu_backend_equals_the_dense_definition(name, heads, backend, options):
    layout = PrefixLayout.build(GROUPS[name])
    tensors = inputs(GROUPS[name], heads)
    expected = run(prefix_attention_reference, tensors, layout, **options)
    actual = run(prefix_attention, tensors, layout, backend=backend, **options)
    for key, value in expected.items():
        assert torch.allclose(actual[key], value, atol=1e-12), key


def test_values_may_have_another_head_size():
    groups = GROUPS["pairs"]
    layout = PrefixLayout.build(groups)
    tensors = inputs(groups, value_dim=24)
    expected = run(prefix_attention_reference, tensors, layout)
    for backend in ("auto", "sdpa"):
        actual = run(prefix_attention, tensors, layout, backend=backend)
        assert all(torch.allclose(actual[key], expected[key], atol=1e-12) for key in expected)


def test_the_reference_is_differentiated_correctly():
    groups = [(3, 2, 1)]
    layout = PrefixLayout.build(groups)

    def attend(q, k, v):
        return prefix_attention_reference(q, k, v, layout, window=3, softcap=2.0)

    assert torch.autograd.gradcheck(attend, inputs(groups, head_dim=4))


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_as_close_to_the_truth_as_eager(dtype, backend):
    groups = [(63, 50, 77), (20, 31, 8, 5)]
    layout = PrefixLayout.build(groups)
    tensors = inputs(groups, head_dim=32, dtype=dtype)
    truth = run(prefix_attention_reference, double(tensors), layout)
    eager = run(prefix_attention_reference, tensors, layout)
    actual = run(prefix_attention, tensors, layout, backend=backend)
    for key in truth:
        assert_close_to_truth(actual[key], eager[key], truth[key], key)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_tensors_need_not_be_contiguous(backend):
    groups = GROUPS["pairs"]
    layout = PrefixLayout.build(groups)
    tensors = inputs(groups)
    views = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in tensors]
    assert not views[0].is_contiguous()
    expected, actual = (run(prefix_attention, which, layout, backend=backend) for which in (tensors, views))
    assert all(torch.allclose(actual[key], expected[key], atol=1e-13) for key in expected)


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


@pytest.mark.parametrize("name", GROUPS)
def test_the_layout_says_the_same_in_segments_and_in_spans(name):
    layout = PrefixLayout.build(GROUPS[name])
    tokens = layout.spans.shape[1]
    by_segments = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, length, prefix, shared in layout.segments.tolist():
        by_segments[start : start + length, prefix : prefix + shared] = True
        by_segments[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    prompt_start, prompt_end, own_start, run_end, last_query = layout.spans[:, :, None].long()
    by_query = ((own_start <= j) & (j <= i)) | ((prompt_start <= j) & (j < prompt_end))
    by_key = (j <= i) & (i < last_query.T)
    assert torch.equal(by_query, by_segments) and torch.equal(by_key, by_segments)
    one_run = (own_start <= j) & (j < run_end)
    assert torch.equal(one_run, own_start == own_start.T), "own_start and run_end bound the same runs"
    lengths = torch.stack([layout.segments[:, 1], layout.segments[:, 1] + layout.segments[:, 3]])
    assert torch.equal(layout.cu_seqlens_q.diff(), lengths[0]) and torch.equal(layout.cu_seqlens_k.diff(), lengths[1])
    assert layout.groups == tuple(GROUPS[name])


def test_the_host_keeps_what_only_the_host_reads():
    layout = PrefixLayout.build(GROUPS["pairs"]).to("meta")
    assert layout.segments.device.type == "cpu"
    assert {tensor.device.type for tensor in layout_tensors(layout)[1:]} == {"meta"}


@pytest.mark.parametrize(("backend", "options"), CPU_CASES, ids=str)
def test_the_ops_pass_pytorchs_checks(backend, options):
    groups = GROUPS["four completions"]
    layout = PrefixLayout.build(groups)
    q, k, v = inputs(groups)
    rest = (
        *layout_tensors(layout),
        *(options.get("scale", 0.25), options.get("window"), options.get("softcap"), backend),
    )
    opcheck(torch.ops.dpo_fast.prefix_attention, (q, k, v, *rest))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = torch.ops.dpo_fast.prefix_attention(q, k, v, *rest)
    opcheck(torch.ops.dpo_fast.prefix_attention_bwd, (torch.ones_like(out), q, k, v, out, lse, *rest))


@pytest.mark.parametrize(
    "options", [{}, {"window": 4}, {"window": 12, "backend": "auto"}, {"softcap": 2.0}, {"backend": "sdpa"}], ids=str
)
def test_one_graph_serves_every_batch(options):
    def loss(x, weight, layout):
        q, k, v = (x @ weight).unflatten(1, (8, 16)).split([4, 2, 2], dim=1)
        return prefix_attention(q, k, v, layout, **options).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = torch.randn(24, 128, dtype=torch.float64, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("pairs", "four completions", "no prompt"):
            layout = PrefixLayout.build([*GROUPS[name], (2, 1, 1)])
            x = torch.randn(layout.spans.shape[1], 24, dtype=torch.float64)
            results = []
            for function in (loss, compiled):
                value = function(x, weight, layout)
                results.append((value.detach(), *torch.autograd.grad(value, weight)))
            for eager, actual in zip(*results, strict=True):
                assert torch.allclose(actual, eager, rtol=1e-12)


def test_the_graph_keeps_no_copies_of_keys():
    """What the backward needs is q, k, v, the output and its log-sum-exps, beside the layout."""
    groups = GROUPS["four completions"]
    layout = PrefixLayout.build(groups)
    tensors = inputs(groups)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = prefix_attention(*tensors, layout, backend="sdpa", softcap=2.0)
    floating = [x for x in saved if x.is_floating_point()]
    assert len(floating) == 5 and sum(x.numel() for x in floating) == sum(x.numel() for x in (*tensors, out)) + 4 * 22


def segmentwise(q, k, v, cu_q, cu_k, scale, window, softcap):
    """What FlashAttention's variable-length call is documented to compute: the mask is aligned bottom-right."""
    outs, lses = [], []
    repeats = q.shape[1] // k.shape[1]
    for segment in range(len(cu_q) - 1):
        rows, columns = slice(*cu_q[segment : segment + 2].tolist()), slice(*cu_k[segment : segment + 2].tolist())
        keys, values = (x[columns].repeat_interleave(repeats, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[rows], keys) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        distance = torch.arange(keys.shape[0] - q[rows].shape[0], keys.shape[0])[:, None] - torch.arange(keys.shape[0])
        visible = (distance >= 0) & (distance < (window or keys.shape[0] + 1))
        scores = scores.masked_fill(~visible, -torch.inf)
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, dim=1)


def segmentwise_backward(dout, q, k, v, *rest):
    with recording():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(segmentwise(*leaves, *rest)[0], leaves, dout)


def window_of(causal, left, right, none=None):
    """The window that the arguments of both kernels mean: none has to be causal, one has to end at the query."""
    assert (left, right) == (none, none) if causal and right == none else right == 0
    return None if left == none else left + 1


def stand_in_for_pytorch(monkeypatch):
    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, **options):
        known = {"return_debug_mask", "scale", "window_size_left", "window_size_right"}
        assert set(options) == known, "what PyTorch 2.11 has too, and no more"
        assert causal == (options["window_size_left"] is None) and dropout == 0
        assert max_q >= cu_q.diff().max() and max_k >= cu_k.diff().max() and q.is_contiguous()
        window = window_of(causal, options["window_size_left"], options["window_size_right"])
        out, lse = segmentwise(q, k, v, cu_q, cu_k, options["scale"], window, None)
        return out, lse, torch.zeros(2), torch.zeros(0), torch.zeros(0)

    def backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused, **options):
        assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
        assert not torch.is_deterministic_algorithms_warn_only_enabled(), "the kernel would only warn"
        window = window_of(causal, options["window_size_left"], options["window_size_right"])
        return segmentwise_backward(dout, q, k, v, cu_q, cu_k, options["scale"], window, None)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)


def stand_in_for_flash_attn(monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert return_attn_probs and dropout_p == 0
        window = window_of(causal, *window_size, none=-1)
        return *segmentwise(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window, softcap), None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert deterministic and dropout_p == 0 and alibi_slopes is None
        window = window_of(causal, window_size_left, window_size_right, none=-1)
        rest = (cu_seqlens_q, cu_seqlens_k, softmax_scale, window, softcap)
        for into, gradient in zip((dq, dk, dv), segmentwise_backward(dout, q, k, v, *rest), strict=True):
            into.copy_(gradient)

    interface = SimpleNamespace(
        flash_attn_varlen_func=flash_attn_varlen_func, _flash_attn_varlen_backward=_flash_attn_varlen_backward
    )
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_interface=interface))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)


@pytest.mark.parametrize(
    ("backend", "options"),
    [(backend, options) for backend in ("varlen", "flash-attn") for options in OPTIONS if "softcap" not in options]
    + [("flash-attn", {"softcap": 2.0}), ("flash-attn", {"window": 5, "softcap": 3.0})],
    ids=str,
)
@pytest.mark.parametrize("name", GROUPS)
def test_variable_length_kernels_are_called_for_the_dense_definition(name, backend, options, monkeypatch):
    """Kernels that need a GPU, replaced by what they are documented to compute: gathers, windows, sums are ours."""
    (stand_in_for_pytorch if backend == "varlen" else stand_in_for_flash_attn)(monkeypatch)
    monkeypatch.setattr(module, "_obstacle", lambda *args: None)
    layout = PrefixLayout.build(GROUPS[name])
    tensors = inputs(GROUPS[name])
    expected = run(prefix_attention_reference, tensors, layout, **options)
    torch.utils.deterministic.fill_uninitialized_memory = True
    actual = run(prefix_attention, tensors, layout, backend=backend, **options)
    for key, value in expected.items():
        assert torch.allclose(actual[key], value, atol=1e-12), key
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


def test_pytorchs_kernels_take_the_arguments_they_get():
    """Their real schemas, without a GPU: on tensors that have shapes only."""
    layout = PrefixLayout.build(GROUPS["pairs"]).to("meta")
    q, k, v = (x.detach().to("meta", torch.bfloat16) for x in inputs(GROUPS["pairs"]))
    keys, values = (x.index_select(0, layout.keys.index) for x in (k, v))
    for window in (None, 4):
        call = backend_varlen._Call.of(layout, 0.25, window, None)
        out, lse = backend_varlen._forward_aten(q, keys, values, call)
        assert out.shape == q.shape and lse.shape == (q.shape[1], q.shape[0])
        gradients = backend_varlen._backward_aten(out, q, keys, values, out, lse, call)
        assert [x.shape for x in gradients] == [x.shape for x in (q, keys, values)]


def test_a_longest_segment_of_one_query_is_announced_as_longer():
    """FlashAttention folds heads into rows for it, and its log-sum-exps get another shape."""
    layout = PrefixLayout.build([(0, 1, 1)])
    assert backend_varlen._Call.of(layout, 1.0, None, None).lengths[2:] == (2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "nope"}, "backend is 'nope'"),
        ({"backend": "varlen"}, "needs CUDA"),
        ({"backend": "flash-attn"}, "needs CUDA"),
        ({"backend": "triton"}, "needs CUDA"),
        ({"backend": "flash-cpu", "softcap": 1.0}, "softcap"),
        ({"backend": "flash-cpu", "window": 3}, "window"),
        ({"backend": "flash-cpu", "value_dim": 8}, "one head size"),
        ({"heads": (3, 2)}, "heads"),
        ({"layout": [(2, 2, 2)]}, "tokens"),
        ({"scale": 0.0}, "scale"),
        ({"window": -1}, "window"),
        ({"softcap": -2.0}, "softcap"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    groups = GROUPS["pairs"]
    layout = PrefixLayout.build(change.pop("layout", groups))
    tensors = inputs(groups, heads=change.pop("heads", (4, 2)), value_dim=change.pop("value_dim", None))
    with pytest.raises(ValueError, match=message):
        prefix_attention(*tensors, layout, **change)


def test_tensors_that_do_not_fit_together_are_refused_by_name():
    groups = GROUPS["pairs"]
    layout = PrefixLayout.build(groups)
    q, k, v = inputs(groups)
    for tensors, message in [
        ((q, k.float(), v), "k must be torch.float64 on cpu"),
        ((q, k, v[:, 0]), "v must have shape"),
        ((q, k, v[:, :1]), "heads"),
        ((q[..., :8], k, v), "head size 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            prefix_attention(*tensors, layout)
    with pytest.raises(ValueError, match="layout is on meta"):
        prefix_attention(q, k, v, layout.to("meta"))
    for groups in ([], [(3,)], [(2, -1, 4)]):
        with pytest.raises(ValueError, match="groups"):
            PrefixLayout.build(groups)


def test_backend_choice_names_its_reason():
    assert attention_backend(torch.device("cpu"))[0] == "flash-cpu"
    assert attention_backend(torch.device("cpu"), window=9) == (
        "sdpa",
        "PyTorch's CPU flash kernel has no window and no softcap",
    )
    assert attention_backend(torch.device("mps"))[0] == "sdpa"
    cuda = torch.device("cuda")
    assert attention_backend(cuda, torch.float32) == (
        "sdpa",
        "variable-length kernels compute in bf16 and fp16, not torch.float32",
    )
    assert attention_backend(cuda, head_dim=512)[0] == attention_backend(cuda, head_dim=100)[0] == "sdpa"
    assert attention_backend(cuda)[0] in ("varlen", "flash-attn")


def on_gpu(backend, dtype, head_dim=64, softcap=None):
    obstacle = module._obstacle(backend, torch.device("cuda"), dtype, head_dim, head_dim, softcap, None)
    if obstacle is not None:
        pytest.skip(obstacle)


RICH = {"window": 129, "softcap": 5.0}
GPU_CASES = [
    *((torch.bfloat16, size, options) for size in (64, 128, 256) for options in ({}, {"window": 300}, RICH)),
    *((torch.bfloat16, size, {}) for size in (16, 80)),
    *((dtype, size, {}) for dtype in (torch.float16, torch.float32) for size in (64, 128, 256)),
    (torch.bfloat16, 128, {"softcap": 20.0}),
    (torch.float32, 64, RICH),
]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize(("dtype", "head_dim", "options"), GPU_CASES, ids=str)
def test_gpu_backends_are_as_close_to_the_truth_as_eager(backend, dtype, head_dim, options):
    on_gpu(backend, dtype, head_dim, options.get("softcap"))
    groups = [(507, 300, 411), (1, 63, 100), (700, 5, 250, 33, 90), (0, 64, 1)]
    layout = PrefixLayout.build(groups).to("cuda")
    tensors = inputs(groups, heads=(8, 2), head_dim=head_dim, dtype=dtype, device="cuda")
    truth = run(prefix_attention_reference, double(tensors), layout, **options)
    eager = run(prefix_attention_reference, tensors, layout, **options)
    actual = run(prefix_attention, tensors, layout, backend=backend, **options)
    again = run(prefix_attention, tensors, layout, backend=backend, **options)
    for key in truth:
        assert_close_to_truth(actual[key], eager[key], truth[key], key)
        assert torch.equal(actual[key], again[key]), f"{key} differs from run to run"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("heads", [(4, 1), (3, 3), (12, 2)], ids=str)
def test_gpu_backends_share_key_heads(backend, heads):
    on_gpu(backend, torch.bfloat16)
    groups = [(200, 100, 37), (64, 128, 1, 63)]
    layout = PrefixLayout.build(groups).to("cuda")
    tensors = inputs(groups, heads=heads, head_dim=64, dtype=torch.bfloat16, device="cuda")
    truth = run(prefix_attention_reference, double(tensors), layout)
    eager = run(prefix_attention_reference, tensors, layout)
    actual = run(prefix_attention, tensors, layout, backend=backend)
    for key in truth:
        assert_close_to_truth(actual[key], eager[key], truth[key], key)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("options", [{}, {"window": 300}], ids=str)
def test_gpu_backends_never_wait_for_the_device_and_repeat_bitwise(backend, options):
    on_gpu(backend, torch.bfloat16, 128)
    groups = [(1024, 512, 700), (100, 63, 100), (512, 256, 256, 256, 256)]
    layout = PrefixLayout.build(groups).pin_memory().to("cuda", non_blocking=True)
    tensors = inputs(groups, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, device="cuda")
    weights = torch.randn_like(tensors[0])

    def step():
        out = prefix_attention(*tensors, layout, backend=backend, **options)
        return out, *torch.autograd.grad(out, tensors, weights)

    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = [step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for again in runs:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_gpu_one_graph_serves_every_batch():
    def loss(q, k, v, layout):
        return prefix_attention(q * 1.0, k, v, layout).float().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for groups in ([(200, 100, 37)], [(64, 128, 70, 63), (5, 6, 7)], [(31, 1, 2)] * 9):
            layout = PrefixLayout.build(groups).to("cuda")
            tensors = inputs(groups, head_dim=64, dtype=torch.bfloat16, device="cuda")
            expected, actual = (
                torch.autograd.grad(function(*tensors, layout), tensors) for function in (loss, compiled)
            )
            assert all(torch.allclose(a, b, atol=1e-2, rtol=1e-2) for a, b in zip(actual, expected, strict=True))
