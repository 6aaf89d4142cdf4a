"""`dpo-fast bench`: what padding and repeated prompts cost today, a measured comparison, and the settings to take.

All flags of `dpo-fast train` hold, since settings matter. Every side trains the same prepared rows, those that training
would see first; its reference log-probs are computed before its clock starts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_fast.batches.groups import Layout
from dpo_fast.commands.arguments import TrainArguments
from dpo_fast.commands.bench import report
from dpo_fast.commands.bench.figures import OURS, measured_figures, settings_figures
from dpo_fast.commands.bench.measurement import versions
from dpo_fast.commands.bench.peers import trl_obstacle
from dpo_fast.commands.bench.positions import count_positions, epoch_batches, first_steps, lengths_only
from dpo_fast.commands.bench.settings import Setting, try_settings
from dpo_fast.commands.bench.turns import (
    Comparison,
    TrainerError,
    check_losses,
    compare,
    loss_tolerance,
    one_after_another,
)
from dpo_fast.commands.bench.worker import Failure, Report, TrainJob
from dpo_fast.commands.flags import CommandParser
from dpo_fast.commands.train import choose_split, load_splits, read_arguments, scratch_output
from dpo_fast.config import DPOConfig
from dpo_fast.data.columns import REFERENCE_FIELDS
from dpo_fast.errors import InputError, check_writable, refusing_input
from dpo_fast.training.datasets import prepare_preferences

TRIAL_STEPS = 3

# What a measured run leaves out of the user's training. Rows are in order and merged already; dropout would make the
# losses of two layouts differ.
_MEASURED_FLAGS = {
    "logging_strategy": "steps",
    "logging_steps": "1",
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "load_best_model_at_end": "False",
    "push_to_hub": "False",
    "disable_tqdm": "True",
    "train_sampling_strategy": "sequential",
    "group_by_prompt": "False",
    "disable_dropout": "True",
    "auto_find_batch_size": "False",
    "eval_on_start": "False",
}


def parser() -> argparse.ArgumentParser:
    """Return the flags that `bench` has beside those of `train`."""
    parser = CommandParser(
        prog="dpo-fast bench",
        usage="dpo-fast bench --model MODEL --dataset DATASET [options of dpo-fast train]",
        description="Measure on your own model and data what training costs here and elsewhere, and with which "
        "settings it is fastest. Nothing is saved but what --out names.",
    )
    parser.add_argument(
        "--max_steps", "--max-steps", type=int, default=20, help="steps to measure (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="FILE", help="also write the figures to a .json file")
    return parser


def main(argv: list[str]) -> int:
    with refusing_input():
        options, flags = parser().parse_known_args(argv)
        arguments = read_arguments([*flags, *scratch_output()], parser())
        _check(options, arguments)
        split = choose_split(load_splits(arguments), arguments.data.dataset_train_split, "--dataset_train_split")
        return _bench(options, flags, arguments, split)


def _check(options: argparse.Namespace, arguments: TrainArguments) -> None:
    """Refuse what can be seen to be wrong before a model is loaded."""
    if options.max_steps < 1:
        raise InputError(f"--max_steps {options.max_steps} must be at least 1; 20 is the default.")
    if options.out is not None and (Path(options.out).suffix != ".json" or not Path(options.out).parent.is_dir()):
        raise InputError(f"--out {options.out}: give a name that ends in .json, in a folder that exists.")
    if options.out is not None:
        check_writable("--out", options.out)
    if arguments.launch:
        raise InputError(f"{arguments.launch[0]} is for several processes, and bench measures one; leave it out.")
    if arguments.data.dataset_streaming:
        raise InputError("--dataset_streaming: bench counts the whole dataset; leave it out.")


def _bench(options: argparse.Namespace, flags: Sequence[str], arguments: TrainArguments, dataset: Dataset) -> int:
    """Count, measure, try settings and print.

    Args:
        options: parsed flags of `parser`.
        flags: flags of `dpo-fast train`.
        arguments: the same flags, parsed.
        dataset: rows to train on.

    Raises:
        ValueError: the data or arguments cannot be used, or two sides do not compute the same.
    """
    console, config = Console(), arguments.config
    rows, summary = prepare_preferences(dataset, _tokenizer(arguments), config, vocab_size=None, name="train")
    rows = rows.select_columns([name for name in rows.column_names if name not in REFERENCE_FIELDS])
    groups, batches = lengths_only(rows), epoch_batches(len(rows), config)
    epoch = count_positions(rows, groups, batches)
    report.print_data(console, summary, epoch, config)

    own = _own_setting(config)
    steps = first_steps(batches, own.groups, options.max_steps + 1)
    comparisons = [sum(len(groups[index].comparisons) for index in step) for step in steps[1:]]
    with tempfile.TemporaryDirectory() as folder:
        jobs = _Jobs(folder, flags)
        obstacle = trl_obstacle(config, jobs.write("measured", rows, steps))
        sides = {OURS: jobs.job("measured")}
        if config.layout != "padded":
            sides["padded"] = jobs.job("measured", ["--layout", "padded"])
        if obstacle is None:
            sides["trl"] = jobs.job("measured", trainer="trl")
        console.print(f"Measuring {options.max_steps} steps of {', '.join(report.NAMES[name] for name in sides)} …")
        comparison = _compare(sides)
        exact = not config.bf16 and not config.fp16 and (config.model_init_kwargs or {}).get("dtype") == "float32"
        tolerance = loss_tolerance(exact, config.beta, min(comparisons))
        measured = {"largest_loss_difference": _check_losses(comparison.reports, tolerance)}
        measured |= measured_figures(comparison, comparisons, epoch)
        if obstacle is not None:
            measured["no_part"]["trl"] = obstacle
        report.print_measured(console, measured)

        layout: Layout = "padded" if measured["layout"] == "padded" else "shared"
        costs = [group.num_tokens(layout) for group in groups]
        every_step = first_steps(batches, own.groups, -(-len(rows) // own.groups))
        heaviest = max(every_step, key=lambda step: sum(costs[index] for index in step))
        tried_steps = min(TRIAL_STEPS, options.max_steps)
        jobs.write("tried", rows, [heaviest, *steps[1 : tried_steps + 1]])  # the first one warms up, and must fit

        def run(settings: Sequence[Setting]) -> Iterator[Report | Failure]:
            return one_after_another([jobs.job("tried", setting.flags()) for setting in settings])

        console.print("Trying other cuts of the same steps …")
        trials = try_settings(own, sum(costs[index] for index in heaviest), max(costs), run)
    _check_losses({str(trial.setting): trial.report for trial in trials if trial.fits}, tolerance)
    settings = settings_figures(trials, measured["against"], epoch, config)
    report.print_settings(console, trials, sum(comparisons[:tried_steps]), settings)
    report.print_advice(console, settings, epoch.shared_prompts)
    account = {"rows": summary.rows, "dropped": summary.dropped}
    account |= {"truncated": summary.truncated, "lost_eos": summary.lost_eos}
    result = {
        "data": account | epoch.as_dict(),
        "measured": measured,
        "settings": settings,
        "environment": _environment(),
    }
    if options.out is not None:
        Path(options.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


class _Jobs:
    """Jobs whose rows and reference log-probs are in a folder that goes away with them."""

    def __init__(self, folder: str, flags: Sequence[str]):
        self._folder, self._flags = Path(folder), list(flags)
        self._steps: dict[str, int] = {}
        self._made = 0

    def write(self, name: str, dataset: Dataset, steps: Sequence[Sequence[int]]) -> Dataset:
        """Write the groups of `steps` in their order, and return them."""
        rows = dataset.select([index for step in steps for index in step])
        rows.save_to_disk(str(self._folder / name))
        self._steps[name] = len(steps)
        return rows

    def job(self, rows: str, flags: Sequence[str] = (), trainer: str = "dpo_fast") -> TrainJob:
        """Return a job that trains all steps of `rows`, and finds no reference log-probs of another job.

        Args:
            rows: name of written rows.
            flags: flags that win over the user's.
            trainer: name of a function in `bench.trainers`.
        """
        self._made += 1
        measured = _MEASURED_FLAGS | {
            "output_dir": str(self._folder / "output"),
            "reference_cache_dir": str(self._folder / f"reference-{self._made}"),
            "max_steps": str(self._steps[rows]),
        }
        given = [word for name, value in measured.items() for word in (f"--{name}", value)]
        arguments = ([*self._flags, *given, *flags], str(self._folder / rows))
        return TrainJob(f"dpo_fast.commands.bench.trainers:{trainer}", arguments, self._steps[rows] - 1)


def _tokenizer(arguments: TrainArguments) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        arguments.model.model_name_or_path,
        revision=arguments.model.model_revision,
        trust_remote_code=arguments.config.trust_remote_code,
    )


def _own_setting(config: DPOConfig) -> Setting:
    return Setting(**{field.name: getattr(config, field.name) for field in fields(Setting)})


def _compare(sides: Mapping[str, TrainJob]) -> Comparison:
    try:
        return compare(sides, required=[OURS])
    except TrainerError as error:
        if error.failure.refused:
            raise InputError(error.failure.message) from None
        raise


def _check_losses(reports: Mapping[str, Report], tolerance: float) -> float:
    return check_losses({name: report.losses for name, report in reports.items()}, tolerance)


def _environment() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"device": device, "versions": versions(["dpo-fast", "torch", "transformers", "trl"])}
