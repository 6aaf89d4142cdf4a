"""Bad inputs of the command line, a row each: what is given, and words of the one line that must come back.

`{…}` in flags and words names a file of `FILES`. Rows of options are made from the options' own types, so that a new
option has its rows at once.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any, NamedTuple

from dpo_fast.commands.arguments import DataArguments, ModelArguments
from dpo_fast.config import DPOConfig
from dpo_fast.config.rules import NARROWER_TYPES
from dpo_fast.config.types import _choices, _described, _is_closed

PAIR = {"prompt": "aa ", "chosen": "bb", "rejected": "cc"}


def _lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# Files and folders beside the good model and the good rows, by what is wrong with them.
FILES: dict[str, str | bytes] = {
    "empty.jsonl": "",
    "cut.jsonl": '{"prompt": "a", "chosen": "b", "rej',
    "array.json": "[1, 2, 3]",
    "scalar.json": "3",
    "nothing.jsonl": "\n\n",
    "columns.jsonl": _lines({"question": "a", "answer": "b"}),
    "kto.jsonl": _lines({"prompt": "a", "completion": "b", "label": True}),
    "images.jsonl": _lines({**PAIR, "images": ["x.png"]}),
    "numbers.jsonl": _lines({"prompt": 1, "chosen": 2, "rejected": 3}),
    "null.jsonl": _lines({**PAIR, "chosen": None}),
    "same.jsonl": _lines({**PAIR, "rejected": "bb"}),
    "one_score.jsonl": _lines({"prompt": "a", "completions": ["b", "c"], "scores": [1]}),
    "nan_score.jsonl": _lines({"prompt": "a", "completions": ["b", "c"], "scores": [1, float("nan")]}),
    "one_answer.jsonl": _lines({"prompt": "a", "completions": ["b"], "scores": [1]}),
    "cycle.jsonl": _lines({"prompt": "a", "completions": ["b", "c"], "comparisons": [[0, 1], [1, 0]]}),
    "itself.jsonl": _lines({"prompt": "a", "completions": ["b", "c"], "comparisons": [[0, 0]]}),
    "speaker.jsonl": _lines({**PAIR, "prompt": [{"from": "alien", "value": "a"}]}),
    "weight.jsonl": _lines({**PAIR, "weight": -1.0}),
    "offset.jsonl": _lines({**PAIR, "offset": float("inf")}),
    "one_reference.jsonl": _lines({**PAIR, "ref_chosen_logps": -1.0}),
    "nan_reference.jsonl": _lines({**PAIR, "ref_chosen_logps": -1.0, "ref_rejected_logps": float("nan")}),
    "text_ids.jsonl": _lines({"prompt_ids": ["a"], "chosen_ids": ["b"], "rejected_ids": ["c"]}),
    "far_ids.jsonl": _lines({"prompt_ids": [1], "chosen_ids": [10**6], "rejected_ids": [2]}),
    "negative_ids.jsonl": _lines({"prompt_ids": [1], "chosen_ids": [-1], "rejected_ids": [2]}),
    "kwargs.jsonl": _lines({**PAIR, "chat_template_kwargs": "x"}),
    "rows.parquet": b"PAR1 is not all of it",
    "rows.arrow": b"ARROW1",
    "rows.csv": "prompt,chosen,rejected,chosen\na,b,c,d\n",
    "rows.xlsx": b"PK",
    "latin.jsonl": '{"prompt": "\xe4", "chosen": "b", "rejected": "c"}\n'.encode("latin-1"),
    "folder/readme.txt": "no data",
    "no_config/weights.bin": b"",
    "bad_config/config.json": "{",
    "no_type/config.json": "{}",
    "unknown_type/config.json": '{"model_type": "no_such_model"}',
    "bad.yaml": "beta: [1",
    "list.yaml": "- beta",
    "empty.yaml": "",
    "twice.yaml": "beta: 0.1\nbeta: 0.2\n",
    "alias.yaml": "model: a\nmodel_name_or_path: b\n",
    "binary.yaml": b"\xff\xfe\x00",
    "tab.yaml": "beta:\t[\n\t1",
    "number.yaml": "3: 4",
    "env.yaml": "env: yes",
    "env_name.yaml": 'env: {"a=b": 1}',
    "env_value.yaml": "env: {A: [1]}",
    "unknown.yaml": "learning_rte: 1.0",
    "date.yaml": "run_name: 2024-01-01",
    "null.yaml": "beta: null",
    "mapping.yaml": "beta: {a: 1}",
    "object.yaml": "beta: !!python/object:os.system {}",
    "taken": "a file",
}


class BadInput(NamedTuple):
    """A command line that must end with status 2 and one line.

    Attributes:
        command: of `dpo-fast`, with flags; unless `is_complete`, those of the good model and rows come before them.
        words: parts of the line.
        is_complete: whether nothing is to be added.
    """

    command: tuple[str, ...]
    words: tuple[str, ...]
    is_complete: bool = False


def _train(*flags: str, words: tuple[str, ...]) -> BadInput:
    return BadInput(("train", *flags), words)


_WRONG = {
    int: ("much", "1.5", "nan", "inf", "[1]", "true", "1e3x", "-7", "0x10", "99999999999999999999999.5"),
    float: ("much", "nan", "inf", "-inf", "1,5", "true", "--1", "-0.5", "{}"),
    bool: ("maybe", "2", "-1", "0.5", "nil", "[]"),
}
_TAKES_NEGATIVE = ("f_alpha_divergence_coef", "loss_weights", "max_steps")  # max_steps: -1 alone


def _kind(annotation: Any) -> type | None:
    """int, float or bool, where values of an option are of that type alone."""
    parts = [part for part in (typing.get_args(annotation) or (annotation,)) if part is not type(None)]
    if typing.get_origin(annotation) is typing.Annotated:
        parts = [parts[0]]
    while typing.get_origin(parts[0]) is typing.Annotated:
        parts = [typing.get_args(parts[0])[0]]
    return parts[0] if len(parts) == 1 and parts[0] in _WRONG else None


def _of_options() -> list[BadInput]:
    rows = []
    for owner in (DataArguments, ModelArguments, DPOConfig):
        kinds = typing.get_type_hints(owner, include_extras=True) | (NARROWER_TYPES if owner is DPOConfig else {})
        for number, option in enumerate(field for field in dataclasses.fields(owner) if field.init):
            annotation, name = kinds[option.name], option.name
            if (kind := _kind(annotation)) is not None:
                values = _WRONG[kind]
                for value in dict.fromkeys((values[number % len(values)], values[(number * 3 + 1) % len(values)])):
                    if value.startswith("-") and (name in _TAKES_NEGATIVE or "at least" not in _described(annotation)):
                        value = "much"
                    if value == "true" and "true or false" in _described(annotation):
                        continue
                    rows.append(_train(f"--{name}={value}", words=(name, value)))
            elif _choices(annotation) and _is_closed(annotation) and name != "lora_task_type":
                rows.append(_train(f"--{name}", "no_such_choice", words=(name, "no_such_choice", "must be one of")))
    return rows


_HAND_WRITTEN = [
    # command lines
    BadInput((), ("no command", "train"), True),
    BadInput(("trian",), ("'trian'", "did you mean 'train'"), True),
    BadInput(("--verison",), ("--verison", "--version"), True),
    BadInput(("train",), ("no model given", "--model"), True),
    BadInput(("train", "--model", "{model}"), ("no dataset given", "--dataset"), True),
    BadInput(("train", "--dataset", "{rows}"), ("no model given",), True),
    BadInput(("doctor", "--modle", "x"), ("--modle", "--model"), True),
    BadInput(("demo", "--sed", "3"), ("--sed", "--seed"), True),
    BadInput(("demo", "--seed", "x"), ("--seed", "'x'"), True),
    BadInput(("demo", "--output_dir", "{taken}"), ("--output_dir", "taken", "file"), True),
    BadInput(("demo", "--model", "./nowhere"), ("model", "nowhere"), True),
    BadInput(("run",), ("program", "none given"), True),
    BadInput(("run", "--", "no_such_program"), ("program", "no_such_program"), True),
    BadInput(("cache", "--info", "--verify"), ("--info", "--verify", "give one"), True),
    BadInput(("cache", "--prune", "soon"), ("--prune", "soon"), True),
    BadInput(("cache", "--prune", "-1"), ("older_than_days", "-1"), True),
    BadInput(("cache", "--prune", "nan"), ("older_than_days", "nan"), True),
    BadInput(("cache", "--prun", "3"), ("--prun", "--prune"), True),
    BadInput(("cache", "--export", "x.parquet"), ("--export", "store"), True),
    BadInput(("cache", "--verify", "--store", "x"), ("--store", "x"), True),
    BadInput(("cache", "--info", "--beta", "1"), ("--beta", "--info"), True),
    BadInput(("cache", "--num_shards", "two"), ("--num_shards", "two")),
    BadInput(("cache", "--shard", "1"), ("--shard 1", "--num_shards")),
    BadInput(("cache", "--num_shard", "2"), ("--num_shard", "--num_shards")),
    BadInput(("cache", "--loss_type", "simpo"), ("loss_type", "no reference")),
    BadInput(("score", "--output", "x.txt"), ("--output", "x.txt", ".jsonl")),
    BadInput(("score", "--output", "{taken}/x.jsonl"), ("--output", "taken")),
    BadInput(("score", "--outptu", "x.jsonl"), ("--outptu", "--output")),
    BadInput(("score", "--split", "tset"), ("--split", "tset", "train")),
    BadInput(("score", "--ref_model", "./nowhere"), ("ref_model", "nowhere")),
    BadInput(("score",), ("ref_model", "adapter")),
    BadInput(("bench", "--max_steps", "0"), ("--max_steps", "0")),
    BadInput(("bench", "--max_step", "3"), ("--max_step", "--max_steps")),
    BadInput(("bench", "--out", "x.txt"), ("--out", "x.txt", ".json")),
    BadInput(("bench", "--out", "nowhere/x.json"), ("--out", "nowhere")),
    BadInput(("bench", "--num_processes", "2"), ("--num_processes", "bench")),
    # flags of training
    _train("--beta", words=("--beta", "expected one argument")),
    _train("beta", words=("'beta'", "values follow a flag")),
    _train("--bta", "0.1", words=("--bta", "--beta")),
    _train("--learning-rte", "0.1", words=("--learning-rte", "--learning_rate")),
    _train("--beta", "0", words=("beta=0 ", "above 0")),
    _train("--label_smoothing", "0.5", words=("label_smoothing", "0.5", "[0, 0.5)")),
    _train("--loss_type", "sigmod", words=("loss_type", "sigmod", "sigmoid")),
    _train("--loss_type", "sigmoid", "--loss_weights", "1", "2", words=("loss_weights", "[1, 2]")),
    _train("--loss_weights", "x", words=("loss_weights", "x")),
    _train("--loss_type", "hinge", "--label_smoothing", "0.1", words=("label_smoothing", "hinge")),
    _train("--loss_type", "exo_pair", words=("label_smoothing", "exo_pair")),
    _train("--loss_type", "aot", "--use_weighting", words=("use_weighting", "aot")),
    _train("--loss_type", "aot", "--f_divergence_type", "forward_kl", words=("f_divergence_type", "forward_kl")),
    _train("--discopop_tau", "0", words=("discopop_tau", "0.0")),
    _train("--simpo_gamma", "-1", words=("simpo_gamma", "-1")),
    _train("--max_length", "1", words=("max_length", "'1'", "at least 2")),
    _train("--num_train_epochs", "0", words=("num_train_epochs", "'0'", "above 0")),
    _train("--adam_beta1", "1", words=("adam_beta1", "'1'", "below 1")),
    _train("--seed", "-1", words=("seed", "'-1'")),
    _train("--seed", "4294967296", words=("seed", "4294967296")),
    _train("--sync_ref_model", words=("sync_ref_model", "not implemented")),
    _train("--columns", "prompt", words=("columns", "prompt")),
    _train("--columns", "prompt=nope", words=("columns", "nope")),
    _train("--columns", "pormpt=prompt", words=("columns", "pormpt")),
    _train("--report_to", "wandbb", words=("report_to", "wandbb", "wandb")),
    _train("--report_to", "comet_ml", words=("report_to", "comet_ml")),
    _train("--output_dir", "{taken}", words=("output_dir", "taken", "file")),
    _train("--output_dir", "{taken}/x", words=("output_dir", "taken")),
    _train("--output_dir", "y" * 300, words=("output_dir", "yyy")),
    _train("--reference_cache_dir", "{taken}", words=("reference_cache_dir", "taken")),
    _train("--optim", "adamw", words=("optim", "adamw", "adamw_torch")),
    _train("--optim", "sgd", "--optim_args", "momentum=x", words=("optim_args", "momentum=x")),
    _train("--optim", "sgd", "--optim_args", "momentm=0.9", words=("optim_args", "momentm")),
    _train("--optim_args", "nonsense", words=("optim_args", "nonsense")),
    _train("--optim", "galore_adamw", words=("optim", "galore_adamw")),
    _train("--optim", "adamw_bnb_8bit", words=("optim", "adamw_bnb_8bit")),
    _train("--lr_scheduler_type", "cosin", words=("lr_scheduler_type", "cosin", "cosine")),
    _train("--lr_scheduler_type", "cosine_with_min_lr", words=("lr_scheduler_type", "min_lr")),
    _train("--lr_scheduler_type", "reduce_lr_on_plateau", words=("lr_scheduler_type", "eval")),
    _train("--lr_scheduler_kwargs", "{{", words=("lr_scheduler_kwargs", "{{")),
    _train("--lr_scheduler_kwargs", '{{"power": 2}}', words=("lr_scheduler_kwargs", "power")),
    _train("--lr_scheduler_kwargs", "[1]", words=("lr_scheduler_kwargs", "[1]")),
    _train("--model_init_kwargs", "revision", words=("model_init_kwargs", "revision", "mapping")),
    _train("--model_init_kwargs", '{{"tp_plan": "auto"}}', words=("tp_plan", "auto")),
    _train("--model_init_kwargs", '{{"no_such_argument": 1}}', words=("model", "no_such_argument")),
    _train("--accelerator_config", '{{"no_such": 1}}', words=("no_such",)),
    _train("--accelerator_config", "nowhere.json", words=("accelerator_config", "nowhere.json")),
    _train("--gradient_checkpointing_kwargs", '{{"no_such": 1}}', words=("gradient_checkpointing_kwargs", "no_such")),
    _train("--torch_compile_backend", "no_such", words=("torch_compile_backend", "no_such")),
    _train("--layer_kernels", "none", "--torch_compile", words=("torch_compile", "layer_kernels")),
    _train("--fp16", "--bf16", words=("fp16", "bf16")),
    _train("--train_sampling_strategy", "group_by_length", words=("train_sampling_strategy", "group_by_length")),
    _train("--label_smoothing_factor", "0.1", words=("label_smoothing_factor", "0.1")),
    _train("--label_names", "x", words=("label_names", "x")),
    _train("--include_for_metrics", "inputs", words=("include_for_metrics", "inputs")),
    _train("--eval_strategy", "steps", words=("--dataset_test_split", "test")),
    _train("--dataset_train_split", "tarin", words=("--dataset_train_split", "tarin")),
    _train("--load_best_model_at_end", words=("load_best_model_at_end",)),
    _train(
        *("--eval_strategy", "steps", "--eval_steps", "500", "--dataset_test_split", "train"),
        *("--load_best_model_at_end", "--metric_for_best_model", "rewards/acuracies"),
        words=("metric_for_best_model", "rewards/acuracies", "rewards/accuracies"),
    ),
    _train("--logging_steps", "1.5", words=("logging_steps", "1.5")),
    _train("--logging_steps", "0", words=("logging_steps",)),
    _train("--dataloader_prefetch_factor", "2", words=("dataloader_prefetch_factor", "dataloader_num_workers")),
    _train("--dataset_streaming", words=("max_steps",)),
    _train("--resume_from_checkpoint", words=("resume_from_checkpoint", "no checkpoint")),
    _train("--resume_from_checkpoint", "nowhere", words=("resume_from_checkpoint", "nowhere")),
    _train("--resume_from_checkpoint", "{model}", words=("resume_from_checkpoint", "model")),
    _train("--router_aux_loss_coef", "0.1", words=("router_aux_loss_coef", "0.1")),
    _train("--num_processes", "many", words=("--num_processes", "many")),
    _train("--mixed_precision", "fp7", words=("--mixed_precision", "fp7")),
    _train("--accelerate_config", "nowhere", words=("--accelerate_config", "nowhere")),
    # model and adapter
    _train("--dtype", "fp8", words=("dtype", "fp8", "bfloat16")),
    _train("--attn_implementation", "no_such", words=("model", "no_such")),
    _train("--load_in_4bit", words=("quantized", "--use_peft")),
    _train("--load_in_8bit", "--load_in_4bit", words=("--load_in_8bit", "--load_in_4bit")),
    _train("--use_peft", "--lora_r", "0", words=("lora_r", "'0'")),
    _train("--use_peft", "--lora_dropout", "1", words=("lora_dropout", "'1'")),
    _train("--use_peft", "--lora_target_modules", "nope", words=("nope",)),
    _train("--use_peft", "--lora_task_type", "SEQ_CLS", words=("lora_task_type", "SEQ_CLS")),
    _train("--model", "./nowhere", words=("model", "nowhere")),
    _train("--model", "{rows}", words=("model", "rows.jsonl")),
    _train("--model", "{no_config}", words=("model", "no_config")),
    _train("--model", "{bad_config}", words=("model", "bad_config")),
    _train("--model", "{no_type}", words=("model", "no_type")),
    _train("--model", "{unknown_type}", words=("model", "no_such_model")),
    _train("--model", "owner/no_such_model_anywhere", words=("model", "owner/no_such_model_anywhere")),
    _train("--model", "a b c", words=("model", "a b c")),
    # data
    _train("--dataset", "./nowhere.jsonl", words=("dataset", "nowhere.jsonl")),
    _train("--dataset", "owner/no_such_data_anywhere", words=("owner/no_such_data_anywhere",)),
    *(
        _train("--dataset", f"{{{name}}}", words=(name.rpartition("/")[2], *words))
        for name, words in {
            "empty.jsonl": ("empty",),
            "cut.jsonl": (),
            "array.json": (),
            "scalar.json": (),
            "nothing.jsonl": (),
            "rows.parquet": (),
            "rows.arrow": (),
            "rows.xlsx": (".xlsx",),
            "rows.csv": ("chosen",),
            "latin.jsonl": (),
        }.items()
    ),
    *(
        _train("--dataset", f"{{{name}}}", words=words)
        for name, words in {
            "columns.jsonl": ("question", "answer", "prompt"),
            "kto.jsonl": ("label", "KTO"),
            "images.jsonl": ("images",),
            "numbers.jsonl": ("row 0", "'chosen'", "2"),
            "null.jsonl": ("row 0", "chosen"),
            "same.jsonl": ("none of the 1 rows",),
            "one_score.jsonl": ("row 0", "'scores'"),
            "nan_score.jsonl": ("row 0", "'scores'", "nan"),
            "one_answer.jsonl": ("row 0", "'completions'"),
            "cycle.jsonl": ("row 0", "'comparisons'"),
            "itself.jsonl": ("row 0", "'comparisons'", "[0, 0]"),
            "speaker.jsonl": ("row 0", "'prompt'", "alien"),
            "weight.jsonl": ("row 0", "'weight'", "-1.0"),
            "offset.jsonl": ("row 0", "'offset'", "inf"),
            "one_reference.jsonl": ("ref_chosen_logps", "ref_rejected_logps"),
            "nan_reference.jsonl": ("row 0", "ref_rejected_logps", "nan"),
            "text_ids.jsonl": ("_ids", "row 0"),
            "far_ids.jsonl": ("1000000",),
            "negative_ids.jsonl": ("-1",),
            "kwargs.jsonl": ("row 0", "'chat_template_kwargs'", "x"),
        }.items()
    ),
    _train("--dataset", "{folder}", words=("folder", "no data file")),
    # configuration files
    *(
        _train("--config", f"{{{name}}}", words=words)
        for name, words in {
            "bad.yaml": ("bad.yaml", "YAML"),
            "list.yaml": ("list.yaml", "mapping"),
            "empty.yaml": ("empty.yaml", "mapping"),
            "twice.yaml": ("twice.yaml", "'beta'", "twice"),
            "alias.yaml": ("'model'", "'model_name_or_path'"),
            "binary.yaml": ("binary.yaml", "YAML"),
            "tab.yaml": ("tab.yaml", "YAML"),
            "number.yaml": ("number.yaml", "mapping"),
            "env.yaml": ("env=True",),
            "env_name.yaml": ("env=", "a=b"),
            "env_value.yaml": ("env=", "[1]"),
            "unknown.yaml": ("'learning_rte'", "learning_rate"),
            "date.yaml": ("run_name", "2024"),
            "null.yaml": ("beta=None",),
            "mapping.yaml": ("beta=", "{{'a': 1}}"),
            "object.yaml": ("object.yaml", "YAML"),
        }.items()
    ),
    _train("--config", "nowhere.yaml", words=("--config", "nowhere.yaml")),
]

BAD_INPUTS = [*_of_options(), *_HAND_WRITTEN]
