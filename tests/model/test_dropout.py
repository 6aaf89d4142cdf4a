"""Training mode without noise: every rate is turned off, and noise that stays is refused by the module's name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_fast.model.agreement import settle_forward
from dpo_fast.model.dropout import disable_dropout
from families import _COMMON, tiny_model
from preferences import logged, make_trainer

_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_DROPS = {"attn_pdrop": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3}
_OF_LAYERS = {"dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3, "layerdrop": 0.2}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_dropout": 0.3}

# Functional dropout by an attribute, dropped layers, router jitter, dropout in the attention function.
FAMILIES = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, **_OF_LAYERS},
    "biogpt": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "layerdrop": 0.2},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, **_OF_LAYERS},
    "gpt2": {**_GPT, **_DROPS},
    "gptj": {**_GPT, **_DROPS, "rotary_dim": 4},
    "gpt_bigcode": {**_GPT, **_DROPS},
    "bloom": {"n_layer": 2, "n_head": 4, "attention_dropout": 0.3, "hidden_dropout": 0.3},
    "stablelm": {"attention_dropout": 0.3, "hidden_dropout": 0.3},
    "starcoder2": {"attention_dropout": 0.3, "residual_dropout": 0.3, "embedding_dropout": 0.3},
    "mixtral": {**_EXPERTS, "router_jitter_noise": 0.3},
    "phimoe": {**_EXPERTS, "hidden_dropout": 0.3, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3},
}


def noisy(family: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **{**_COMMON, "num_hidden_layers": 2, "model_type": family, "max_position_embeddings": 256, **FAMILIES[family]}
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_dropout_is_turned_off(family):
    model = noisy(family)
    before, saved = model.config.to_dict(), {k: v for k, v in FAMILIES[family].items() if "drop" in k or "jitter" in k}
    with pytest.raises(ValueError, match="is random, although every rate"):
        settle_forward(model, "auto", training=True)
    disable_dropout(model)
    state = torch.get_rng_state()
    settle_forward(model, "auto", training=True)
    assert torch.equal(state, torch.get_rng_state()), "no random number is used up"
    assert all(model.config.to_dict()[name] == before[name] for name in saved if name in before)


@pytest.mark.parametrize("family", ["opt", "gpt_bigcode", "mixtral"])
def test_the_first_loss_is_ln_2(tmp_path, family):
    mixture = {"router_aux_loss_coef": 0.0} if family == "mixtral" else {}
    trainer = make_trainer(tmp_path, model=noisy(family), max_steps=1, **mixture)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)


class Noise(nn.Module):
    """Dropout whose rate nobody finds."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(hidden, 0.2, self.training)


def test_noise_that_stays_is_refused_by_name(tmp_path):
    model = tiny_model("llama")
    model.model.layers[2].mlp = nn.Sequential(model.model.layers[2].mlp, Noise())
    with pytest.raises(ValueError, match=r"model: model\.layers\.2\.mlp\.1 \(Noise\) is random, although"):
        make_trainer(tmp_path, model=model)
    assert not list((tmp_path / "reference").glob("*/part-*")), "nothing was computed"
    make_trainer(tmp_path, model=model, disable_dropout=False)


def test_the_mode_of_a_model_stays():
    model = tiny_model("llama")
    for training in (True, False):
        model.train(training)
        model.model.layers[0].eval()
        settle_forward(model, "auto", training=True)
        assert model.training == training and not model.model.layers[0].mlp.training
