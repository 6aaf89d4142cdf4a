"""`dpo-fast score`: the rewards that a trained model gives to preferences."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dpo_fast.commands.arguments import TrainArguments
from dpo_fast.commands.flags import CommandParser
from dpo_fast.commands.launch import launch_if_needed
from dpo_fast.commands.train import choose_split, load_splits, read_arguments
from dpo_fast.errors import InputError, check_writable, refusing_input, writing


def parser() -> argparse.ArgumentParser:
    """The flags that `score` has besides those of `train`."""
    parser = CommandParser(
        prog="dpo-fast score",
        usage="dpo-fast score --model MODEL [--ref_model MODEL] --dataset DATASET [options of dpo-fast train]",
        description="Score preferences with the reward that DPO training implies, beta times log-prob over reference.",
    )
    parser.add_argument("--ref_model", help="what the model was trained from; unset, the model without its adapter")
    parser.add_argument("--split", default="train", help="split to score (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="write a row for each row of the data: .jsonl or .parquet")
    return parser


def main(argv: list[str]) -> int:
    with refusing_input():
        options, flags = parser().parse_known_args(argv)
        arguments = read_arguments(flags, parser())
        _check(options)
        launch_if_needed(arguments, ("score", *argv))
        return _score(options, arguments, choose_split(load_splits(arguments), options.split, "--split"))


def _check(options: argparse.Namespace) -> None:
    """Refuses what can be seen to be wrong before a model is loaded."""
    from dpo_fast.model.loading import check_model_path

    if options.output is not None and Path(options.output).suffix not in (".jsonl", ".parquet"):
        raise InputError(f"--output {options.output}: give a name that ends in .jsonl or .parquet.")
    if options.output is not None:
        check_writable("--output", options.output)
    if options.ref_model is not None:
        check_model_path(options.ref_model, name="ref_model")


def _score(options: argparse.Namespace, arguments: TrainArguments, dataset: Any) -> int:
    """Loads the models, scores and prints; the first process writes the file."""
    from accelerate import PartialState

    from dpo_fast.model.loading import load_model
    from dpo_fast.scoring import implicit_rewards
    from dpo_fast.training.datasets import check_datasets
    from dpo_fast.training.trainer_arguments import load_tokenizer

    check_datasets(dataset, None, arguments.config.columns)
    config, name = arguments.config, arguments.model.model_name_or_path
    quantization = arguments.model.quantization_config()
    model = load_model(name, config, quantization)
    ref_model = options.ref_model and load_model(options.ref_model, config, quantization, "ref_model")
    tokenizer = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    found = implicit_rewards(model, dataset, tokenizer, config, ref_model, name=options.split)
    if PartialState().is_main_process:
        if options.output is not None:
            with writing("--output", options.output):
                _write(found.rows(), Path(options.output))
        print(f"{options.split}: {found.summary}")
        print(f"accuracy  {found.accuracy}\nmargin    {found.margin}    (95 % confidence)")
    return 0


def _write(rows: Any, path: Path) -> None:
    from dpo_fast.reference.store.files import Folder

    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(list(rows)), sink, compression="zstd")
        text = sink.getvalue().to_pybytes()

    def fill(file) -> str:
        file.write(text)
        return path.name

    path.parent.mkdir(parents=True, exist_ok=True)
    Folder(path.parent).write(fill)
