"""Runs a program with TRL accelerated: `dpo-fast run -- trl dpo …`, `dpo-fast run -- accelerate launch train.py …`.

The program takes this process's place. It and every Python process that it starts find `integrations/trl/startup` on
PYTHONPATH, whose `sitecustomize` calls `patch_trl` as soon as TRL is imported while DPO_FAST_PATCH_TRL is 1. So it
reaches the processes of any launcher, and no file of the program changes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo_fast.commands.flags import CommandParser
from dpo_fast.errors import InputError

PATCH_VARIABLE = "DPO_FAST_PATCH_TRL"
STARTUP = Path(__file__).resolve().parents[1] / "integrations" / "trl" / "startup"


def patching_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment`, with what makes Python processes in it patch TRL."""
    others = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != STARTUP]
    return {**environment, PATCH_VARIABLE: "1", "PYTHONPATH": os.pathsep.join([str(STARTUP), *others])}


def parser() -> argparse.ArgumentParser:
    return CommandParser(
        prog="dpo-fast run",
        usage="dpo-fast run -- PROGRAM [ARGUMENT …]",
        description="Run a program with TRL's DPO trainer accelerated, in all Python processes that it starts. No file "
        "of the program changes.",
        epilog="Example: dpo-fast run -- trl dpo --config dpo.yaml",
    )


def main(argv: Sequence[str]) -> int:
    """Become the program `argv`, with or without a leading `--`; programs beside this Python's own are found first.

    Raises:
        InputError: there is no such program.
    """
    if argv[:1] in (["-h"], ["--help"]):
        parser().print_help()
        return 0
    command = list(argv[1:] if argv[:1] == ["--"] else argv)
    if not command:
        raise InputError("program: none given; name one with its arguments, as in `dpo-fast run -- trl dpo --config …`")
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(command[0], path=search)
    if program is None:
        raise InputError(f"program: {command[0]!r} is not found; give its path, or for a script `python {command[0]}`")
    sys.stdout.flush()
    sys.stderr.flush()
    # A Python tells its virtual environment by the path that it was called by: the name alone would be sought on PATH.
    os.execve(program, [program, *command[1:]], patching_environment(os.environ))
