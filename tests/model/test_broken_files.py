"""A model, an adapter or a tokenizer whose files are broken is one line that names argument, path, fault and cure."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_fast import DPOConfig
from dpo_fast.errors import InputError, reading
from dpo_fast.model.loading import load_model
from dpo_fast.training.trainer_arguments import tokenizer_of
from families import tiny_model, tiny_tokenizer

Break = Callable[[Path], object]
WEIGHTS = "model.safetensors"


def write(name: str, content: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content)


def settings(name: str, *without: str, **values: object) -> Break:
    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        kept = {key: value for key, value in {**found, **values}.items() if key not in without}
        (folder / name).write_text(json.dumps(kept))

    return change


def remove(*names: str) -> Break:
    return lambda folder: [(folder / name).unlink() for name in names]


def change_bytes(name: str, change: Callable[[bytes], bytes]) -> Break:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def shards(then: Break) -> Break:
    def split(folder: Path) -> None:
        tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
        (folder / WEIGHTS).unlink(missing_ok=True)
        then(folder)

    return split


def as_bytes(folder: Path) -> None:
    weights = {name: value.to(torch.int8) for name, value in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


CONFIG = {
    "no JSON": (write("config.json", b"{"), "not a valid JSON file"),
    "empty": (write("config.json", b""), "not a valid JSON file"),
    "no text": (write("config.json", b"\xff\xfe\x00"), "not a valid JSON file"),
    "a list": (write("config.json", b"[]"), "cannot be read"),
    "null": (write("config.json", b"null"), "TypeError"),
    "no model_type": (settings("config.json", "model_type"), "model_type"),
    "unknown model_type": (settings("config.json", model_type="foo"), "model type `foo`"),
    "a number for model_type": (settings("config.json", model_type=3), "model type `3`"),
    "eyes alone": (settings("config.json", model_type="vit"), "Unrecognized configuration class"),
    "code": (settings("config.json", model_type="foo", auto_map={"AutoConfig": "x.Y"}), "custom code"),
    "text for a size": (settings("config.json", hidden_size="abc"), "'hidden_size' expected int, got str"),
    "a size of null": (settings("config.json", hidden_size=None), "'hidden_size' expected int, got NoneType"),
    "a list for a size": (settings("config.json", hidden_size=[1]), "'hidden_size' expected int, got list"),
    "a negative size": (settings("config.json", hidden_size=-1), "hidden size"),
    "a huge size": (settings("config.json", hidden_size=10**13), "RuntimeError.*memory"),
    "half a layer": (settings("config.json", num_hidden_layers=2.5), "'num_hidden_layers' expected int, got float"),
    "no heads": (settings("config.json", num_attention_heads=0), "ZeroDivisionError"),
    "a negative vocabulary": (settings("config.json", vocab_size=-5), "negative dimension"),
    "unknown activation": (settings("config.json", hidden_act="nope"), "KeyError: 'nope'"),
    "rope": (settings("config.json", rope_parameters="x"), "'rope_parameters' with value 'x'"),
    "generation: no JSON": (write("generation_config.json", b"{"), "generation_config.json"),
    "generation: a list": (write("generation_config.json", b"[]"), "TypeError"),
    "no weights": (remove(WEIGHTS), "no file named model.safetensors"),
    "empty weights": (write(WEIGHTS, b""), "damaged file of weights .*header too small"),
    "garbage": (write(WEIGHTS, b"x" * 1000), "damaged file of weights .*header too large"),
    "cut weights": (change_bytes(WEIGHTS, lambda content: content[:5000]), "damaged file of weights"),
    "a broken header": (
        change_bytes(WEIGHTS, lambda content: content[:20] + b"\xff" * 10 + content[30:]),
        "damaged file of weights",
    ),
    "another dtype": (change_bytes(WEIGHTS, lambda c: c.replace(b'"F32"', b'"I32"')), r"the weight .* as I32 in"),
    "integers": (as_bytes, r"the weight .* as I8 in model.safetensors, .*no quantization_config"),
    "a shard is missing": (shards(remove("model-00002-of-00008.safetensors")), "No such file .*model-00002-of-00008"),
    "an empty shard": (shards(write("model-00002-of-00008.safetensors", b"")), "damaged file of weights"),
    "an index that is no JSON": (shards(write(WEIGHTS + ".index.json", b"{")), "JSONDecodeError"),
    "an empty index": (shards(write(WEIGHTS + ".index.json", b"{}")), "weight_map"),
    "a list for an index": (shards(write(WEIGHTS + ".index.json", b"[]")), "TypeError"),
    "code in a pickle": (
        lambda folder: (remove(WEIGHTS)(folder), write("pytorch_model.bin", pickle.dumps({"a": Code()}))(folder)),
        "UnpicklingError",
    ),
}
TOKENIZER = {
    "no JSON": (write("tokenizer.json", b"{"), "JSONDecodeError"),
    "empty": (write("tokenizer.json", b""), "JSONDecodeError"),
    "an empty object": (write("tokenizer.json", b"{}"), "KeyError"),
    "a list": (write("tokenizer.json", b"[]"), "TypeError"),
    "cut": (change_bytes("tokenizer.json", lambda content: content[:500]), "JSONDecodeError"),
    "no vocabulary": (settings("tokenizer.json", model={"type": "BPE"}), "Missing vocab"),
    "unknown kind": (settings("tokenizer.json", model={"type": "x"}), "Exception: data did not match"),
    "missing": (remove("tokenizer.json"), "ValueError"),
    "both missing": (remove("tokenizer.json", "tokenizer_config.json"), "ValueError"),
    "its class makes one": (
        lambda folder: (
            remove("tokenizer.json")(folder),
            settings("tokenizer_config.json", tokenizer_class="LlamaTokenizer")(folder),
        ),
        "holds none of the vocabulary files",
    ),
    "configuration: no JSON": (write("tokenizer_config.json", b"{"), "JSONDecodeError"),
    "configuration: a list": (write("tokenizer_config.json", b"[]"), "cannot be read"),
    "configuration: class": (settings("tokenizer_config.json", tokenizer_class=3), "AttributeError"),
    "configuration: EOS": (settings("tokenizer_config.json", eos_token=3), "eos_token has to be"),
}
ADAPTER = {
    "no JSON": (write("adapter_config.json", b"{"), "JSONDecodeError"),
    "a list": (write("adapter_config.json", b"[]"), "TypeError"),
    "unknown kind": (settings("adapter_config.json", peft_type="NOPE"), "NOPE"),
    "no kind": (settings("adapter_config.json", "peft_type"), "peft_type"),
    "text for a rank": (settings("adapter_config.json", r="x"), "TypeError"),
    "rank 0": (settings("adapter_config.json", r=0), "positive integer"),
    "no such module": (settings("adapter_config.json", target_modules=["nope"]), "'nope'.* not found"),
    "a number for the model": (settings("adapter_config.json", base_model_name_or_path=3), "names the model 3"),
    "cut weights": (change_bytes("adapter_model.safetensors", lambda c: c[:100]), "damaged file of weights"),
    "empty weights": (write("adapter_model.safetensors", b""), "damaged file of weights"),
    "no weights": (remove("adapter_model.safetensors"), "holds no adapter_model.safetensors"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sound_adapter(sound) -> Path:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(sound)
    model.save_pretrained(sound.parent / "adapter")
    return sound.parent / "adapter"


@pytest.fixture
def config(tmp_path) -> DPOConfig:
    return DPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[])


def broken(folder: Path, tmp_path: Path, change: Break | None = None) -> str:
    shutil.copytree(folder, tmp_path / "broken")
    if change is not None:
        change(tmp_path / "broken")
    return str(tmp_path / "broken")


def said(error: pytest.ExceptionInfo, argument: str, path: str) -> None:
    message = str(error.value)
    assert message.startswith(f"{argument}={path!r} ") and "; " in message and "\n" not in message
    assert len(message) < 700


@pytest.mark.parametrize(("change", "words"), CONFIG.values(), ids=CONFIG)
def test_broken_models_are_refused(tmp_path, monkeypatch, sound, config, change, words):
    monkeypatch.chdir(tmp_path)
    path = broken(sound, tmp_path, change)
    with pytest.raises(InputError, match=words) as error:
        load_model(path, config, None, "ref_model")
    said(error, "ref_model", path)
    assert not (tmp_path / "ran").exists(), "code of the pickle ran"


@pytest.mark.parametrize(("change", "words"), ADAPTER.values(), ids=ADAPTER)
def test_broken_adapters_are_refused(tmp_path, sound_adapter, config, change, words):
    path = broken(sound_adapter, tmp_path, change)
    with pytest.raises(InputError, match=words) as error:
        load_model(path, config, None)
    said(error, "model", path)


@pytest.mark.parametrize(("change", "words"), TOKENIZER.values(), ids=TOKENIZER)
def test_broken_tokenizers_are_refused(tmp_path, sound, config, change, words):
    path, model = broken(sound, tmp_path, change), tiny_model("llama")
    model.config._name_or_path = path
    with pytest.raises(InputError, match=words) as error:
        tokenizer_of(None, path, model, config)
    said(error, "processing_class", path)


def test_sound_files_are_loaded(sound, sound_adapter, config):
    model = load_model(str(sound), config, None)
    assert len(tokenizer_of(None, str(sound), model, config)) == 97
    assert load_model(str(sound_adapter), config, None).active_adapter == "default"


def test_options_of_loading_are_named(sound, config):
    config.model_init_kwargs = {"no_such": 1}
    with pytest.raises(InputError, match=r"^model=.* 'no_such'.*check model_init_kwargs \(no_such\)"):
        load_model(str(sound), config, None)
    for dtype in ("floaty", "nn"):
        config.model_init_kwargs = {"dtype": dtype}
        with pytest.raises(InputError, match=rf"model_init_kwargs\['dtype'\]='{dtype}' is no dtype"):
            load_model(str(sound), config, None)


def test_a_path_that_cannot_be_looked_at_is_refused(config):
    for path in ("~nobody-of-this-name/model", "/" + "x" * 5000):
        with pytest.raises(InputError, match="^model="):
            load_model(path, config, None)


@pytest.mark.parametrize("error", [MemoryError(), ImportError("no such package"), torch.OutOfMemoryError("full")])
def test_what_is_no_matter_of_the_file_stays_what_it_is(error):
    with pytest.raises(type(error)), reading("model", "here", "copy it"):
        raise error
