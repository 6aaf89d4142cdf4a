"""What `dpo-fast train` is told: flags, a YAML file of the same names, and the dataclasses that they fill.

The flags are those of `trl dpo` (TRL 1.16): preference data, model and adapter, every field of `DPOConfig`, and the
flags of `accelerate launch`, which are collected to be passed on.
"""

import argparse
import os
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from dpo_fast.commands.flags import CommandParser, refuse_unknown, spellings
from dpo_fast.config.types import Count, Share, check_types, nearest
from dpo_fast.errors import InputError, input_of

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from dpo_fast.config import DPOConfig

USAGE = "dpo-fast train --model MODEL --dataset DATASET [options]"
Dtype = Literal["auto", "bfloat16", "float16", "float32"]

# Flags of `trl dpo` that ask for something dpo_fast does not do, with the default at which they ask for nothing.
TRL_ONLY: dict[str, Any] = {
    "activation_offloading": False,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "pad_token": None,
    "datasets": None,
    "streaming": False,
    "test_split_size": None,
    "ignore_bias_buffers": False,
}


@dataclass
class DataArguments:
    """Which preferences to train on."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "aliases": ["--dataset"],
            "help": "Name on the Hub, local file (json, jsonl, parquet, csv) or folder.",
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset that has several."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_streaming: bool = field(
        default=False,
        metadata={
            "help": "Read rows as training asks for them; needs --max_steps. Their references are computed then."
        },
    )
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on, with --eval_strategy."})

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class ModelArguments:
    """The model, its adapter and its quantization; names and defaults are those of TRL 1.16's ModelConfig."""

    model_name_or_path: str | None = field(
        default=None, metadata={"aliases": ["--model"], "help": "Name on the Hub or local folder."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    dtype: Dtype | None = field(
        default="float32", metadata={"aliases": ["--torch_dtype"], "help": "Precision of the loaded weights."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of the padded layout; the shared layout brings its own (dpo-fast doctor)."},
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: Count = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: Count = field(default=32, metadata={"help": "Scale of the adapter, before division by its rank."})
    lora_dropout: Share = field(default=0.05, metadata={"help": "Dropout of the adapter; see --disable_dropout."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter; 'all-linear' for every linear layer of the body."}
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters that get an adapter, for experts stored as one tensor."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained in full and saved with the adapter."}
    )
    lora_task_type: Literal["CAUSAL_LM"] = field(
        default="CAUSAL_LM", metadata={"help": "Task type of the adapter; there is one, for language models."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Divide the adapter's scale by √rank instead of rank."})
    use_dora: bool = field(default=False, metadata={"help": "Train magnitude and direction of weights apart (DoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load frozen weights in 8 bits; needs --use_peft."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load frozen weights in 4 bits; needs --use_peft."})
    bnb_4bit_quant_type: Literal["fp4", "nf4"] = field(
        default="nf4", metadata={"help": "Number format of 4-bit weights."}
    )
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the scales of 4-bit weights too."})
    bnb_4bit_quant_storage: str | None = field(default=None, metadata={"help": "Type that stores 4-bit weights."})

    def __post_init__(self) -> None:
        check_types(self, {"lora_target_modules": list[str] | str | None})
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            self.lora_target_modules = self.lora_target_modules[0]
        if self.load_in_8bit and self.load_in_4bit:
            raise InputError("--load_in_8bit and --load_in_4bit exclude each other; leave one out.")
        if (self.load_in_8bit or self.load_in_4bit) and not self.use_peft:
            raise InputError(
                "quantized weights cannot be trained; add --use_peft, or load them without --load_in_*bit."
            )
        if self.use_peft:
            _require("peft", 'pip install "dpo-fast[peft]"')
        if self.load_in_8bit or self.load_in_4bit:
            _require("bitsandbytes", "pip install bitsandbytes")

    def init_kwargs(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`; the configuration's own `model_init_kwargs` go before them."""
        kwargs = {"revision": self.model_revision, "dtype": self.dtype}
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        return kwargs

    def peft_config(self) -> "LoraConfig | None":
        if not self.use_peft:
            return None
        from peft import LoraConfig

        return LoraConfig(
            task_type=self.lora_task_type,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            target_parameters=self.lora_target_parameters,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )

    def quantization_config(self) -> "BitsAndBytesConfig | None":
        if not (self.load_in_8bit or self.load_in_4bit):
            return None
        from transformers import BitsAndBytesConfig

        if self.load_in_8bit:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=None if self.dtype == "auto" else self.dtype,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
            bnb_4bit_quant_storage=self.bnb_4bit_quant_storage,
        )


@dataclass
class TrainArguments:
    """A parsed `dpo-fast train` command: what to train, and what is meant for `accelerate launch`."""

    data: DataArguments
    model: ModelArguments
    config: "DPOConfig"
    launch: list[str]


def parse_train_arguments(argv: list[str], beside: argparse.ArgumentParser | None = None) -> TrainArguments:
    """Read flags and the `--config` file, and check each value as far as that goes without loading anything.

    Args:
        argv: flags.
        beside: parser of the flags that the command has besides those of `train`, for messages.

    Raises:
        InputError: a flag, key or value is not allowed, or the file cannot be read; the message says what is allowed.
    """
    file_values = _read_config_file(_config_path(argv))
    for name, value in _environment(file_values.pop("env", None)).items():
        os.environ[name] = value  # before PyTorch is imported, which reads some of them only then

    from dpo_fast.config import DPOConfig

    parser = _train_parser()
    names = _names(parser)
    launch = _launch_flags_of_file({key: value for key, value in file_values.items() if key not in names}, names)
    parser.set_defaults(**_by_attribute({key: value for key, value in file_values.items() if key in names}, names))
    values, rest = parser.parse_known_args(argv)
    launch += _launch_flags(rest, parser, beside)

    for name, default in TRL_ONLY.items():
        if (given := getattr(values, name)) != default:
            raise InputError(f"{name}={given!r} is not implemented; leave it out, or at its default {default!r}.")
    if not values.model_name_or_path:
        raise InputError("no model given; add --model with a name on the Hub or a folder.")
    if not values.dataset_name:
        raise InputError("no dataset given; add --dataset with a name on the Hub, a file or a folder.")
    data, model = (
        kind(**{option.name: getattr(values, option.name) for option in fields(kind)})
        for kind in (DataArguments, ModelArguments)
    )
    model.model_name_or_path = os.path.expanduser(model.model_name_or_path)
    data.dataset_name = os.path.expanduser(data.dataset_name)
    if values.output_dir is None:
        values.output_dir = f"{Path(model.model_name_or_path).resolve().name}-DPO"
    config = DPOConfig(**{option.name: getattr(values, option.name) for option in fields(DPOConfig) if option.init})
    config.model_init_kwargs = model.init_kwargs() | (config.model_init_kwargs or {})
    return TrainArguments(data, model, config, launch)


def _config_path(argv: list[str]) -> str | None:
    finder = CommandParser(prog="dpo-fast train", add_help=False)
    finder.add_argument("--config")
    return finder.parse_known_args(argv)[0].config


def _read_config_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    class OnceEachLoader(yaml.SafeLoader):
        """Refuses a key that stands twice, of which YAML takes the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            again = next((key for position, key in enumerate(keys) if key in keys[:position]), None)
            if again is not None:
                raise yaml.YAMLError(f"{again!r} stands twice, again in line {node.start_mark.line + 1} or below")
            return super().construct_mapping(node, deep)

    if not Path(path).is_file():
        raise InputError(f"--config {path}: no such file; give a YAML file of flags and values.")
    with input_of(f"--config {path} is not valid YAML", "quote what is text"):
        values = yaml.load(Path(path).read_text(encoding="utf-8"), OnceEachLoader)  # noqa: S506 (a SafeLoader)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"--config {path} must hold a mapping of flags to values, such as 'learning_rate: 1.0e-6'.")
    return values


def _environment(values: Any) -> dict[str, str]:
    fits = values is None or (
        isinstance(values, dict)
        and all(isinstance(name, str) and name and not {"=", "\0"} & set(name) for name in values)
        and all(isinstance(value, str | int | float) and "\0" not in str(value) for value in values.values())
    )
    if not fits:
        raise InputError(f"env={values!r} in the configuration file must map names of variables to text or numbers.")
    return {name: str(value) for name, value in (values or {}).items()}


def _by_attribute(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Values of a configuration file by the attributes that they set."""
    found: dict[str, str] = {}
    for key in values:
        if (other := found.setdefault(names[key], key)) != key:
            raise InputError(f"{other!r} and {key!r} in the configuration file are the same option; keep one.")
    return {names[key]: value for key, value in values.items()}


def _train_parser() -> argparse.ArgumentParser:
    from transformers import HfArgumentParser, TrainingArguments
    from transformers.hf_argparser import string_to_bool

    from dpo_fast.config import DPOConfig

    class TrainParser(CommandParser, HfArgumentParser):
        pass

    parser = TrainParser(
        dataclass_types=(DataArguments, ModelArguments, DPOConfig),
        prog="dpo-fast train",
        usage=USAGE,
        add_help=False,
        description="Direct Preference Optimization of a model. Flags of `accelerate launch` are passed on to it.",
    )
    parser.add_argument("-h", "--help", action="help", help="show the flags that most runs need")
    parser.add_argument("--help_all", "--help-all", action="help", dest="help", help="show every flag")
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags and values; flags given here win.")
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:
            action.nargs, action.const = "?", True  # a bare --bf16 means True, although its default is not False
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", "true"
        if action.dest == "columns":
            action.nargs, action.metavar = "+", "OURS=THEIRS"
        if action.choices is not None and action.metavar is None:
            action.metavar = f"{{{','.join(map(str, action.choices))}}}"  # as argparse shows them
        action.type = action.choices = None  # the dataclasses check what flags and files give
    for name, default in TRL_ONLY.items():
        flags = {f"--{name}", f"--{name.replace('_', '-')}"}
        parser.add_argument(
            *flags, dest=name, default=default, type=_literal, nargs="?", const=True, help=argparse.SUPPRESS
        )
    for option in fields(TrainingArguments):
        # Flags that turn off what transformers, or TRL, has on by default keep working where it is not so here.
        is_on = option.default is True or option.name == "gradient_checkpointing"
        if is_on and f"--no_{option.name}" not in parser._option_string_actions:
            parser.add_argument(
                f"--no_{option.name}",
                f"--no-{option.name.replace('_', '-')}",
                dest=option.name,
                action="store_false",
                default=parser.get_default(option.name),
                help=argparse.SUPPRESS,
            )
    return parser


def _literal(text: str) -> Any:
    """The value that a flag's text stands for: a number, True, False, None, or the text itself."""
    try:
        return {"true": True, "false": False, "none": None, "null": None}[text.lower()]
    except KeyError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _names(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Every name that a configuration file may use (aliases included) → the attribute that it sets."""
    return {
        flag.removeprefix("--").replace("-", "_"): action.dest
        for flag, action in parser._option_string_actions.items()
        if not isinstance(action, argparse._StoreFalseAction) and action.dest not in ("help", "config")
    }


def _launch_flags_of_file(unknown: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Keys of a configuration file that `accelerate launch` knows, as flags; refuses the rest."""
    if not unknown:
        return []
    options = _launch_parser()._option_string_actions
    flags = []
    for key, value in unknown.items():
        action = options.get(f"--{key}")
        if action is None and key != "accelerate_config":
            near = nearest(key, names, "did you mean {}?").replace("'", "")
            cure = near or "dpo-fast train --help_all lists what there is"
            raise InputError(f"unknown key {key!r} in the configuration file; {cure}")
        if action is not None and action.nargs == 0:
            flags += [f"--{key}"] if value else []
        else:
            flags += [f"--{key}", str(value)]
    return flags


def _launch_flags(
    rest: list[str], parser: argparse.ArgumentParser, beside: argparse.ArgumentParser | None
) -> list[str]:
    """Arguments that are left when ours are taken: flags of `accelerate launch`; refuses anything else."""
    if not rest:
        return []
    launch_parser = _launch_parser()
    known = {*launch_parser._option_string_actions, "--accelerate_config"}
    for position, word in enumerate(rest):
        if word.startswith("-") and word.split("=")[0] not in known or not position and not word.startswith("-"):
            own = beside or parser
            refuse_unknown(word, {**dict.fromkeys(spellings(own)), **dict.fromkeys(spellings(parser))}, own.prog)
    where = rest.index("--accelerate_config") if "--accelerate_config" in rest else len(rest)
    launch_parser.parse_args([*rest[:where], *rest[where + 2 :], "dpo-fast"])  # refuses values
    return rest


def _launch_parser() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.error = _refuse
    return parser


def _require(module: str, cure: str) -> None:
    if find_spec(module) is None:
        raise InputError(f"{module} is not installed; install it with: {cure}")


def _refuse(message: str) -> NoReturn:
    raise InputError(f"{message}; accelerate launch --help explains its flags")
