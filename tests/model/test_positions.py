"""Rows longer than a model has positions for are refused by `max_length`, before anything is computed."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo_fast import DPOConfig
from dpo_fast.errors import InputError
from dpo_fast.model.positions import most_positions
from dpo_fast.scoring import implicit_rewards
from families import FAMILIES, UNSHAREABLE, tiny_model, tiny_tokenizer
from preferences import make_trainer, pairs

ROWS = 40
_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": ROWS,
}
_GPT = {"n_positions": ROWS, "n_embd": 32, "n_layer": 2, "n_head": 4}
_DECODER = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
_DECODER |= {"is_decoder": True, "is_encoder_decoder": False}
BOUNDED = {
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    "gptj": {**_GPT, "rotary_dim": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "openai-gpt": _GPT,
    "ctrl": {**_GPT, "dff": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": {},
    "bart": _DECODER,
    "marian": {**_DECODER, "decoder_vocab_size": 97},
    "whisper": {**_DECODER, "max_target_positions": ROWS},
    "trocr": _DECODER,
    "bert": {"is_decoder": True},
    "rembert": {"is_decoder": True, "input_embedding_size": 32, "output_embedding_size": 32},
}
UNBOUNDED = {
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
    "phi": {},
}


def model_of(family: str) -> PreTrainedModel:
    options = {**_COMMON, **{**BOUNDED, **UNBOUNDED}[family]}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options, pad_token_id=0)).eval()


def runs(model: PreTrainedModel, tokens: int) -> bool:
    ids = torch.full((1, tokens), 5)
    try:
        with torch.no_grad():
            model.base_model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(tokens)[None])
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("family", BOUNDED)
def test_the_bound_is_the_longest_row_that_runs(family):
    model = model_of(family)
    assert most_positions(model) == ROWS and runs(model, ROWS) and not runs(model, ROWS + 1)


@pytest.mark.parametrize("family", UNBOUNDED)
def test_positions_that_are_computed_have_no_bound(family):
    model = model_of(family)
    assert most_positions(model) is None and runs(model, 2 * ROWS)


@pytest.mark.parametrize("family", sorted({*FAMILIES, *UNSHAREABLE} - {"gpt2"}))
def test_rotary_and_recurrent_models_have_no_bound(family):
    assert most_positions(tiny_model(family)) is None


def test_a_pair_of_models_has_the_smaller_bound_and_an_adapter_its_models():
    short, long, none = tiny_model("gpt2", max_position_embeddings=30), tiny_model("gpt2"), tiny_model("llama")
    assert most_positions(long, short) == most_positions(short, None) == most_positions(short, none) == 30
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["wte", "wpe"], fan_in_fan_out=True)
    assert most_positions(peft.get_peft_model(short, lora)) == 30


def test_a_max_length_beyond_it_is_refused(tmp_path):
    for models in ({"model": "short"}, {"model": "long", "ref_model": "short"}):
        sizes = {"short": 63, "long": 256}
        models = {name: tiny_model("gpt2", max_position_embeddings=sizes[size]) for name, size in models.items()}
        with pytest.raises(InputError, match=r"^max_length: 64 exceeds the 63 positions .* set max_length=63 or less"):
            make_trainer(tmp_path, **models)
    assert make_trainer(tmp_path, model=tiny_model("gpt2", max_position_embeddings=64)).train_dataset


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_max_length_the_rows_decide(tmp_path, stream):
    rows = pairs(8)
    longest = max(len((row["prompt"] + row[side]).split()) for row in rows for side in ("chosen", "rejected")) + 1
    fits, short = (tiny_model("gpt2", max_position_embeddings=size) for size in (longest, longest - 1))
    data = rows.to_iterable_dataset() if stream else rows
    make_trainer(tmp_path, data, model=fits, max_length=None).train()
    with pytest.raises(InputError, match=rf"^max_length: None cuts nothing, and the {longest} tokens of train dataset"):
        make_trainer(tmp_path, data, model=short, max_length=None).train()


def test_rows_that_come_later_and_scores_are_refused_too(tmp_path):
    trainer = make_trainer(tmp_path, model=tiny_model("gpt2", max_position_embeddings=40), max_length=None)
    words = [" ".join(["w5"] * 50)]
    rows = Dataset.from_dict({"prompt": words, "chosen": [" w6"], "rejected": [" w7"]})
    with pytest.raises(InputError, match=r"^max_length: None cuts nothing.* eval dataset, row 0 exceed the 40"):
        trainer.evaluate(rows)
    config = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_length=64)
    with pytest.raises(InputError, match="^max_length: 64 exceeds the 40 positions"):
        implicit_rewards(trainer.model, rows, tiny_tokenizer(), config, tiny_model("gpt2"))
