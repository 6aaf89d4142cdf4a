"""Whatever the model: packed log-probs and gradients are the model's own, or the model is refused.

The truth is computed here, from `model(input_ids=one sequence).logits`, not by the comparison that is under test.
"""

from __future__ import annotations

import math
import time

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoModelForCausalLM, LlamaConfig

from causal_lms import BUILDABLE, causal_lm
from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.model import agreement, forward
from dpo_fast.model.agreement import settle_forward
from dpo_fast.model.dropout import disable_dropout
from dpo_fast.model.head import HeadForm
from dpo_fast_kernels import LogitTransform
from model_table import PAGE, page
from preferences import logged, make_trainer, pairs

# They look at later tokens, are random without a rate that could be set, or treat a row by its length.
REFUSED = {"big_bird", "cpmant", "doge", "prophetnet", "reformer", "xlm", "xlnet"}
OLD = version.parse(transformers.__version__) < version.parse("5.23")
if OLD:  # there these look at later tokens unless is_decoder says otherwise
    REFUSED |= {"megatron-bert", "moshi", "rembert", "roformer"}


def groups(generator: torch.Generator) -> list[PreferenceGroup]:
    """Sequences longer than every window and chunk of the shrunk models; a prompt and a completion of one token."""
    shapes = [(15, (12, 20)), (1, (1, 9, 30)), (31, (7, 3))]
    ids = [torch.randint(3, 97, (prompt + sum(rest),), generator=generator) for prompt, rest in shapes]
    parts = [row.split([prompt, *rest]) for row, (prompt, rest) in zip(ids, shapes, strict=True)]
    return [PreferenceGroup(prompt.tolist(), [part.tolist() for part in rest]) for prompt, *rest in parts]


def own_logps(model, rows: list[PreferenceGroup]) -> torch.Tensor:
    found = []
    if getattr(model.config.get_text_config(), "index_topk", None):  # rounding turns its choice of keys around
        packed = pack(rows, "padded")
        logits = model(input_ids=packed.input_ids, attention_mask=packed.attention_mask, use_cache=False).logits
        logits = logits.flatten(0, 1)[packed.score_rows.index]
        return logits.log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]
    for row in rows:
        for completion in row.completion_ids:
            ids = torch.tensor([[*row.prompt_ids, *completion]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1].float()
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(found)


def gradients(model, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(model, layout: str, rows: list[PreferenceGroup]) -> None:
    """Log-probs within 1e-4 nat, and gradients of all weights within 1e-3, of the model's own."""
    before = model.config._attn_implementation
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")  # SDPA leaves softcaps out
    truth = own_logps(model, rows)
    true_gradients = gradients(model, truth)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(before)
    found = model(packed=pack(rows, layout)).token_logps
    assert (found - truth).abs().max() <= 1e-4
    found_gradients = gradients(model, found)
    whole = math.sqrt(sum(gradient.square().sum() for gradient in true_gradients.values()))
    for name, gradient in true_gradients.items():
        error = (found_gradients.get(name, torch.zeros_like(gradient)) - gradient).norm()
        assert error <= 1e-3 * (gradient.norm() + 1e-3 * whole), name


@pytest.mark.parametrize("kind", BUILDABLE)
def test_every_causal_language_model(kind):
    model = causal_lm(kind)
    disable_dropout(model)
    model.train()
    try:
        layout = settle_forward(model, "auto", training=True)
    except ValueError as error:
        assert kind in REFUSED, error
        return
    assert kind not in REFUSED
    rows = groups(torch.Generator().manual_seed(3))
    assert_same(model, layout, rows)


# ---- the comparison speaks where a fix is taken out ----


def said(caplog, function) -> str:
    """What is said or raised."""
    caplog.clear()
    try:
        function()
    except ValueError as error:
        return str(error)
    return caplog.text


@pytest.mark.parametrize("kind", ["recurrent_gemma", "cohere2", "granite", "modernbert-decoder", "minicpm3"])
def test_a_head_that_is_read_wrongly(monkeypatch, caplog, kind):
    monkeypatch.setattr(forward, "read_head", lambda model: HeadForm("model", LogitTransform()))
    text = said(caplog, lambda: settle_forward(causal_lm(kind), "auto"))
    assert "makes its logits by itself" in text and "nat away from the model's own" in text


@pytest.mark.parametrize("kind", ["phimoe", "qwen2_moe"])
def test_a_window_that_is_in_the_mask_alone(monkeypatch, caplog, kind):
    assert "sees 7 of 200 tokens" in said(caplog, lambda: settle_forward(causal_lm(kind), "auto", max_length=200))
    monkeypatch.setattr(agreement, "hidden_window", lambda *args: None)
    assert "nat away" in said(caplog, lambda: settle_forward(causal_lm(kind), "auto", max_length=200))


def test_a_long_window_is_seen_in_a_short_run(caplog):
    model = causal_lm("phimoe", sliding_window=5000)
    assert "sees 5000 of 9000 tokens" in said(caplog, lambda: settle_forward(model, "auto", max_length=9000))
    assert settle_forward(causal_lm("mistral", sliding_window=5000), "auto", max_length=9000) == "shared"
    assert settle_forward(causal_lm("phimoe", sliding_window=5000), "auto", max_length=5000) == "shared"


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_frequencies_of_a_batch(monkeypatch, caplog, rope):
    monkeypatch.setattr(forward, "frequency_limit", lambda model: math.inf)
    options = {"rope_type": rope, "rope_theta": 100.0, "factor": 4.0}
    if rope == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
        options |= {"original_max_position_embeddings": 22, **factors}
    model = causal_lm("llama", max_position_embeddings=22, rope_parameters=options)
    assert "nat away" in said(caplog, lambda: settle_forward(model, "auto", max_length=100))


def test_dropout_that_is_not_turned_off():
    with pytest.raises(ValueError, match=r"model\.decoder\S* \(\w+\) is random"):
        settle_forward(causal_lm("opt"), "auto", training=True)


def test_a_head_whose_copy_trains(monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(causal_lm("llama"), config)
    assert settle_forward(model, "auto") == "shared"
    score = forward._Scoring.hidden
    original = model.get_base_model().lm_head.original_module
    monkeypatch.setattr(
        forward._Scoring, "hidden", lambda self, module, *args, **kw: score(self, original, *args, **kw)
    )
    with pytest.raises(ValueError, match=r"layout='shared' does not work.*the gradient of \S*lm_head\.modules_to_save"):
        settle_forward(model, "shared")


def test_a_load_balancing_loss_that_is_not_the_models_own(monkeypatch, caplog):
    loss = forward._load_balancing_loss
    assert settle_forward(causal_lm("mixtral"), "auto", aux_loss=True) == "shared"
    monkeypatch.setattr(forward, "_load_balancing_loss", lambda *args: 1.1 * loss(*args))
    text = said(caplog, lambda: settle_forward(causal_lm("mixtral"), "auto", aux_loss=True))
    assert "the load-balancing loss comes out as" in text


# ---- how it goes back, and when ----


def test_an_explicit_layout_is_kept_or_refused(caplog):
    with pytest.raises(ValueError, match="layout='shared' does not work for MambaForCausalLM"):
        settle_forward(causal_lm("mamba"), "shared")
    model = causal_lm("llama")
    before = model.config._attn_implementation
    caplog.clear()
    assert settle_forward(model, "padded") == "padded" and model.config._attn_implementation == before
    assert caplog.text == ""


def test_each_step_back_is_said_once_with_its_reason(caplog):
    settle_forward(causal_lm("modernbert-decoder"), "padded")
    settle_forward(causal_lm("mamba"), "auto")
    first, second = (record.getMessage() for record in caplog.records if record.name.startswith("dpo_fast"))
    assert first.startswith("ModernBertDecoderForCausalLM makes its logits by itself, which is slower")
    assert second.startswith("layout='auto' takes 'padded' for MambaForCausalLM, because its layers carry")


@pytest.mark.parametrize("kind", ["qwen3_moe", "granitemoehybrid"])
def test_layers_without_experts_have_no_load_balancing_loss(kind):
    dense = {"mlp_only_layers": [0, 1, 2, 3]} if kind == "qwen3_moe" else {"num_local_experts": 0}
    model = causal_lm(kind, **dense)
    layout = settle_forward(model, "auto", aux_loss=True)
    output = model(packed=pack(groups(torch.Generator().manual_seed(0)), layout), aux_loss=True)
    assert output.aux_loss is None or float(output.aux_loss) == 0


def test_weights_that_come_later_are_compared_in_the_first_packed_forward(monkeypatch):
    rows = groups(torch.Generator().manual_seed(0))
    given = causal_lm("llama")
    with torch.device("meta"):
        model = type(given)(given.config)
    assert settle_forward(model, "auto") == "shared"
    model.to_empty(device="cpu")
    model.load_state_dict(given.state_dict())
    model.model.rotary_emb = given.model.rotary_emb
    calls = []
    compare = agreement._difference
    monkeypatch.setattr(agreement, "_difference", lambda *args: calls.append(args) or compare(*args))
    for _ in range(2):
        model(packed=pack(rows))
    assert len(calls) == 1
    assert_same(model, "shared", rows)


def test_late_weights_that_disagree_are_refused(monkeypatch):
    given = causal_lm("llama")
    with torch.device("meta"):
        model = type(given)(given.config)
    settle_forward(model, "auto")
    model.to_empty(device="cpu")
    model.load_state_dict(given.state_dict())
    model.model.rotary_emb = given.model.rotary_emb
    model.dpo_fast.head_form = HeadForm("model", LogitTransform(scale=1.5))
    with pytest.raises(ValueError, match="layout='shared' does not work for LlamaForCausalLM: log-probs.*padded"):
        model(packed=pack(groups(torch.Generator().manual_seed(0))))


def test_a_model_is_left_as_it_was():
    model = causal_lm("llama" if OLD else "gemma2").train()  # whose padded rows differ from lone ones there
    model.model.layers[1].eval()
    model.gradient_checkpointing_enable()
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    settle_forward(model, "padded", training=True)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and not model.model.layers[1].training and model.is_gradient_checkpointing
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.slow
def test_the_comparison_takes_two_seconds_at_most_for_135_million_weights(capsys):
    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=49152, intermediate_size=1536, tie_word_embeddings=True, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    began = time.perf_counter()
    assert settle_forward(model, "auto", training=True, max_length=1024) == "shared"
    seconds = time.perf_counter() - began
    with capsys.disabled():
        print(f"\ncompared with the model's own logits in {seconds:.2f} s")
    assert seconds <= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in BUILDABLE if kind not in REFUSED])
def test_training_begins_at_ln_2(tmp_path, kind):
    trainer = make_trainer(tmp_path, pairs(4), model=causal_lm(kind), max_steps=2)
    trainer._aux_loss_weight = 0.0  # else it is part of the loss
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(trainer, "loss")[1] < math.log(2)


@pytest.mark.slow
def test_the_table_of_models_is_current():
    if f"transformers {transformers.__version__}," not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page is that of another release")
    assert page() == PAGE.read_text(encoding="utf-8"), "run python tests/model_table.py"


# ---- weights in bf16 ----

CANNOT_RUN_IN_BF16 = {"inkling2_text", "xlstm"}  # alone, in transformers too
SOME = {"llama", "gemma2", "gpt_oss", "hunyuan_v1_moe", "kolibri1", "mamba", "minimax", "mixtral", "opt", "xlnet"}


def settled(model) -> str:
    disable_dropout(model)
    try:
        layout = settle_forward(model, "auto", training=True, max_length=200)
    except ValueError:
        return "refused"
    return f"{layout}, {'own' if model.dpo_fast.head_form is None else 'fused'} logits"


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in SOME else pytest.mark.slow) for kind in BUILDABLE]
)
def test_rounding_of_bf16_takes_no_layout_away_and_lets_none_in(kind):
    if kind in CANNOT_RUN_IN_BF16:
        pytest.skip("it does not run in bf16")
    assert settled(causal_lm(kind).to(torch.bfloat16)) == settled(causal_lm(kind))


@pytest.mark.parametrize("kind", ["cohere2", "phimoe"])
def test_a_wrong_number_is_seen_in_bf16_too(monkeypatch, caplog, kind):
    """The comparison is made in fp32, where rounding hides nothing."""
    monkeypatch.setattr(agreement, "hidden_window", lambda *args: None)
    monkeypatch.setattr(forward, "read_head", lambda model: HeadForm("model", LogitTransform(scale=0.5)))
    settle_forward(causal_lm(kind).to(torch.bfloat16), "auto", max_length=200)
    assert "nat away from the model's own" in caplog.text
