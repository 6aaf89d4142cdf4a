"""`dpo-fast demo`: a small model learns to write more positively, on any machine, in minutes."""

from __future__ import annotations

import argparse

from dpo_fast.commands.flags import CommandParser
from dpo_fast.errors import check_writable, refusing_input


def parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="dpo-fast demo",
        description="Train a small model on the preferences in this package, and show what changed.",
    )
    parser.add_argument("--model", metavar="PATH_OR_NAME", help="model to train instead of the demo's own")
    parser.add_argument(
        "--output_dir", "--output-dir", default="runs/demo", help="folder of results (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    return parser


def main(argv: list[str]) -> int:
    with refusing_input():
        options = parser().parse_args(argv)
        check_writable("--output_dir", options.output_dir, is_folder=True)
        from dpo_fast.commands.demo import command
        from dpo_fast.model.loading import check_model_path

        if options.model is not None:
            check_model_path(options.model)

        return command.run(options)
