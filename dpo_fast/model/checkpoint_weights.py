"""Loading a checkpoint whole: every weight of the model comes from its files, and the files are of that model.

transformers and peft put random weights where a file has none that fit, and say so in a log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from dpo_fast.errors import InputError, reading

_NAMES_SHOWN = 3
# What RuntimeErrors of transformers, peft and PyTorch begin with where weights do not fit.
_UNFIT = ("Error(s) in loading state_dict", "We encountered some issues during automatic conversion of the weights")
_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")  # dtypes in files of safetensors
CURE = "give the folder of a whole checkpoint, as save_pretrained writes it; copy or download damaged files again"
_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def load_whole_model(name: str, options: Mapping[str, Any], argument: str, allow_missing: bool) -> PreTrainedModel:
    """Return the causal language model of a checkpoint.

    Args:
        name: folder, or name on the Hub.
        options: keyword arguments of `from_pretrained`.
        argument: what the user gave the name as, for messages.
        allow_missing: whether weights may be random where the checkpoint has none that fit.

    Raises:
        InputError: a weight is not in the checkpoint, has another shape there, or the checkpoint is another model's.
    """
    where = f"{argument}={name!r}"
    given = sorted(options.keys() - {"dtype", "trust_remote_code", "device_map"})
    cure = f"{CURE}, and check model_init_kwargs ({', '.join(given)})" if given else CURE
    with reading(argument, name, cure):
        if (Path(name) / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(name)  # which from_pretrained of models leaves out where it is broken
        with _refusing_unfit_weights(where):
            model, found = AutoModelForCausalLM.from_pretrained(
                name, **{**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
            )
        _refuse_integers(model, Path(name), where)
    if allow_missing:
        return model
    unfit, foreign = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if not options.get("ignore_mismatched_sizes"):
        unfit += [f"{key} as {tuple(ours)} ({tuple(theirs)} there)" for key, theirs, ours in found["mismatched_keys"]]
    if unfit:
        unused = f", and has no use for {_listed(foreign)} in it" if foreign else ""
        raise InputError(
            f"{where} does not hold {_listed(unfit)} of a {type(model).__name__}{unused}; give a whole checkpoint of "
            "this architecture and configuration, or allow_missing_weights=True to start from random weights there"
        )
    if foreign and (reason := _other_model(model, foreign)):
        raise InputError(
            f"{where} holds {_listed(foreign)}, which a {type(model).__name__} has no use for: {reason}, or "
            "allow_missing_weights=True to leave them out"
        )
    return model


def load_whole_adapter(base: nn.Module, path: Path, argument: str, allow_missing: bool) -> nn.Module:
    """Return `base` with the adapter of a folder in place, to be trained.

    Raises:
        InputError: the folder's weights are not those of the adapter that its configuration describes.
    """
    from peft import PeftModel

    where = f"{argument}={str(path)!r}"
    if not any(path.glob("adapter_model.*")):
        raise InputError(f"{where} holds no adapter_model.safetensors; give the folder that an adapter was saved to")
    with reading(argument, str(path), CURE), _refusing_unfit_weights(where):
        try:
            model = PeftModel.from_pretrained(base, str(path), is_trainable=True)
        except KeyError as error:  # a module that was to be beside the adapter
            raise InputError(f"{where} does not hold {error.args[0]}; {CURE}") from error
        if allow_missing:
            return model
        found = model.load_adapter(str(path), model.active_adapter, is_trainable=True)  # says what it found
    if unfit := [*found.missing_keys, *found.unexpected_keys]:
        lacks = "does not hold" if found.missing_keys else "has an adapter without a place for"
        raise InputError(
            f"{where} {lacks} {_listed(found.missing_keys or unfit)}; give the folder that this adapter was saved to, "
            "with the adapter_config.json from there, or allow_missing_weights=True to take what fits"
        )
    return model


@contextmanager
def _refusing_unfit_weights(where: str) -> Iterator[None]:
    """Turn what loading raises on weights that do not fit, or cannot be read, into an `InputError`."""
    cure = "give a whole checkpoint of this architecture and configuration"
    try:
        yield
    except SafetensorError as error:
        raise InputError(f"{where} has a damaged file of weights ({error}); copy or download it again") from error
    except RuntimeError as error:
        if not str(error).startswith(_UNFIT):
            raise
        raise InputError(f"{where} has weights that do not fit: {error}; {cure}") from error


def _refuse_integers(model: PreTrainedModel, folder: Path, where: str) -> None:
    """Refuse files that have integers where a model that is not quantised has floats: they would be taken for weights.

    Raises:
        InputError: there is such a weight.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return
    floats = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name in floats & header.keys():
            if header[name]["dtype"] in _INTEGERS:
                raise InputError(
                    f"{where} has the weight {name} as {header[name]['dtype']} in {file.name}, and the configuration "
                    f"has no quantization_config; {CURE}"
                )


def _other_model(model: PreTrainedModel, foreign: Collection[str]) -> str | None:
    """Return what tells that a checkpoint with the weights `foreign` beside all of the model's is another model's."""
    heads = [name for name in model.config.architectures or () if name.endswith(_OTHER_HEADS)]
    if heads:
        return f"the checkpoint is a {heads[0]}; give that of a language model"
    # Layers for predicting several tokens lie behind the last one, where a configuration counts them apart.
    apart = getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0)
    if not apart and any(_lies_behind_the_last_layer(model, key) for key in foreign):
        return "the configuration asks for fewer layers; give the checkpoint's own"
    return None


def _lies_behind_the_last_layer(model: nn.Module, key: str) -> bool:
    numbered = re.match(r"(.+?)\.(\d+)\.", key)
    layers = dict(model.named_modules()).get(numbered[1]) if numbered else None
    return isinstance(layers, nn.ModuleList) and int(numbered[2]) >= len(layers)


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} … ({len(names)} weights)"
