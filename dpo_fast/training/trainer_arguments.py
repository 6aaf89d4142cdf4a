"""What `DPOTrainer` is given, in the forms that people have it in, as what it works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments

from dpo_fast.config import DPOConfig
from dpo_fast.config.rules import NARROWER_TYPES, check_loss
from dpo_fast.config.types import check_types
from dpo_fast.errors import InputError, reading
from dpo_fast.training.run_record import check_names

# Arguments of earlier trainers, and where they went.
_MOVED = {
    "tokenizer": "processing_class=…",
    "processor": "processing_class=…",
    "max_prompt_length": "DPOConfig(max_length=…), which bounds prompt and completion together",
    "max_completion_length": "DPOConfig(max_length=…), which bounds prompt and completion together",
    "max_target_length": "DPOConfig(max_length=…), which bounds prompt and completion together",
    "model_init": "model=…, and make a trainer for each trial, which computes no reference log-prob again",
    "ref_model_init_kwargs": "ref_model=…, a model that you have loaded",
}


def config_of(
    args: TrainingArguments | None, model: str | nn.Module, compute_metrics: Callable | None = None
) -> DPOConfig:
    """Return `args` as a `DPOConfig`: itself, a default, or one with the values of another trainer's configuration.

    Raises:
        InputError: `args` is no configuration, has an option that means nothing here, away from its default, or one
            that leaves `compute_metrics` nothing to look at.
    """
    if compute_metrics is not None and getattr(args, "prediction_loss_only", False):
        raise InputError("prediction_loss_only=True leaves compute_metrics no predictions; leave one of the two out")
    if isinstance(args, DPOConfig):
        check_types(args, NARROWER_TYPES)  # an attribute may have been set since
        check_loss(args)
        check_names(args.resume_changed)
        return args
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path or "model"
        return DPOConfig(output_dir=f"{Path(name).name}-DPO")
    if not isinstance(args, TrainingArguments):
        raise InputError(f"args is a {type(args).__name__}; give a dpo_fast.DPOConfig")
    ours = {field.name for field in fields(DPOConfig) if field.init}
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    for field in fields(args):
        if field.init and field.name not in ours and values[field.name] != _default(field):
            raise InputError(
                f"args: {type(args).__name__}({field.name}={values[field.name]!r}) means nothing to dpo_fast; leave "
                f"it at {_default(field)!r}, or give a dpo_fast.DPOConfig"
            )
    return DPOConfig(**{name: value for name, value in values.items() if name in ours})


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def tokenizer_of(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None, given: Any, model: nn.Module, args: DPOConfig
) -> PreTrainedTokenizerBase:
    """Return the tokenizer: itself, a processor's, or that of the model. It has a padding token.

    Args:
        processing_class: what the trainer was given.
        given: model that the trainer was given: a folder with an adapter may hold a tokenizer too.
        model: the loaded model.
        args: the options of the run.
    """
    if isinstance(processing_class, ProcessorMixin):
        processing_class = processing_class.tokenizer
    if processing_class is None:
        beside = isinstance(given, str) and (Path(given).expanduser() / "tokenizer_config.json").is_file()
        name = str(Path(given).expanduser()) if beside else model.config._name_or_path
        processing_class = load_tokenizer(
            name, revision=(args.model_init_kwargs or {}).get("revision"), trust_remote_code=args.trust_remote_code
        )
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise InputError(f"processing_class is a {type(processing_class).__name__}; give the model's tokenizer")
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or of a name on the Hub, with its vocabulary.

    Args:
        name: folder or name.
        options: keyword arguments of `from_pretrained`.

    Raises:
        InputError: its files are not there, or cannot be read.
    """
    cure = "give the model's folder its tokenizer files again, or pass processing_class=…"
    with reading("processing_class", name, cure):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    files = sorted({*tokenizer.vocab_files_names.values()})
    if files and Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        # transformers makes some tokenizers without a vocabulary.
        raise InputError(f"processing_class={name!r} holds none of the vocabulary files {', '.join(files)}; {cure}")
    return tokenizer


def refuse_other_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments that `DPOTrainer` does not have, and name their new place.

    Raises:
        InputError: there are any.
    """
    options = {field.name for field in fields(DPOConfig)}
    for name, value in given.items():
        place = _MOVED.get(name) or (f"DPOConfig({name}=…)" if name in options else None)
        cure = f"give {place}" if place else "leave it out"
        raise InputError(f"{name}={value!r} is no argument of DPOTrainer; {cure}")


def refuse_search(trainer: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse what `Trainer.hyperparameter_search` does, and show the loop that does it.

    Raises:
        InputError: always. A trial may change what data, loss and reference were made of when the trainer was made.
    """
    raise InputError(
        "hyperparameter_search: a trainer's data, loss and reference are made when it is made, so one trainer cannot "
        "run several trials; make one for each trial, as in `for beta in (0.05, 0.1): DPOTrainer(…, "
        "args=DPOConfig(beta=beta, …)).train()`. The reference store serves all of them."
    )
