"""One process that several are asked of becomes `accelerate launch` on the same command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from dpo_fast.commands.arguments import TrainArguments
from dpo_fast.errors import InputError

# Set by accelerate, torchrun and ourselves in processes that a launcher has started.
LAUNCHED_MARKS = ("DPO_FAST_LAUNCHED", "ACCELERATE_MIXED_PRECISION", "LOCAL_RANK", "RANK")


def launch_if_needed(arguments: TrainArguments, command: Sequence[str]) -> None:
    """Replace this process by `accelerate launch` on `command`, if several processes are asked for.

    Every process then parses `command` for itself. Nothing happens in a process that a launcher has started.
    """
    if needs_launcher(arguments):
        _launch(arguments, command)


def needs_launcher(arguments: TrainArguments) -> bool:
    """Return whether several processes are asked for, or several GPUs are there, and no launcher has started this."""
    if any(mark in os.environ for mark in LAUNCHED_MARKS):
        return False
    import torch
    from accelerate.commands.config.config_args import default_config_file

    several_gpus = torch.cuda.device_count() > 1 and not arguments.config.use_cpu
    return bool(arguments.launch) or several_gpus or os.path.isfile(default_config_file)


def _launch(arguments: TrainArguments, command: Sequence[str]) -> NoReturn:
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
    """Return a file, given itself or by the name of one that TRL ships (zero2, zero3, fsdp2, …)."""
    if not value:
        raise InputError("--accelerate_config needs a value: a file written by `accelerate config`.")
    if Path(value[0]).is_file():
        return Path(value[0])
    trl = find_spec("trl")
    folder = Path(trl.origin).parent / "accelerate_configs" if trl and trl.origin else Path()
    if trl is None or not (folder / f"{value[0]}.yaml").is_file():
        known = sorted(path.stem for path in folder.glob("*.yaml")) if trl else []
        raise InputError(f"--accelerate_config {value[0]}: no such file, and none of TRL's own {known}.")
    return folder / f"{value[0]}.yaml"
