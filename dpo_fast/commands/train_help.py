"""What `dpo-fast train --help` shows: the flags that most runs need, at once.

Texts and defaults of dpo_fast's own flags are those of their dataclasses. `DPOConfig` is read as source, because its
import takes seconds, for PyTorch and transformers.
"""

from __future__ import annotations

import argparse
import ast
import functools
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from dpo_fast.commands.arguments import USAGE, DataArguments, ModelArguments

GROUPS = {
    "model": "model_name_or_path dtype",
    "data": "dataset_name dataset_config dataset_train_split dataset_test_split columns max_length",
    "training": "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate",
    "loss": "beta loss_type",
    "adapter": "use_peft lora_r lora_alpha lora_target_modules load_in_4bit",
    "memory and speed": "max_tokens_per_micro_batch gradient_checkpointing bf16 reference_cache_dir",
    "output": "output_dir logging_steps eval_strategy save_steps report_to resume_from_checkpoint",
}

# What stands for a value where the last word of the flag does not say it.
VALUES = {"max_tokens_per_micro_batch": "TOKENS", "lora_r": "RANK", "report_to": "TRACKER", "columns": "OURS=THEIRS"}


class Option(NamedTuple):
    """A flag by its shortest name."""

    flag: str
    default: Any
    text: str
    is_switch: bool = False


# What transformers has, in fewer words than there.
TRAINER_OPTIONS = {
    option.flag: option
    for option in (
        Option("num_train_epochs", 3.0, "Passes over the training data."),
        Option("max_steps", -1, "Optimizer steps; above 0 they count instead of the passes."),
        Option("per_device_train_batch_size", 8, "Preference groups in a batch of one device; a pair is a group."),
        Option("gradient_accumulation_steps", 1, "Batches in an optimizer step."),
        Option("output_dir", None, "Folder of the trained model and of checkpoints. Unset, the model's name and -DPO."),
        Option("eval_strategy", "no", "When to evaluate on the test split: no, steps or epoch."),
        Option("save_steps", 500, "Steps between two checkpoints; below 1, a fraction of all steps."),
        Option("report_to", "none", "Trackers that get the logs, such as wandb or tensorboard."),
        Option("resume_from_checkpoint", None, "Checkpoint to resume; without a value, the latest in output_dir."),
    )
}


def short_parser() -> argparse.ArgumentParser:
    """Return a parser with the flags of `GROUPS`, for its help alone."""
    parser = argparse.ArgumentParser(
        prog="dpo-fast train",
        usage=USAGE,
        description="Direct Preference Optimization of a model, with the flags that most runs need.",
        epilog="Flags of `accelerate launch` are passed on to it.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=34),
    )
    parser.add_argument("--help_all", action="store_true", help="show every flag, those of TrainingArguments too")
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags and values; flags given here win.")
    options = own_options() | TRAINER_OPTIONS
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names.split():
            flag, default, text, is_switch = options[name]
            if not is_switch:
                how = {"metavar": VALUES.get(name, flag.rpartition("_")[2].upper())}
            else:
                how = {"action": "store_true"} if default is False else {"metavar": "BOOL", "nargs": "?"}
            if default not in (None, False):
                text += f" (default: {' '.join(default) if isinstance(default, list) else default})"
            group.add_argument(f"--{flag}", dest=name, default=default, help=text.replace("%", "%%"), **how)
    return parser


def own_options() -> dict[str, Option]:
    """Return what dpo_fast adds to transformers' options, by name."""
    options = {}
    for field in (*fields(DataArguments), *fields(ModelArguments)):
        flag = min([f"--{field.name}", *field.metadata.get("aliases", ())], key=len)
        options[field.name] = Option(flag.removeprefix("--"), field.default, field.metadata["help"], field.type is bool)
    return options | _options_of_source(Path(find_spec("dpo_fast.config.dpo_config").origin), "DPOConfig")


def _options_of_source(path: Path, name: str) -> dict[str, Option]:
    """Return the fields of a dataclass that are written as literals in its module."""
    (body,) = (
        node.body
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    options = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.value.keywords}
            factory = given.get("default_factory")
            made = factory.body if isinstance(factory, ast.Lambda) else ast.List(elts=[])
            default = given.get("default", made)
            try:
                text = ast.literal_eval(given["metadata"])["help"]
                is_switch = ast.unparse(node.annotation).startswith("bool")
                options[node.target.id] = Option(node.target.id, ast.literal_eval(default), text, is_switch)
            except ValueError:  # a text that names of other modules are put into
                continue
    return options
