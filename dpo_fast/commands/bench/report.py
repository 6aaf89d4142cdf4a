"""Tables that `dpo-fast bench` prints for people, before the one line of JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from dpo_fast.commands.bench.positions import Lengths, Positions, SharedPrompts
from dpo_fast.commands.bench.settings import Trial
from dpo_fast.commands.bench.worker import Report
from dpo_fast.config import DPOConfig
from dpo_fast.data.prepare import DataSummary

NAMES = {"dpo_fast": "dpo_fast", "padded": "dpo_fast padded", "trl": "TRL 1.16"}


def print_data(console: Console, summary: DataSummary, counted: Positions, config: DPOConfig) -> None:
    """Print what the data hold, and their cost in token positions."""
    console.print(str(summary), markup=False, soft_wrap=True)
    if summary.truncated or summary.dropped:
        console.print(
            f"What is cut and dropped depends on max_length={config.max_length} and "
            f"truncation_mode={config.truncation_mode}.",
            markup=False,
            soft_wrap=True,
        )
    lengths = Table("tokens", *(_right(name) for name in ("median", "90 %", "longest")))
    lengths.add_row("prompt", *_figures(counted.prompts))
    lengths.add_row("completion", *_figures(counted.completion_lengths))
    console.print(lengths)
    table = Table("token positions of an epoch", _right("number"), _right("share"))
    rows = [
        (f"padded rows, batch {config.per_device_train_batch_size}", counted.usual),
        ("  of which padding", counted.padding),
        ("  of which repeated prompts", counted.repeated_prompts),
        ("  of which repeated completions", counted.repeated_completions),
        ("packed, each prompt once", counted.packed),
    ]
    for name, value in rows:
        if value or "repeated completions" not in name:
            table.add_row(name, f"{value:,}", f"{value / counted.usual:.0%}")
    console.print(table)
    console.print(f"{counted.ratio:.2f}× as many positions padded as packed", markup=False)


def print_measured(console: Console, measured: Mapping[str, Any]) -> None:
    """Print the figures of every side, and our ratios to the others."""
    columns = ("pairs/s", "s/step", "peak GiB", "positions/step", "epoch")
    table = Table("side", *(_right(name) for name in columns))
    for name, side in measured["sides"].items():
        table.add_row(
            NAMES[name],
            f"{side['pairs_per_second']:.3g}",
            f"{side['seconds_per_step']['median']:.3g}",
            f"{side['peak_memory_bytes'] / 2**30:.2f}",
            f"{side['positions_per_step']:,.0f}",
            _duration(side["epoch_seconds"]),
        )
    console.print(table)
    if measured["layout"] == "padded" and "padded" in measured["sides"]:
        console.print("dpo_fast ran in the padded layout; `dpo-fast doctor --model` says why.", markup=False)
    if not measured["in_turns"]:
        console.print("The sides ran one after the other: together they do not fit this machine's memory.")
    for name, reason in measured["no_part"].items():
        console.print(f"{NAMES[name]} takes no part, because {reason}", markup=False, soft_wrap=True)
    for name, ratio in measured["against"].items():
        console.print(
            f"{ratio['speedup']:.2f}× the pairs per second of {NAMES[name]} at {ratio['memory']:.2f}× its peak memory",
            markup=False,
        )
    if len(measured["sides"]) > 1:
        console.print(
            f"{measured['steps']} steps a side, the same rows; losses agree within "
            f"{measured['largest_loss_difference']:.0e} of their size",
            markup=False,
        )


def print_settings(console: Console, trials: Sequence[Trial], comparisons: int, settings: Mapping[str, Any]) -> None:
    """Print the trials, and the settings to take as flags; the timed steps of a trial have `comparisons` in all."""
    table = Table("batch × accumulation", *(_right(name) for name in ("tokens a pass", "recompute", "pairs/s", "GiB")))
    for trial in trials:
        setting, report = trial.setting, trial.report
        speed, memory = "does not fit", ""
        if isinstance(report, Report):
            speed, memory = f"{comparisons / trial.seconds:.3g}", f"{report.peak_memory / 2**30:.2f}"
        table.add_row(
            f"{setting.per_device_train_batch_size} × {setting.gradient_accumulation_steps}",
            str(setting.max_tokens_per_micro_batch or "all"),
            "yes" if setting.gradient_checkpointing else "no",
            speed,
            memory,
        )
    console.print(table)
    if settings["flags"] is None:
        console.print("None of these settings fits: train an adapter (--use_peft), or lower --max_length.")
    else:
        console.print("Settings to take; they train the same steps:")
        flags = settings["flags"]
        pairs = [" ".join(flags[i : i + 2]) for i in range(0, len(flags), 2)]
        console.print("    " + " \\\n    ".join(pairs), markup=False, highlight=False)
        for name, speedup in settings["expected_speedup"].items():
            console.print(f"expected: {speedup:.2f}× the pairs per second of {NAMES[name]} above", markup=False)


def print_advice(console: Console, settings: Mapping[str, Any], shared: SharedPrompts) -> None:
    """Print advice that is not in the block of flags, because it changes the steps or needs no flag."""
    lines = []
    if settings["group_by_prompt"]:
        lines.append(
            f"{shared.groups} groups have a prompt that another one has: --group_by_prompt merges all into "
            f"{shared.merged_groups} and saves {settings['saved_by_merging']:.0%} of the packed positions. A batch "
            "counts groups, so that it then holds more comparisons; lower per_device_train_batch_size to keep them."
        )
    if settings["gradient_checkpointing_needed"]:
        lines.append("Without --gradient_checkpointing none of them fits this machine's memory.")
    lines.append(
        "Reference log-probs are computed once and kept, with or without --precompute_ref_log_probs; `dpo-fast cache` "
        "with the same flags computes them ahead."
    )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _figures(lengths: Lengths) -> tuple[str, str, str]:
    return f"{lengths.median:,}", f"{lengths.percent_90:,}", f"{lengths.longest:,}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
