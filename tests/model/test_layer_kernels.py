"""Layers compiled, or computed by Liger's kernels, say and train what plain ones do; a store never mixes them.

Liger's kernels run in Triton's interpreter.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.errors import InputError
from dpo_fast.model.adapters import base_of
from dpo_fast.model.agreement import settle_forward
from dpo_fast.model.layer_kernels import computed_by, use_liger
from families import tiny_model
from interpreting import interpreted, let_liger_be_interpreted
from numerics import assert_close_to_truth
from preferences import logged, make_trainer, pairs, trained

FAMILIES = ("llama", "qwen3", "gemma2", "phi3", "olmo2")  # norms of heads, GEGLU, products in one, norms after layers
LLAMA = ["LigerRMSNorm.forward", "LigerSwiGLUMLP.forward", "liger_rotary_pos_emb"]
KINDS = [{}, {"checkpointing": True}, {"lora": True}, {"lora": True, "checkpointing": True}]


# ---- what a packed batch says, and its gradients ----


def small(family: str, dtype=torch.float32, lora: bool = False, checkpointing: bool = False) -> nn.Module:
    model = tiny_model(family, dtype=dtype, num_hidden_layers=2)
    if lora:
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
        model = model.to(dtype)
    if checkpointing:
        base_of(model).gradient_checkpointing_enable({"use_reentrant": False})
        base_of(model).enable_input_require_grads()
    return model.train()


def solve(model: nn.Module, layout: str, device: str) -> dict[str, Tensor]:
    """Log-probs of two groups' completions, and the gradients of a weighted sum of them."""
    groups = [PreferenceGroup([5, 9, 33, 7], [[11, 3, 8], [4]], (), ()), PreferenceGroup([6], [[5, 9], [9]], (), ())]
    logps = model(packed=pack(groups, layout).to(device)).logps
    (logps * torch.tensor([1.0, -0.5, 2.0, 0.25], device=device)).sum().backward()
    return {"logps": logps.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def check(
    family: str, change, layout: str = "shared", device: str = "cpu", one_gradient: bool = False, **kind: bool
) -> None:
    """Asserts that a model that `change` has changed errs as plain ones do, in every gradient or in all as one."""
    found = []
    for dtype, other in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        model = small(family, dtype, **kind).to(device)
        settle_forward(model, layout, training=True)
        if other:
            change(base_of(model))
        values = solve(model, layout, device)
        if one_gradient:
            values = {"logps": values.pop("logps"), "gradient": torch.cat([x.flatten() for x in values.values()])}
        found.append(values)
    truth, eager, changed = found
    assert truth.keys() == eager.keys() == changed.keys()
    for name in truth:
        assert_close_to_truth(changed[name], eager[name], truth[name].double(), f"{name} of {family}, {kind}")


def compiled(backend: str):
    def change(base: nn.Module) -> None:
        torch._dynamo.reset()
        for layer in base.model.layers:
            layer.compile(backend=backend, dynamic=True)

    return change


@pytest.mark.parametrize("kind", [*KINDS[:2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[2:])])
def test_compiled_layers_err_as_plain_ones_do(kind):
    check("llama", compiled("aot_eager"), **kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_compiled_by_inductor_err_as_plain_ones_do(family, kind):
    """In the whole gradient: Inductor's exp has roundings of its own, which show in a weight of a dozen entries."""
    check(family, compiled("inductor"), one_gradient=True, **kind)


# ---- Liger, in the interpreter ----


def liger_checks(*families: str) -> int:
    let_liger_be_interpreted()
    check("llama", lambda base: use_liger(base, {}), "padded")
    for family in families or FAMILIES:
        for kind in KINDS:
            check(family, lambda base: use_liger(base, {}), **kind)
    return len(families or FAMILIES)


def test_liger_errs_as_plain_layers_do():
    pytest.importorskip("liger_kernel")
    assert interpreted("test_layer_kernels", "liger_checks('llama')") == 1


@pytest.mark.slow
def test_liger_errs_as_plain_layers_do_in_every_family():
    pytest.importorskip("liger_kernel")
    assert interpreted("test_layer_kernels", "liger_checks()") == len(FAMILIES)


def liger_run(folder: str, lora: bool = False, **more) -> int:
    """Trains with Liger's kernels and without; a later model of the family in this process has plain layers."""
    let_liger_be_interpreted()
    runs = []
    for number, kernels in enumerate(("none", "liger", "auto")):
        if lora:
            peft = pytest.importorskip("peft")
            more["peft_config"] = peft.LoraConfig(r=3, target_modules="all-linear")
        trainer = make_trainer(
            Path(folder) / str(number), pairs(4), model=tiny_model("llama", num_hidden_layers=2), max_steps=2,
            per_device_train_batch_size=2, layer_kernels=kernels, **more,
        )  # fmt: skip
        runs.append((trainer, trained(trainer)))
    (plain, expected), (liger, weights), (later, again) = runs
    assert computed_by(base_of(liger.model)) == {"layer_kernels": LLAMA}
    assert computed_by(base_of(plain.model)) == computed_by(base_of(later.model)) == {}
    assert logged(liger, "loss")[0] == pytest.approx(0.6931472, abs=1e-6)
    for key in ("loss", "grad_norm", "rewards/margins"):
        assert logged(liger, key) == pytest.approx(logged(plain, key), rel=1e-4, abs=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)
        assert torch.equal(again[name], value)
    stores = [{path.name for path in Path(folder, n, "reference").iterdir() if path.is_dir()} for n in "012"]
    assert stores[0] == stores[2] and stores[1].isdisjoint(stores[0])
    return 1


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "gradient_checkpointing=True", "lora=True"])
def test_a_run_with_liger_takes_the_same_steps(tmp_path, more):
    pytest.importorskip("liger_kernel")
    assert interpreted("test_layer_kernels", f"liger_run({str(tmp_path)!r}, {more})") == 1


# ---- Liger, as far as it goes without running a kernel ----


@pytest.fixture
def liger():
    return pytest.importorskip("liger_kernel.transformers.monkey_patch")


def test_liger_is_put_into_one_model_and_leaves_its_forward_and_its_module_alone(liger):
    from transformers.models.llama import modeling_llama

    before, other, model = dict(vars(modeling_llama)), tiny_model("llama"), tiny_model("llama")
    ids = torch.tensor([[5, 9, 33]])
    expected = other(input_ids=ids).logits
    for _ in range(2):
        use_liger(model, {})
        assert computed_by(model) == {"layer_kernels": LLAMA}
    assert "forward" not in vars(model)
    assert vars(modeling_llama) == before
    assert computed_by(other) == {} and torch.equal(other(input_ids=ids).logits, expected)


def test_what_is_left_out_stays_plain(liger):
    model = tiny_model("llama")
    use_liger(model, {"rope": False, "swiglu": False})
    assert computed_by(model) == {"layer_kernels": LLAMA[:1]}


def test_kernels_that_a_user_applied_to_the_process_are_named(liger, monkeypatch):
    from transformers.models.llama import modeling_llama

    rotate = liger.liger_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)
    assert computed_by(tiny_model("llama")) == {"layer_kernels": ["liger_rotary_pos_emb"]}


def scaled(model: nn.Module) -> None:
    model.model.norm.weight.data *= 1.01


def broken(model: nn.Module) -> None:
    model.model.norm.forward = lambda hidden: 1 / 0


@pytest.mark.parametrize(("kernels", "reason"), [(scaled, "log-probs of tokens come out"), (broken, "they fail")])
def test_kernels_are_compared_with_the_model_as_it_was_given(kernels, reason):
    with pytest.raises(InputError, match=f"'liger' does not work for LlamaForCausalLM: {reason} .* Take 'none'"):
        settle_forward(tiny_model("llama"), "shared", kernels=kernels)


def test_a_family_without_kernels_is_refused_before_anything_is_done(tmp_path, liger, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("dpo_fast.training.datasets.PreferenceDatasets.tokenized", None)
    with pytest.raises(ValueError, match="no kernels for model type 'gpt2'; take 'none' or 'compile'"):
        make_trainer(tmp_path, model=tiny_model("gpt2"), layer_kernels="liger")
    with pytest.raises(ValueError, match=r"has \['geglu'\], .* choose from \['rms_norm', 'rope', 'swiglu'\]"):
        make_trainer(tmp_path, layer_kernels="liger", liger_kernel_config={"geglu": True})
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="layer_kernels='liger' needs a GPU"):
        make_trainer(tmp_path, layer_kernels="liger")
