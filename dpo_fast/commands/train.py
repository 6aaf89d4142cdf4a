"""`dpo-fast train`, and the steps from a command line to a trainer that other commands share."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_fast.commands.arguments import TrainArguments, parse_train_arguments
from dpo_fast.commands.launch import launch_if_needed
from dpo_fast.commands.streams import Stopped, handling_signals
from dpo_fast.commands.train_help import short_parser
from dpo_fast.errors import InputError, refusing_input, writing

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from dpo_fast.config import DPOConfig
    from dpo_fast.trainer import DPOTrainer


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        short_parser().print_help()
        return 0
    with refusing_input():
        arguments = read_arguments(argv)
        launch_if_needed(arguments, ("train", *argv))
        from dpo_fast.trainer import DPOTrainer

        trainer = make_trainer(arguments, DPOTrainer)
    args = trainer.args
    print_summaries(trainer)
    with writing("output_dir", args.output_dir):
        with without_progress_bars(), stopping_at_signals(trainer):
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(f"Saved the model to {args.output_dir}.")
    if hasattr(trainer, "end"):  # transformers 5.18
        trainer.end()
    return 0


@contextmanager
def stopping_at_signals(trainer: DPOTrainer) -> Iterator[None]:
    """Let SIGINT and SIGTERM end training after the step under way, with a checkpoint; a second one ends it at once.

    Raises:
        Stopped: training was ended so.
    """
    number = None

    def stop(received: int, frame: object) -> None:
        nonlocal number
        if number is not None:
            raise Stopped(received)
        number, trainer.stopping.asked = received, True

    with handling_signals(stop):
        yield
    if number is not None:
        state, config = trainer.state, trainer.args
        kept = Path(config.output_dir, f"checkpoint-{state.global_step}")
        where = f"resume with --resume_from_checkpoint {kept}" if kept.is_dir() else "no checkpoint was asked for"
        raise Stopped(number, f"{state.global_step} of {state.max_steps} steps are done; {where}")


def read_arguments(argv: Sequence[str], beside: argparse.ArgumentParser | None = None) -> TrainArguments:
    """Parse flags of `train`, and look for the files that they name on this machine.

    Args:
        argv: flags.
        beside: parser of the flags that another command has besides these.

    Raises:
        InputError: naming the argument and its value.
    """
    arguments = parse_train_arguments(list(argv), beside)
    from dpo_fast.data.loading import looks_local
    from dpo_fast.model.loading import check_model_path
    from dpo_fast.training.checkpoints import find_checkpoint

    check_model_path(arguments.model.model_name_or_path, arguments.config.model_init_kwargs)
    dataset = arguments.data.dataset_name
    if looks_local(dataset) and not Path(dataset).exists():
        raise InputError(f"--dataset {dataset}: no such file or folder; one on the Hub is named owner/name.")
    arguments.config.resume_from_checkpoint = _checkpoint(arguments.config)
    find_checkpoint(arguments.config.resume_from_checkpoint, arguments.config.output_dir)
    return arguments


def _checkpoint(config: DPOConfig) -> str | bool | None:
    """Return a path, True for the latest checkpoint in `output_dir`, or None to start from the model."""
    value = config.resume_from_checkpoint
    if isinstance(value, str) and value.lower() in ("true", "false", "none", "null", ""):
        value = value.lower() == "true"
    return value or None


def make_trainer(arguments: TrainArguments, trainer_class: type[DPOTrainer]) -> DPOTrainer:
    """Load the data and the model, and build the trainer with its reference log-probs."""
    from dpo_fast.training.datasets import check_datasets

    data, model, config = arguments.data, arguments.model, arguments.config
    splits = load_splits(arguments)
    train_dataset = choose_split(splits, data.dataset_train_split, "--dataset_train_split")
    eval_dataset = None
    if config.eval_strategy != "no":
        eval_dataset = choose_split(splits, data.dataset_test_split, "--dataset_test_split")
    check_datasets(train_dataset, eval_dataset, config.columns)
    with without_logged_summaries():  # `print_summaries` says the same
        return trainer_class(
            model=model.model_name_or_path,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=model.quantization_config(),
            peft_config=model.peft_config(),
        )


def load_splits(arguments: TrainArguments) -> Any:
    """Load the dataset that the arguments name: a dict of splits, or one dataset."""
    from dpo_fast.data.loading import load_preference_dataset

    data = arguments.data
    return load_preference_dataset(
        data.dataset_name,
        config_name=data.dataset_config,
        streaming=data.dataset_streaming,
        columns=arguments.config.columns,
    )


def choose_split(dataset: Any, name: str, flag: str) -> Dataset | IterableDataset:
    """Return the split `name`; a lone dataset is the split `train`."""
    splits = dataset if isinstance(dataset, dict) else {"train": dataset}
    if name not in splits:
        cure = "choose another, or leave --eval_strategy out" if flag == "--dataset_test_split" else "choose another"
        raise InputError(f"{flag} {name}: the dataset has only {sorted(splits)}; {cure}.")
    return splits[name]


def print_summaries(trainer: DPOTrainer) -> None:
    """Print what became of the rows, on the first process."""
    if trainer.is_world_process_zero():
        for name, summary in trainer.data_summaries.items():
            print(f"{name}: {summary}")


@contextmanager
def without_logged_summaries() -> Iterator[None]:
    """Keep what becomes of the rows out of the log, for a command that prints it."""
    logger = logging.getLogger("dpo_fast.training.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep the bars that transformers draws for each checkpoint out of the table of training."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def scratch_output() -> list[str]:
    """Return flags that keep a command that trains no model from making a folder for one."""
    return ["--output_dir", tempfile.gettempdir()]
