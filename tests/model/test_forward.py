"""The packed, shared-prefix forward computes what the usual padded one computes: log-probs and every gradient."""

from __future__ import annotations

import pytest
import test_layer_kernels as layers
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.model.agreement import use_shared_prefix
from dpo_fast.model.attention import ATTENTION_NAME, sharing_obstacle
from dpo_fast.model.forward import add_dpo_forward
from dpo_fast.model.layer_kernels import use_liger
from families import FAMILIES, UNSHAREABLE, VOCAB, tiny_model
from numerics import assert_close_to_truth

TOLERANCE = 1e-5


def random_ids(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()


def random_groups(seed: int = 0) -> list[PreferenceGroup]:
    """A pair, a group of three with a one-token prompt and a one-token completion, and a pair with a long prompt."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(11, (9, 14)), (1, (1, 13, 4)), (17, (3, 2))]
    return [
        PreferenceGroup(random_ids(prompt, generator), [random_ids(n, generator) for n in completions])
        for prompt, completions in shapes
    ]


def run(model, groups, layout):
    """Token log-probs, sequence log-probs and gradients of a fixed random combination of the sequence log-probs."""
    model.zero_grad()
    output = model(packed=pack(groups, layout).to(model.device))
    coefficients = torch.randn(output.logps.shape, generator=torch.Generator().manual_seed(7)).to(output.logps)
    (output.logps * coefficients).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.token_logps.detach(), output.logps.detach(), gradients


def assert_same_results(model, groups=None):
    """Padded rows under the model's own attention against one packed row."""
    groups = groups or random_groups()
    token_logps, logps, gradients = run(model, groups, "padded")
    use_shared_prefix(model.get_base_model() if hasattr(model, "peft_config") else model)
    shared_token_logps, shared_logps, shared_gradients = run(model, groups, "shared")
    assert (shared_token_logps - token_logps).abs().max() <= TOLERANCE
    assert (shared_logps - logps).abs().max() <= TOLERANCE * 14
    assert gradients.keys() == shared_gradients.keys()
    for name, gradient in gradients.items():
        error = (shared_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-8)
        assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"
    return gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_equals_padded(family):
    model = tiny_model(family)
    add_dpo_forward(model)
    gradients = assert_same_results(model)
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if name.endswith("q_proj.weight"))


@pytest.mark.parametrize("family", FAMILIES)
def test_head_equals_the_models_own_logits(family):
    """Bias, softcap and scale of the head, against the logits that the model itself computes."""
    model = tiny_model(family)
    add_dpo_forward(model)
    (group,) = random_groups()[:1]
    packed = pack([group], "padded")
    logits = model(input_ids=packed.input_ids, attention_mask=packed.attention_mask, use_cache=False).logits
    expected = logits.flatten(0, 1)[packed.score_rows.index].log_softmax(-1)
    output = model(packed=packed, statistics=("entropy", "mean_logit", "is_top1"))
    assert torch.allclose(output.token_logps, expected.gather(1, packed.targets[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(output.entropy, -(expected.exp() * expected).sum(-1), atol=1e-5)
    assert torch.allclose(output.mean_logit, logits.flatten(0, 1)[packed.score_rows.index].mean(-1), atol=1e-5)
    assert torch.equal(output.is_top1, expected.argmax(-1) == packed.targets)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_with_gradient_checkpointing(family):
    model = tiny_model(family)
    add_dpo_forward(model)
    model.gradient_checkpointing_enable()
    model.train()
    assert_same_results(model)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_moe"])
def test_with_lora(family):
    peft = pytest.importorskip("peft")
    model = tiny_model(family)
    add_dpo_forward(model)
    targets = "all-linear" if family == "gpt_neox" else ["q_proj", "v_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    gradients = assert_same_results(model)
    assert gradients and all("lora" in name for name in gradients)


def test_one_group_does_not_see_another():
    model = tiny_model("llama")
    add_dpo_forward(model)
    use_shared_prefix(model)
    groups = random_groups()
    together = model(packed=pack(groups)).token_logps
    alone = torch.cat([model(packed=pack([group])).token_logps for group in groups])
    assert torch.allclose(together, alone, atol=1e-6)


def test_repeated_prompts_and_context_agree_with_a_shared_prompt():
    """A prompt given as each completion's context scores the same tokens."""
    model = tiny_model("llama")
    add_dpo_forward(model)
    use_shared_prefix(model)
    (group,) = random_groups()[:1]
    copies = [[*group.prompt_ids, *ids] for ids in group.completion_ids]
    unshared = PreferenceGroup([], copies, context_lengths=[len(group.prompt_ids)] * 2)
    shared, separate = model(packed=pack([group])), model(packed=pack([unshared]))
    assert torch.allclose(shared.token_logps, separate.token_logps, atol=1e-6)


def test_generation_is_untouched():
    model = tiny_model("llama")
    prompt = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    before = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
    add_dpo_forward(model)
    use_shared_prefix(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    after = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(before, after)


def test_plain_calls_keep_the_softcap_of_attention():
    """Generation and padded batches of a model that was switched to packed rows; SDPA knows no softcap."""
    model = tiny_model("gemma2", attn_logit_softcapping=0.5)
    model.set_attn_implementation("eager")
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def results() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        return logits, model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)

    before = results()
    add_dpo_forward(model)
    use_shared_prefix(model)
    after = results()
    assert torch.allclose(before[0], after[0], atol=1e-5) and torch.equal(before[1], after[1])
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    assert not torch.allclose(before[0], results()[0], atol=1e-4), "the softcap matters"


@pytest.mark.parametrize("family", UNSHAREABLE)
def test_layers_that_are_not_attention_are_refused_and_work_padded(family):
    model = tiny_model(family)
    with pytest.raises(ValueError, match="layout='padded'"):
        use_shared_prefix(model)
    add_dpo_forward(model)
    groups = random_groups()
    together = model(packed=pack(groups, "padded")).token_logps
    alone = torch.cat([model(packed=pack([group], "padded")).token_logps for group in groups])
    assert torch.allclose(together, alone, atol=1e-5)


def test_bidirectional_attention_is_found_by_the_check_on_tokens():
    """No field of the configuration gives this one away: only running it does."""
    config = AutoConfig.for_model(
        "bert", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert sharing_obstacle(model) is None
    with pytest.raises(ValueError, match="BertLMHeadModel looks at later tokens.*is_decoder=True"):
        use_shared_prefix(model)
    assert model.config._attn_implementation == "eager"


def test_a_model_that_fails_on_packed_rows_is_refused_and_left_as_it_was():
    model = tiny_model("llama").train()
    layer = model.model.layers[1]
    original = layer.forward

    def fail_when_packed(*args, prefix=None, **kwargs):
        if prefix is not None:
            raise RuntimeError("no packed rows here")
        return original(*args, **kwargs)

    layer.forward = fail_when_packed
    with pytest.raises(ValueError, match="no packed rows here"):
        use_shared_prefix(model)
    assert model.training and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("gpt_oss", "sink"), ("llama4_text", "chunked"), ("bloom", "AttentionInterface"), ("jamba", "state")],
)
def test_sharing_obstacles_are_named(model_type, reason):
    config = AutoConfig.for_model(model_type, num_hidden_layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert reason in sharing_obstacle(model)


def test_load_balancing_loss_counts_a_prompt_once_for_every_completion():
    model = tiny_model("mixtral")
    add_dpo_forward(model)
    padded = model(packed=pack(random_groups(), "padded"), aux_loss=True).aux_loss
    use_shared_prefix(model)
    shared = model(packed=pack(random_groups(), "shared"), aux_loss=True).aux_loss
    assert shared.item() == pytest.approx(padded.item(), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_bf16_on_a_gpu_is_as_close_to_the_truth_as_padded_rows(family):
    groups = random_groups()
    truth, _, true_gradients = run(with_forward(tiny_model(family, dtype=torch.bfloat16).double()), groups, "padded")
    model = with_forward(tiny_model(family, dtype=torch.bfloat16).to("cuda"))
    eager, _, eager_gradients = run(model, groups, "padded")
    use_shared_prefix(model)
    actual, _, gradients = run(model, groups, "shared")
    assert_close_to_truth(actual, eager, truth.to("cuda"), "token_logps")
    for name, gradient in gradients.items():
        assert_close_to_truth(gradient, eager_gradients[name], true_gradients[name].to("cuda"), name)


def with_forward(model):
    add_dpo_forward(model)
    return model


def test_a_shared_pack_needs_shared_attention():
    """Under another attention completions would see each other: log-probs more than a nat off, without a word."""
    model = tiny_model("llama")
    add_dpo_forward(model)
    group = PreferenceGroup([5, 6, 7], [[8, 9], [10, 11, 12]])
    with pytest.raises(ValueError, match="packed has the shared layout, and LlamaForCausalLM attends by 'sdpa'"):
        model(packed=pack([group]))
    alone = model(packed=pack([group], "padded")).logps
    use_shared_prefix(model)
    assert torch.allclose(model(packed=pack([group])).logps, alone, atol=1e-4)
    with pytest.raises(ValueError, match="packed is a dict; give what dpo_fast.pack returns"):
        model(packed={"input_ids": torch.ones(1, 2, dtype=torch.int64)})


@pytest.mark.gpu
@pytest.mark.parametrize("kind", layers.KINDS)
def test_on_gpu_liger_errs_as_plain_layers_do(kind):
    pytest.importorskip("liger_kernel")
    for family in layers.FAMILIES:
        layers.check(family, lambda base: use_liger(base, {}), device="cuda", **kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", layers.KINDS)
def test_on_gpu_layers_compiled_by_inductor_err_as_plain_ones_do(kind):
    layers.check("llama", layers.compiled("inductor"), device="cuda", one_gradient=True, **kind)
