"""The command line: `dpo-fast train | cache | score | bench | run | demo | doctor`.

Everything that can be seen to be wrong before a model is loaded is reported before. A mistake in the input ends with
status 2 and one line on stderr; a traceback means a bug.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from dpo_fast.arguments import TrainArguments
    from dpo_fast.config import DPOConfig
    from dpo_fast.trainer import DPOTrainer

# The extra of dpo-fast that installs an optional module.
EXTRAS = {
    "peft": "peft",
    "trl": "trl",
    "flash_attn": "flash",
    "matplotlib": "plot",
    "gguf": "demo",
    "vaderSentiment": "demo",
}

# Set by accelerate, torchrun and ourselves in processes that a launcher has started.
LAUNCHED_MARKS = ("DPO_FAST_LAUNCHED", "ACCELERATE_MIXED_PRECISION", "LOCAL_RANK", "RANK")


def check_paths(arguments: TrainArguments) -> None:
    """Reports a model, dataset or checkpoint that is meant to be on this machine and is not.

    Raises:
        ValueError: naming the argument and the path.
    """
    from dpo_fast.data.loading import looks_local
    from dpo_fast.model.loading import check_model_path
    from dpo_fast.training.checkpoints import find_checkpoint

    check_model_path(arguments.model.model_name_or_path, arguments.config.model_init_kwargs)
    dataset = arguments.data.dataset_name
    if looks_local(dataset) and not Path(dataset).exists():
        raise ValueError(f"--dataset {dataset}: no such file or folder; one on the Hub is named owner/name.")
    find_checkpoint(_checkpoint(arguments.config), arguments.config.output_dir)


def _checkpoint(config: DPOConfig) -> str | bool | None:
    """A path, True for the latest checkpoint in `output_dir`, or None to start anew."""
    value = config.resume_from_checkpoint
    if isinstance(value, str) and value.lower() in ("true", "false", "none", "null", ""):
        value = value.lower() == "true"
    return value or None


def needs_launcher(arguments: TrainArguments) -> bool:
    """Whether several processes are asked for, or several GPUs are there, and no launcher has started this process."""
    if any(mark in os.environ for mark in LAUNCHED_MARKS):
        return False
    import torch
    from accelerate.commands.config.config_args import default_config_file

    several_gpus = torch.cuda.device_count() > 1 and not arguments.config.use_cpu
    return bool(arguments.launch) or several_gpus or os.path.isfile(default_config_file)


def launch(arguments: TrainArguments, command: Sequence[str]) -> NoReturn:
    """Replaces this process by `accelerate launch` on the same command, which every process then parses for itself."""
    flags = list(arguments.launch)
    if "--accelerate_config" in flags:
        where = flags.index("--accelerate_config")
        flags[where : where + 2] = ["--config_file", str(_accelerate_config(flags[where + 1 : where + 2]))]
    # Without PYTHONSAFEPATH, running a module would put the working directory in front of the installed packages.
    environment = os.environ | {"DPO_FAST_LAUNCHED": "1", "PYTHONSAFEPATH": "1"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--module", "dpo_fast.cli", *command]
    sys.stdout.flush()
    os.execve(sys.executable, launcher, environment)


def _accelerate_config(value: list[str]) -> Path:
    """A file, or the name of one that TRL ships (zero2, zero3, fsdp2, …)."""
    if not value:
        raise ValueError("--accelerate_config needs a value: a file written by `accelerate config`.")
    if Path(value[0]).is_file():
        return Path(value[0])
    trl = find_spec("trl")
    folder = Path(trl.origin).parent / "accelerate_configs" if trl and trl.origin else Path()
    if trl is None or not (folder / f"{value[0]}.yaml").is_file():
        known = sorted(path.stem for path in folder.glob("*.yaml")) if trl else []
        raise FileNotFoundError(f"--accelerate_config {value[0]}: no such file, and none of TRL's own {known}.")
    return folder / f"{value[0]}.yaml"


def prepare(
    argv: list[str],
    command: Sequence[str] = (),
    trainer_class: Callable[[], type] | None = None,
) -> DPOTrainer:
    """From the command line to a trainer that is ready: all that a mistake in the input can stop.

    Args:
        argv: flags of `train`.
        command: what every process is to run when a launcher starts them, `train` with these flags unless given.
        trainer_class: makes the trainer's class in such a process; None for `DPOTrainer`.
    """
    from dpo_fast.arguments import parse_train_arguments

    arguments = parse_train_arguments(argv)
    check_paths(arguments)
    if needs_launcher(arguments):
        launch(arguments, command or ("train", *argv))

    from dpo_fast.data.formats import detect_format
    from dpo_fast.data.loading import load_preference_dataset
    from dpo_fast.trainer import DPOTrainer

    data, model, config = arguments.data, arguments.model, arguments.config
    config.resume_from_checkpoint = _checkpoint(config)
    evaluates = config.eval_strategy != "no"
    dataset = load_preference_dataset(
        data.dataset_name, config_name=data.dataset_config, streaming=data.dataset_streaming
    )
    train_dataset = _split(dataset, data.dataset_train_split, "--dataset_train_split")
    eval_dataset = _split(dataset, data.dataset_test_split, "--dataset_test_split") if evaluates else None
    for split in filter(None, (train_dataset, eval_dataset)):
        if split.column_names:  # a stream may not know them yet
            detect_format(split.column_names)  # a dataset that cannot be used is refused before a model is loaded
    kind = DPOTrainer if trainer_class is None else trainer_class()
    return kind(
        model=model.model_name_or_path,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=model.quantization_config(),
        peft_config=model.peft_config(),
    )


def train(argv: list[str]) -> int:
    trainer = prepare(argv)
    args = trainer.args
    if trainer.is_world_process_zero():
        for name, summary in trainer.data_summaries.items():
            print(f"{name}: {summary}")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(f"Saved the model to {args.output_dir}.")
    if hasattr(trainer, "end"):  # transformers 5.18
        trainer.end()
    return 0


def cache(argv: list[str]) -> int:
    from dpo_fast.cache_command import caching_trainer, main, scratch_output

    def fill(flags: list[str], shard: int, shards: int) -> int:
        trainer = prepare([*flags, *scratch_output()], ("cache", *argv), lambda: caching_trainer(shard, shards))
        if trainer.is_world_process_zero():
            for name, summary in trainer.data_summaries.items():
                print(f"{name}: {summary}")
            print(
                f"{trainer.reference.store.computed} reference log-probs computed, in {trainer.reference.store.folder}"
            )
        return 0

    return main(argv, fill)


def score(argv: list[str]) -> int:
    from dpo_fast import score_command

    options, rest = score_command.parser().parse_known_args(argv)
    from dpo_fast.arguments import parse_train_arguments

    arguments = parse_train_arguments(rest)
    check_paths(arguments)
    score_command.check(options)
    if needs_launcher(arguments):
        launch(arguments, ("score", *argv))

    from dpo_fast.data.loading import load_preference_dataset

    dataset = load_preference_dataset(arguments.data.dataset_name, config_name=arguments.data.dataset_config)
    return score_command.score(options, arguments, _split(dataset, options.split, "--split"))


def bench(argv: list[str]) -> int:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # before PyTorch is imported: one process is measured
    from dpo_fast.arguments import parse_train_arguments
    from dpo_fast.bench import command
    from dpo_fast.cache_command import scratch_output

    options, flags = command.parser().parse_known_args(argv)
    arguments = parse_train_arguments([*flags, *scratch_output()])
    check_paths(arguments)
    command.check(options, arguments)

    from dpo_fast.data.loading import load_preference_dataset

    dataset = load_preference_dataset(arguments.data.dataset_name, config_name=arguments.data.dataset_config)
    split = _split(dataset, arguments.data.dataset_train_split, "--dataset_train_split")
    return command.bench(options, flags, arguments, split)


def run(argv: list[str]) -> NoReturn:
    from dpo_fast.run_command import main

    main(argv)


def _split(dataset: Any, name: str, flag: str) -> Any:
    splits = dataset if isinstance(dataset, dict) else {"train": dataset}
    if name not in splits:
        cure = "choose another, or leave --eval_strategy out" if flag == "--dataset_test_split" else "choose another"
        raise ValueError(f"{flag} {name}: the dataset has only {sorted(splits)}; {cure}.")
    return splits[name]


def demo(options: argparse.Namespace) -> int:
    from dpo_fast.demo.run import main as run_demo

    return run_demo(options) or 0


def doctor(options: argparse.Namespace) -> int:
    from dpo_fast.doctor import report

    return report(options.model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dpo-fast", description="Direct Preference Optimization, fast.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    commands.add_parser("train", add_help=False, help="train a model on preferences; flags are those of `trl dpo`")
    commands.add_parser("cache", add_help=False, help="compute reference log-probs ahead, or look after those kept")
    commands.add_parser("score", add_help=False, help="the rewards that a trained model gives to preferences")
    commands.add_parser("bench", add_help=False, help="what training on these data costs, and the settings to take")
    commands.add_parser("run", add_help=False, help="run a program with TRL accelerated: dpo-fast run -- trl dpo …")
    show = commands.add_parser(
        "demo", help="train a small model on the preferences in this package and show the change"
    )
    show.add_argument("--model", metavar="PATH_OR_NAME", help="model to train instead of the demo's own")
    show.add_argument(
        "--output_dir", "--output-dir", default="runs/demo", help="where results go (default: %(default)s)"
    )
    show.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    show.set_defaults(run=demo)
    check = commands.add_parser("doctor", help="what is installed, which backends will be used, and what is missing")
    check.add_argument("--model", metavar="PATH_OR_NAME", help="also say what this model would use")
    check.set_defaults(run=doctor)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, or 2 after one line on stderr about a mistake in the input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        taking_other_flags = {"train": train, "cache": cache, "score": score, "bench": bench, "run": run}
        if argv and argv[0] in taking_other_flags:
            return taking_other_flags[argv[0]](argv[1:])
        options = _parser().parse_args(argv)
        return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        if not _is_input_mistake(error):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"dpo-fast: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _is_input_mistake(error: Exception) -> bool:
    """What stops the preparation or the doctor is one, and what dpo_fast itself refuses later; the rest is a bug."""
    if isinstance(error, ImportError) and (error.name or "").startswith("dpo_fast"):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    prepares = any(
        frame.f_code in (prepare.__code__, cache.__code__, score.__code__, bench.__code__, doctor.__code__)
        for frame in frames
    )
    refused = frames[-1].f_globals.get("__name__", "").startswith("dpo_fast")
    return prepares or refused or isinstance(error, ModuleNotFoundError)


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, ImportError) and (extra := EXTRAS.get((error.name or "").split(".")[0])):
        message += f'; install it with: pip install "dpo-fast[{extra}]"'
    return message


if __name__ == "__main__":
    sys.exit(main())
