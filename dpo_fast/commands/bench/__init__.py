"""`dpo-fast bench`: what training on your own data costs, and the settings to take."""

from __future__ import annotations

import os


def main(argv: list[str]) -> int:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # before PyTorch is imported: one process is measured
    from dpo_fast.commands.bench import command

    return command.main(argv)
