"""Settings that train the same steps in other cuts: candidates, trials, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpo_fast.commands.bench.worker import Failure, Report

_GRANULARITY = 128  # bounds are multiples of it
_CUTS = (8, 4, 2, 1)  # into how many passes the heaviest step is cut
_SAME_SPEED = 1.03  # what short trials cannot tell apart; the smaller memory decides


@dataclass(frozen=True)
class Setting:
    """The cut of a step. Compared settings run the same groups per step, so that training stays the same."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_tokens_per_micro_batch: int | None
    gradient_checkpointing: bool

    @property
    def groups(self) -> int:
        """Return the number of groups in a step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def flags(self) -> list[str]:
        """Return the setting as flags of `dpo-fast train`."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Trial:
    """A tried setting with its report, or with a failure where it needs more memory than there is."""

    setting: Setting
    report: Report | Failure

    @property
    def fits(self) -> bool:
        return isinstance(self.report, Report)

    @property
    def seconds(self) -> float:
        assert isinstance(self.report, Report)
        return sum(self.report.seconds)

    def as_dict(self) -> dict[str, Any]:
        figures = {"fits": self.fits}
        if isinstance(self.report, Report):
            figures |= {"seconds": self.report.seconds, "peak_memory_bytes": self.report.peak_memory}
        return asdict(self.setting) | figures


def candidates(own: Setting, step_tokens: int, group_tokens: int, gradient_checkpointing: bool) -> list[Setting]:
    """Return whole steps in one batch, cut by a bound on tokens, from the smallest memory to the largest.

    Args:
        own: the user's setting, which is not returned.
        step_tokens: number of tokens in the heaviest step.
        group_tokens: number of tokens in the heaviest group: a smaller bound cuts nothing more.
        gradient_checkpointing: whether the candidates recompute activations.
    """
    bounds = sorted({_rounded(max(step_tokens / cut, group_tokens)) for cut in _CUTS})
    found = [Setting(own.groups, 1, bound, gradient_checkpointing) for bound in bounds]
    return [setting for setting in found if setting != own]


def _rounded(tokens: float) -> int:
    return -(-int(tokens) // _GRANULARITY) * _GRANULARITY


def try_settings(
    own: Setting,
    step_tokens: int,
    group_tokens: int,
    run: Callable[[Sequence[Setting]], Iterator[Report | Failure]],
) -> list[Trial]:
    """Try the user's setting, then candidates until one does not fit.

    Activations are recomputed (gradient checkpointing) only where nothing fits otherwise.
    """
    trials = [Trial(own, report) for report in run([own])]
    for gradient_checkpointing in (False, True):
        found = candidates(own, step_tokens, group_tokens, gradient_checkpointing)
        for setting, report in zip(found, run(found), strict=False):  # what follows a failure is not asked for
            trials.append(Trial(setting, report))
            if not trials[-1].fits:
                break
        if any(trial.fits and not trial.setting.gradient_checkpointing for trial in trials):
            break
    return trials


def fastest(trials: Sequence[Trial]) -> Trial | None:
    """Return the fastest trial that fits; of trials that are as fast for all that is known, the smallest."""
    fitting = [trial for trial in trials if trial.fits]
    if not fitting:
        return None
    bound = _SAME_SPEED * min(trial.seconds for trial in fitting)
    return min((trial for trial in fitting if trial.seconds <= bound), key=lambda trial: trial.report.peak_memory)
