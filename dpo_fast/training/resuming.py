"""Checkpoints of `DPOTrainer`: sealed when written; compared with the run, and read, on resuming."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from dpo_fast.errors import InputError
from dpo_fast.training.checkpoint_seal import SEAL_FILE, Seal, damage
from dpo_fast.training.checkpoints import check_checkpoint, find_checkpoint, reopen_checkpoint, unfinished, useless
from dpo_fast.training.run_record import (
    RESTORED,
    Change,
    Record,
    changes,
    check_names,
    optimizer_of,
    origin_of,
    record_of,
    refusal,
)

RECORD_FILE = "dpo_fast_run.json"

logger = logging.getLogger(__name__)


class ResumingTrainer(Trainer):
    """A trainer that resumes only from checkpoints that are whole, and of the run that it would be itself."""

    _origin: Record
    _run_record: Record
    _seal: Seal
    _accepted: tuple[str, ...] = ()  # what has changed since the checkpoint, and may
    _begins_optimizer = False

    def _remember_origin(self) -> None:
        """Note what the reference pass and training change later; before them, as what `args` resume may be refused.

        Raises:
            InputError: something that alters the result differs from the checkpoint that `args` name.
        """
        self._origin = origin_of(self)
        given = self.args.resume_from_checkpoint
        if given is True or (given and Path(given).is_dir()):
            folder = find_checkpoint(given, self.args.output_dir)
            self._compare(folder, _record_in(folder), record_of(self, self._origin), early=True)

    def _checkpoint_for(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Return the folder to resume from, None for no resuming. Called before anything is loaded.

        Raises:
            InputError: there is none that is whole, or that fits the model, or something that alters the result has
                changed since, and is not in `resume_changed`.
        """
        check_names(self.args.resume_changed)
        self._origin.setdefault("optimizer", optimizer_of(self))
        self._run_record, self._accepted, self._begins_optimizer = record_of(self, self._origin), (), False
        folder = find_checkpoint(resume_from_checkpoint, self.args.output_dir, self._problem)
        if folder is None:
            return None
        record = _record_in(folder)
        if record is None and self.args.should_log:
            logger.warning("%s does not say what its run was: nothing could be compared with this one", folder)
        found = self._compare(folder, record, self._run_record)
        for change in found:
            if self.args.should_log:
                logger.warning("resume_changed: %s", change)
        self._accepted = tuple(change.name for change in found)
        if record is not None and self._run_record["optimizer"] is not None:
            self._begins_optimizer = record["optimizer"]["class"] != self._run_record["optimizer"]["class"]
        return folder

    def _compare(self, folder: str, old: Record | None, new: Record, early: bool = False) -> list[Change]:
        """Return what has changed and is accepted; `early` is before weights of the reference are known."""
        found = [change for change in changes(old, new) if not early or change.name != "weights"] if old else []
        misfit = None
        try:
            check_checkpoint(self.model, folder, self.accelerator)
        except InputError as error:
            misfit = str(error)
        message = self._refusal(folder, misfit, found, old, new)
        if (message := gather_object([message])[0]) is not None:  # the first rank has all weights
            raise InputError(message)
        return found

    def _refusal(
        self, folder: str, misfit: str | None, found: list[Change], old: Record | None, new: Record
    ) -> str | None:
        refused = []
        for change in found:
            if (reason := refusal(self, change, old, new)) is not None:
                refused.append(f"{change} (cannot be accepted: {reason})")
            elif change.name not in self.args.resume_changed or misfit:
                refused.append(str(change))
        if not refused:
            return misfit
        if misfit:
            return f"{misfit}; what has changed: {'; '.join(refused)}"
        names = [change.name for change in found]
        return (
            f"resume_from_checkpoint={folder!r} is of a run that differs: {'; '.join(refused)}; set back what has "
            f"changed, or accept it with resume_changed={names} (--resume_changed {' '.join(names)})"
        )

    def _problem(self, folder: Path) -> str | None:
        """What a checkpoint holds that is no good, as any rank sees it."""
        problem = unfinished(folder)
        if problem is None and (folder / SEAL_FILE).exists():
            problem = damage(folder, self.accelerator)
        elif problem is None and (folder / RECORD_FILE).exists():
            problem = f"no complete {SEAL_FILE}"
        elif problem is None:  # of an earlier release
            problem = useless(folder) or self._foreign_optimizer(folder / OPTIMIZER_NAME)
        return next(filter(None, gather_object([problem])), None)

    def _foreign_optimizer(self, file: Path) -> str | None:
        """Whether the settings in `file`, of a checkpoint that does not name its optimizer, are those of another."""
        if self.is_deepspeed_enabled or not file.is_file():
            return None
        try:
            saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["param_groups"][0].keys()
        except Exception as error:  # damaged files raise anything
            return f"no readable {OPTIMIZER_NAME} ({type(error).__name__})"
        optimizer = self.optimizer
        if optimizer is None:
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if not isinstance(kind, type) or not issubclass(kind, Optimizer):
                return None
            optimizer = kind([nn.Parameter(torch.zeros(1))], **options)
        own = optimizer.param_groups[0].keys() | {"initial_lr"}
        if saved <= own or own - {"initial_lr"} <= saved:  # a release may add settings
            return None
        return f"the state of another optimizer than {type(optimizer).__name__} in {OPTIMIZER_NAME}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        reopen_checkpoint(folder)
        self.accelerator.wait_for_everyone()  # no rank writes before the folder is reopened
        self._seal = Seal(folder, self._run_record, RECORD_FILE, self.args.save_only_model)
        with self._seal.before(self.state):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json, which is next, says that all is written
        self._seal.read_share(self.accelerator)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        load = super()._load_optimizer_and_scheduler
        if checkpoint is None or not (self._begins_optimizer or RESTORED & set(self._accepted)):
            load(checkpoint)
            return
        if self._begins_optimizer:
            load = functools.partial(_load_schedule, self.lr_scheduler)
        _load_between_settings(load, checkpoint, self.optimizer, self.lr_scheduler)


def _load_schedule(schedule: LambdaLR, checkpoint: str) -> None:
    schedule.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))


def _load_between_settings(
    load: Callable[[str], None], checkpoint: str, optimizer: Optimizer, schedule: LambdaLR
) -> None:
    """Load moments and steps, and keep the settings and rates of this run, not those that the checkpoint brings."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    rates = list(schedule.base_lrs)
    load(checkpoint)
    schedule.base_lrs = rates
    schedule._last_lr = [
        rate * factor(schedule.last_epoch) for rate, factor in zip(rates, schedule.lr_lambdas, strict=True)
    ]
    for group, own, rate in zip(optimizer.param_groups, settings, schedule._last_lr, strict=True):
        group.update({**own, "lr": rate})


def _record_in(folder: str) -> Record | None:
    """The record of a checkpoint; None where there is none that can be read."""
    try:
        return json.loads(Path(folder, RECORD_FILE).read_bytes())
    except (OSError, ValueError):
        return None
