"""FlashAttention-3 and -4, activated in the place of PyTorch's own: they are recognised, asked for nothing that they
refuse, and get no window where there is none.

PyTorch's own checks of them run here; their kernels, which need a GPU, are stand-ins.
"""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import _fa3, _fa4, _registry, activate_flash_attention_impl, restore_flash_attention_impl

from dpo_fast_kernels import PrefixLayout, attention_backend
from dpo_fast_kernels.attention import backend_sdpa, backend_varlen, prefix_attention
from dpo_fast_kernels.attention.flash_implementations import (
    active_flash_implementation,
    flash_obstacle,
    installed_flash_implementations,
)

CUDA = torch.device("cuda")
GROUPS = [(5, 3, 4), (2, 6, 1, 3)]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of some capability, without the package flash-attn, on which an implementation is activated."""

    def pretend(implementation, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(prefix_attention, "_import_error", lambda module: "not installed")
        handle = SimpleNamespace(remove=lambda: None)
        monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, implementation, lambda: handle)
        activate_flash_attention_impl(implementation)

    yield pretend
    restore_flash_attention_impl(_raise_warn=False)


def test_nothing_is_activated_unless_somebody_does():
    assert active_flash_implementation(CUDA) is None


@pytest.mark.parametrize(("implementation", "name"), [("FA3", "FlashAttention-3"), ("FA4", "FlashAttention-4")])
def test_what_is_activated_is_recognised_on_cuda_alone(gpu, implementation, name):
    gpu(implementation)
    assert active_flash_implementation(CUDA) == implementation
    assert attention_backend(CUDA) == ("varlen", f"{name}, activated in PyTorch")
    assert active_flash_implementation(torch.device("cpu")) is None
    assert attention_backend(torch.device("cpu"))[0] == "flash-cpu"


def test_what_is_activated_goes_before_the_package(gpu, monkeypatch):
    monkeypatch.setattr(prefix_attention, "_import_error", lambda module: None)
    assert attention_backend(CUDA)[0] == "flash-attn"
    gpu("FA3")
    monkeypatch.setattr(prefix_attention, "_import_error", lambda module: None)
    assert attention_backend(CUDA)[0] == "varlen"
    assert attention_backend(CUDA, softcap=5.0)[0] == attention_backend(CUDA, head_dim=256)[0] == "flash-attn"


def test_an_implementation_of_another_name_is_taken_as_it_is(gpu):
    gpu("mine", (8, 0))
    assert attention_backend(CUDA, head_dim=256, window=4) == ("varlen", "mine, activated in PyTorch")


@pytest.mark.parametrize(
    ("implementation", "capability", "options", "reason"),
    [
        ("FA3", (9, 0), {"head_dim": 192, "window": 4}, None),
        ("FA3", (9, 0), {"head_dim": 200}, "no deterministic backward beyond head size 192"),
        ("FA3", (9, 0), {"head_dim": 256}, "no deterministic backward beyond head size 192"),
        ("FA3", (8, 0), {}, "needs compute capability 9.0, this GPU has 8.0"),
        ("FA3", (10, 0), {}, "needs compute capability 9.0, this GPU has 10.0"),
        ("FA4", (9, 0), {"head_dim": 256}, None),
        ("FA4", (10, 3), {"head_dim": 128}, None),
        ("FA4", (10, 0), {"head_dim": 256}, "head sizes up to 128 on this GPU, this is 256"),
        ("FA4", (8, 9), {}, "needs compute capability 9.0 or 10.0, this GPU has 8.9"),
        ("FA4", (12, 0), {}, "needs compute capability 9.0 or 10.0, this GPU has 12.0"),
    ],
)
def test_what_they_refuse_runs_elsewhere_and_says_why(gpu, implementation, capability, options, reason):
    gpu(implementation, capability)
    backend, why = attention_backend(CUDA, **options)
    assert backend == ("sdpa" if reason else "varlen") and (reason or "activated") in why


@pytest.mark.parametrize(("release", "has_windows"), [("2.11.0+cu130", False), ("2.12.1", False), ("2.13.0", True)])
def test_a_window_needs_a_pytorch_that_hands_it_to_flash_attention_4(gpu, monkeypatch, release, has_windows):
    gpu("FA4")
    monkeypatch.setattr(torch, "__version__", release)
    assert attention_backend(CUDA)[0] == "varlen"
    backend, why = attention_backend(CUDA, window=4)
    assert backend == ("varlen" if has_windows else "sdpa") and (has_windows or f"backward of PyTorch {release}" in why)


def test_segment_by_segment_attention_keeps_off_them(gpu):
    """They are behind scaled_dot_product_attention too, and fail only when called."""
    flash, efficient = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled
    with backend_sdpa._own_kernels(CUDA):
        assert flash() and efficient()
    gpu("FA3")
    with backend_sdpa._own_kernels(CUDA):
        assert not flash() and efficient()
    with backend_sdpa._own_kernels(torch.device("cpu")):
        assert flash()
    assert flash()


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)


@pytest.fixture
def kernels(monkeypatch):
    """PyTorch's wrappers of either implementation as the aten ops, around kernels that note what they are given."""
    given = {}

    def note(name, make):
        def kernel(*args, **options):
            given[name] = args, options, torch.are_deterministic_algorithms_enabled()
            return make(*args)

        return kernel

    def lse(q):
        return q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (_fa3, _fa4):
        monkeypatch.setattr(module, "_get_device_major", lambda device: 9)
    monkeypatch.setattr(_fa3, "_FA3_CUDA_FWD", note("FA3 forward", lambda q, *_: (q, lse(q), None, None)))
    monkeypatch.setattr(_fa3, "_FA3_CUDA_BWD", note("FA3 backward", lambda *_: None))
    backward = note("FA4 backward", lambda q, k, v, *_: (q, k, v))
    module = SimpleNamespace(_flash_attn_fwd=note("FA4 forward", lambda q, *_: (q, lse(q))), _flash_attn_bwd=backward)
    monkeypatch.setattr(_fa4, "_FA4_MODULE_PATH", "stand-in")
    monkeypatch.setattr(_fa4, "_fa4_import_module", lambda path: module)

    def use(implementation):
        forward, backward = {
            "FA3": (_fa3._fa3_flash_attention_forward_impl_default, _fa3._fa3_flash_attention_backward_impl),
            "FA4": (_fa4._fa4_flash_attention_forward_impl, _fa4._fa4_flash_attention_backward_impl),
        }[implementation]
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
        return given

    return use


def call(window):
    layout = PrefixLayout.build(GROUPS)
    q, k, v = (
        torch.zeros(layout.spans.shape[1], heads, 16, dtype=torch.bfloat16).as_subclass(OnCuda) for heads in (4, 2, 2)
    )
    keys, values = (x.index_select(0, layout.keys.index) for x in (k, v))
    call = backend_varlen._Call.of(layout, 0.25, window, None)
    out, lse = backend_varlen._forward_aten(q, keys, values, call)
    return backend_varlen._backward_aten(out, q, keys, values, out, lse, call)


@pytest.mark.parametrize("window", [None, 4])
def test_flash_attention_4_gets_windows_only_where_there_are_some(kernels, window):
    """What PyTorch refuses by itself is what `flash_obstacle` knows, and nothing else."""
    given = kernels("FA4")
    if flash_obstacle("FA4", (9, 0), 16, window):
        with pytest.raises(RuntimeError, match="windowed attention not supported"):
            call(window)
        return
    call(window)
    for name in ("FA4 forward", "FA4 backward"):
        _, options, deterministic = given[name]
        sizes = options.get("window_size_left"), options.get("window_size_right"), options["causal"]
        assert sizes == ((None, None, True) if window is None else (window - 1, 0, False)), name
    assert deterministic and options["deterministic"], "the backward"


@pytest.mark.parametrize("window", [None, 4])
def test_flash_attention_3_takes_every_window_and_a_deterministic_backward(kernels, window):
    given = kernels("FA3")
    call(window)
    sizes = [True, -1, -1] if window is None else [False, window - 1, 0]
    for name, deterministic in (("FA3 forward", False), ("FA3 backward", True)):
        args, _, mode = given[name]
        start = next(i for i, arg in enumerate(args) if isinstance(arg, float)) + 1  # what follows the scale
        assert [*args[start : start + 3]] == sizes and mode == deterministic, name


def test_what_could_be_activated_is_found_without_running_it(tmp_path, monkeypatch):
    def found():
        for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        return installed_flash_implementations()

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert found() == []
    (tmp_path / "flash_attn_interface.py").write_text("raise RuntimeError('not to be run')")
    assert found() == ["FA3"]
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("raise RuntimeError('not to be run')")
    assert found() == ["FA3", "FA4"]
    for name in ("flash_attn", "flash_attn.cute"):
        del sys.modules[name]
