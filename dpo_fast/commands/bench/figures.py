"""Measured figures: the parts of the result that `dpo-fast bench` prints and writes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_fast.commands.bench.measurement import spread
from dpo_fast.commands.bench.positions import Positions
from dpo_fast.commands.bench.settings import Trial, fastest
from dpo_fast.commands.bench.turns import Comparison
from dpo_fast.commands.bench.worker import Failure, Report
from dpo_fast.config import DPOConfig

OURS = "dpo_fast"
_WORTH_MERGING = 0.05  # share of the packed positions that merging prompts must save to be advised


def measured_figures(comparison: Comparison, comparisons: Sequence[int], epoch: Positions) -> dict[str, Any]:
    """Return speed and memory of every side, and our ratios to the others.

    Args:
        comparison: reports of the sides, whose losses are known to be the same.
        comparisons: number of comparisons in each timed step.
        epoch: counts of an epoch.
    """
    sides = {name: _side(report, sum(comparisons), epoch) for name, report in comparison.reports.items()}
    ours = sides.get(OURS)
    others = {name: side for name, side in sides.items() if name != OURS} if ours else {}
    return {
        "steps": len(comparisons),
        "sides": sides,
        "against": {
            name: {
                "speedup": ours["pairs_per_second"] / side["pairs_per_second"],
                "memory": ours["peak_memory_bytes"] / side["peak_memory_bytes"],
            }
            for name, side in others.items()
        },
        "no_part": {name: _reason(failure) for name, failure in comparison.failures.items()},
        "in_turns": comparison.in_turns,
        "layout": comparison.reports[OURS].notes["layout"] if ours else None,
    }


def settings_figures(
    trials: Sequence[Trial], against: Mapping[str, Mapping[str, float]], epoch: Positions, config: DPOConfig
) -> dict[str, Any]:
    """Return the settings to take, the speed-up to expect and more advice; the first trial is the user's setting."""
    own, best = trials[0], fastest(trials)
    gain = own.seconds / best.seconds if best is not None and own.fits else None
    return {
        "flags": None if best is None else best.setting.flags(),
        "expected_speedup": {} if gain is None else {name: gain * ratio["speedup"] for name, ratio in against.items()},
        "gradient_checkpointing_needed": best is not None
        and all(trial.setting.gradient_checkpointing for trial in trials if trial.fits),
        "group_by_prompt": not config.group_by_prompt and _saved_by_merging(epoch) >= _WORTH_MERGING,
        "saved_by_merging": _saved_by_merging(epoch),
        "trials": [trial.as_dict() for trial in trials],
    }


def _side(report: Report, comparisons: int, epoch: Positions) -> dict[str, Any]:
    speed = comparisons / sum(report.seconds)
    return {
        "pairs_per_second": speed,
        "seconds_per_step": spread(report.seconds),
        "peak_memory_bytes": report.peak_memory,
        "positions_per_step": statistics.fmean(report.positions),
        "epoch_seconds": epoch.comparisons / speed,
        "losses": report.losses,
    }


def _reason(failure: Failure) -> str:
    return "it needs more memory than there is" if failure.out_of_memory else failure.message


def _saved_by_merging(epoch: Positions) -> float:
    """Return the share of the packed positions that merging groups of the same prompt saves."""
    return 1 - epoch.shared_prompts.merged_positions / epoch.packed
